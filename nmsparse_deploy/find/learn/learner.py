"""What a learned method supplies to the loop, and what it is given.

The loop (`loop.py`) owns steps, data order, accumulation, learning rates, clipping, evaluation, checkpoints and the
choice of the best. It gives the learner a `Subject`: a module with the places for masks, and two losses. A learner
supplies four functions:

* `prepare(subject, priors)`: put trainable values on `subject.module` (usually `attach` with a `Law`) and return the
  optimiser, its learning rates at their peak. Called once, also before a resumed run, whose trained values, optimiser
  state and `state()` are written back afterwards.
* `loss_terms(subject, number, moment)`: the named losses of micro-batch `number`; their sum is back-propagated, divided
  by the micro-batches of a step. A method without a gradient through the model runs it under `no_grad` and returns a
  surrogate whose gradient is its own estimate.
* `after_step(moment)`: what follows the optimiser's step, with `moment.step` the step just made: a proximal operator, a
  projection. No gradient is recorded.
* `finish()`: the hard masks that the present values stand for (and weights, where the method trains them). It is called
  before the first step, when it has to return the priors, and whenever an evaluation is the best so far. It changes
  nothing.

Whatever else must survive a kill goes into `state()`, tensors by name, and comes back in `restore()`.

`MaskLearner` does all of it for methods that are a `Law` with AdamW; a method overrides what it does differently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from nmsparse_deploy.find.learn.adam8 import AdamW8
from nmsparse_deploy.find.learn.mask_parametrization import LawOf, LearnableMask, Site, attach, move_to, original
from nmsparse_deploy.find.learn.sharded import whole
from nmsparse_deploy.find.learn.step_context import Moment
from nmsparse_deploy.models.base import to_rows
from nmsparse_deploy.pattern import NMPattern


class Subject(Protocol):
    """A module that masks are learned on: a whole model, or one block. Micro-batches are known by number."""

    module: nn.Module
    sites: Mapping[str, Site]
    """By `Site.path`."""
    training: Sequence[int]
    """Numbers of the micro-batches to learn from."""
    held_out: Sequence[int]
    """Numbers of those that judge; never trained on."""
    samples: int
    """Samples in a micro-batch."""

    varies: bool
    """Does a micro-batch look different at another moment (augmentation, noise)?"""

    def loss_terms(self, number: int, moment: Moment) -> dict[str, torch.Tensor]:
        """Named scalars to be minimised, of `module` as its masks show themselves now. Teachers are taken from the
        dense face of the same module, without gradient. Chance comes from `moment` alone."""
        ...

    def score(self, number: int) -> torch.Tensor:
        """The scalar that decides which mask is best, of `module` as it shows itself now; lower is better."""
        ...


@dataclass(frozen=True)
class Learnt:
    """The outcome for one weight: a bool mask `[R, K]` and, where the method trains weights, those fp32 rows. On the
    CPU."""

    mask: torch.Tensor
    weight: torch.Tensor | None = None


class Learner:
    """A learned method while it runs; see the module's docstring."""

    shards = False
    """Can its values be split over processes (`sharded.py`)?"""

    def prepare(self, subject: Subject, priors: Mapping[str, torch.Tensor]) -> torch.optim.Optimizer:
        """`priors` are bool rows `[R, K]` by `Site.name`."""
        raise NotImplementedError

    def loss_terms(self, subject: Subject, number: int, moment: Moment) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def after_step(self, moment: Moment) -> None:
        """Nothing, unless the method has something to do there."""

    def finish(self) -> dict[str, Learnt]:
        """By `Site.name`."""
        raise NotImplementedError

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state` returned."""

    def facts(self) -> dict[str, Any]:
        """What else the run should tell; JSON-able."""
        return {}


@dataclass(frozen=True)
class Learned:
    """The code of a learned method: what makes a learner from the method's settings, and what that holds."""

    make: Callable[[Any], Learner]
    bytes_per_weight: Callable[[Any, NMPattern], float] = lambda spec, pattern: ADAM + BEST
    """What the method holds for every weight that learns, from settings and pattern: trained values, gradients,
    optimiser state, best masks."""
    lighter: tuple[dict[str, Any], ...] = ()
    """Settings that hold less, each less than the one before."""


ADAM = 16.0
"""Bytes of a number that AdamW trains: the fp32 value, its gradient and two moments."""

BEST = 1.0
"""Bytes of the best mask so far, per weight."""


class MaskLearner(Learner):
    """A `Law` trained by AdamW through the model's own losses."""

    trains_weights = False
    shards = True

    def __init__(self, law: LawOf, rate: float, *, decay: float, moments: int,
                 betas: tuple[float, float] = (0.9, 0.95)) -> None:
        self.law, self.rate, self.decay, self.betas, self.moments = law, rate, decay, betas, moments
        self.masks: dict[str, LearnableMask] = {}
        self.module: nn.Module = nn.Module()

    def prepare(self, subject: Subject, priors: Mapping[str, torch.Tensor]) -> torch.optim.Optimizer:
        self.module = subject.module
        self.masks = attach(subject.module, subject.sites, self.law, priors)
        values = [mask.values for mask in self.masks.values()]
        if self.moments < 32:
            return AdamW8(values, self.rate, self.betas, self.decay)
        return torch.optim.AdamW(values, self.rate, self.betas, weight_decay=self.decay, fused=True)

    def loss_terms(self, subject: Subject, number: int, moment: Moment) -> dict[str, torch.Tensor]:
        move_to(subject.module, moment)
        return subject.loss_terms(number, moment)

    @torch.no_grad()
    def finish(self) -> dict[str, Learnt]:
        found = {}
        for mask in self.masks.values():
            rows = to_rows(whole(original(self.module, mask.site)), mask.site.axis)
            values = whole(mask.values)
            weight = mask.law.kept(values, rows) if self.trains_weights else None
            found[mask.site.name] = Learnt(_copied(mask.law.hard(values, rows), torch.bool),
                                           None if weight is None else _copied(weight, torch.float32))
        return found


def _copied(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """On the CPU, in memory of its own: the values move on, and what was the best stays."""
    return tensor.to("cpu", dtype, copy=True)
