"""Learners: what a learned method supplies to the loop, and what it is given.

The loop (`loop.py`) owns steps, data order, accumulation, learning rates, clipping, evaluation,
checkpoints and the choice of the best. It gives the learner a `Subject`: a module with the places
for masks, and two losses. A learner supplies four functions:

* `prepare(subject, priors)`: put trainable values on `subject.module` (usually by `attach`) and
  return the optimiser, its learning rates at their peak. Called once, also before a resumed run,
  whose trained values, optimiser state and `state()` are written back afterwards.
* `loss_terms(subject, number, context)`: the named losses of micro-batch `number`; their sum is
  back-propagated, divided by the micro-batches of a step. A method without a gradient through the
  model runs it under `no_grad` and returns a surrogate whose gradient is its own estimate.
* `after_step(context)`: what follows the optimiser's step, with `context.step` the step just made:
  a proximal operator, a projection. No gradient is recorded.
* `finish()`: the hard masks that the present values stand for (and weights, where the method trains
  them). It is called before the first step, when it has to return the priors, and whenever an
  evaluation is the best so far. It changes nothing.

Whatever else must survive a kill goes into `state()`, tensors by name, and comes back in
`restore()`.

`MaskLearner` does all of it for methods that train a `MaskParametrization` by AdamW; a method
overrides what it does differently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from nmsparse_deploy.find.learn.adam8 import AdamW8
from nmsparse_deploy.find.learn.mask_parametrization import (
    LearnableMask,
    MakeParametrization,
    MaskSite,
    attach,
    original_weight,
    set_step,
)
from nmsparse_deploy.find.learn.sharded import whole
from nmsparse_deploy.find.learn.step_context import StepContext
from nmsparse_deploy.models.base import to_rows
from nmsparse_deploy.pattern import NMPattern


class Subject(Protocol):
    """A module that masks are learned on: a whole model, or one block. Micro-batches are known by
    number."""

    module: nn.Module
    sites: Mapping[str, MaskSite]
    """By `MaskSite.path`."""
    training: Sequence[int]
    """Numbers of the micro-batches to learn from."""
    held_out: Sequence[int]
    """Numbers of those for evaluation; never trained on."""
    samples: int
    """Samples in a micro-batch."""

    varies: bool
    """Whether a micro-batch changes from step to step (augmentation, noise)."""

    def loss_terms(self, number: int, context: StepContext) -> dict[str, torch.Tensor]:
        """Return named scalars to be minimised, of `module` in the present mode of its masks.
        Teachers are taken from the same module in dense mode, without gradient. Chance comes from
        `context` alone."""
        ...

    def score(self, number: int) -> torch.Tensor:
        """Return the scalar that decides which mask is best, of `module` in the present mode of its
        masks; lower is better."""
        ...


@dataclass(frozen=True)
class LearnedMask:
    """The outcome for one weight: a bool mask `[R, K]` and, where the method trains weights, those
    fp32 rows. On the CPU."""

    mask: torch.Tensor
    weight: torch.Tensor | None = None


class Learner:
    """A learned method while it runs; see the module's docstring."""

    shards = False
    """Whether its values can be split over processes (`sharded.py`)."""

    def prepare(
        self, subject: Subject, priors: Mapping[str, torch.Tensor]
    ) -> torch.optim.Optimizer:
        """Put trainable values on `subject.module` and return the optimiser; `priors` are bool rows
        `[R, K]` by `MaskSite.name`."""
        raise NotImplementedError

    def loss_terms(
        self, subject: Subject, number: int, context: StepContext
    ) -> dict[str, torch.Tensor]:
        """Return the named losses of a micro-batch."""
        raise NotImplementedError

    def after_step(self, context: StepContext) -> None:
        """Do what follows the optimiser's step: nothing, unless the method overrides it."""

    def finish(self) -> dict[str, LearnedMask]:
        """Return the hard masks that the present values stand for, by `MaskSite.name`."""
        raise NotImplementedError

    def state(self) -> dict[str, torch.Tensor]:
        """Return whatever else has to survive a kill."""
        return {}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state` returned."""

    def facts(self) -> dict[str, float]:
        """Return what else the run should report."""
        return {}


@dataclass(frozen=True)
class LearnedMethod:
    """The code of a learned method: what makes a learner from the method's settings, and what that
    holds."""

    make: Callable[[Any], Learner]
    bytes_per_weight: Callable[[Any, NMPattern], float] = lambda spec, pattern: (
        ADAM_BYTES + MASK_BYTES
    )
    """What the method holds for every weight that learns, from settings and pattern: trained
    values, gradients, optimiser state, best masks."""
    lighter: tuple[Mapping[str, object], ...] = ()
    """Settings that hold less, each less than the one before."""


ADAM_BYTES = 16.0
"""Bytes of a number that AdamW trains: the fp32 value, its gradient and two moments."""

MASK_BYTES = 1.0
"""Bytes of the best mask so far, per weight."""


class MaskLearner(Learner):
    """A learner that trains a `MaskParametrization` by AdamW through the model's own losses."""

    trains_weights = False
    shards = True

    def __init__(
        self,
        parametrize: MakeParametrization,
        rate: float,
        *,
        decay: float,
        moments: int,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        self.parametrize = parametrize
        self.rate, self.decay, self.betas, self.moments = rate, decay, betas, moments
        self.masks: dict[str, LearnableMask] = {}
        self.module: nn.Module = nn.Module()

    def prepare(
        self, subject: Subject, priors: Mapping[str, torch.Tensor]
    ) -> torch.optim.Optimizer:
        self.module = subject.module
        self.masks = attach(subject.module, subject.sites, self.parametrize, priors)
        values = [mask.values for mask in self.masks.values()]
        if self.moments < 32:
            return AdamW8(values, self.rate, self.betas, self.decay)
        return torch.optim.AdamW(values, self.rate, self.betas, weight_decay=self.decay, fused=True)

    def loss_terms(
        self, subject: Subject, number: int, context: StepContext
    ) -> dict[str, torch.Tensor]:
        set_step(subject.module, context)
        return subject.loss_terms(number, context)

    @torch.no_grad()
    def finish(self) -> dict[str, LearnedMask]:
        learned = {}
        for mask in self.masks.values():
            rows = to_rows(whole(original_weight(self.module, mask.site)), mask.site.axis)
            values = whole(mask.values)
            weight = mask.parametrization.kept(values, rows) if self.trains_weights else None
            learned[mask.site.name] = LearnedMask(
                _copied(mask.parametrization.hard(values, rows), torch.bool),
                None if weight is None else _copied(weight, torch.float32),
            )
        return learned


def _copied(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Copy to the CPU, into memory of its own: the values move on, and the best so far stays."""
    return tensor.to("cpu", dtype, copy=True)
