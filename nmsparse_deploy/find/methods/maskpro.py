"""MaskPro: learn which weights of every group stay from forward passes alone.

Every weight has a logit, and a mask is drawn without replacement (`learn/plackett_luce.py`). A step
draws `m_t`, measures how much worse it is than the starting mask `m₀` on the same batch, and moves
the logits along the score:

    r_t  = f(m_t) - f(m₀)
    π   <- π - η (r_t - δ) ∂ log P(m_t) / ∂π
    δ   <- 0.99 δ + 0.01 r_t

`f(m₀)` is computed here, on the same machine and in the same precision. No baseline that does not
depend on `m_t` makes the estimate biased, so `δ` is updated after its use, and is divided by
`1 - 0.99^t` while it is young. Logits start at `C` for what `m₀` keeps and zero elsewhere. With `C`
fixed a small model draws nothing but `m₀`, so `C` is set such that `flips` groups differ from `m₀`
in a draw:

    B (1 - Π_{j=1..N} j e^C / (j e^C + M - N)) = flips

and `η = step_size · C / |r - δ|`, with a smoothed root mean square of `r - δ`; `magnitude` and
`rate` set the raw `C` and `η` as published. All groups that flipped share one number, so what a
single one is worth shows after hundreds of its flips: expect it to move small models, and use it
where gradients cannot be had.

Sun et al., MaskPro, ICLR 2026, arXiv:2506.12876, sections 3 and 4. Written from the formulas; the
published code has no licence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from accelerate.utils import reduce

from nmsparse_deploy.find.learn.learner import MASK_BYTES, LearnedMethod, MaskLearner, Subject
from nmsparse_deploy.find.learn.mask_parametrization import (
    LearnableMask,
    MaskParametrization,
    MaskSite,
    set_step,
    showing,
)
from nmsparse_deploy.find.learn.plackett_luce import as_mask, sample, score
from nmsparse_deploy.find.learn.step_context import StepContext
from nmsparse_deploy.masks import project
from nmsparse_deploy.pattern import NMPattern
from nmsparse_deploy.recipe import MaskPro

SMOOTHING = 0.99
MAX_MAGNITUDE = 40.0
"""The largest C that is looked for: beyond, no group flips in fp32."""


class DrawnMask(MaskParametrization):
    """One logit per weight; `soft` is a draw, or the starting mask."""

    def __init__(self, site: MaskSite) -> None:
        self.site = site
        self.prior = torch.empty(0)
        self.starting = False
        """Does it show the starting mask?"""

    def start(self, rows: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
        self.prior = prior
        return prior.float()

    def order(self, values: torch.Tensor, context: StepContext, name: str) -> torch.Tensor:
        """Draw the places to keep in this step, `[groups, keep]`; the same whenever it is asked
        for."""
        groups = values.detach().reshape(-1, self.site.pattern.group)
        return sample(groups, self.site.pattern.keep, context.generator(name, values.device))

    def soft(
        self, values: torch.Tensor, rows: torch.Tensor, context: StepContext, name: str
    ) -> torch.Tensor:
        if self.starting:
            return torch.where(self.prior, rows, 0.0)
        drawn = as_mask(self.order(values, context, name), self.site.pattern.group)
        return torch.where(drawn.reshape(rows.shape), rows, 0.0)

    def hard(self, values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return project(values.detach(), self.site.pattern)


class PolicyGradient(MaskLearner):
    """Plain gradient descent on logits along the score of the drawn masks."""

    shards = False  # the score is taken outside the forward pass

    def __init__(self, spec: MaskPro) -> None:
        super().__init__(DrawnMask, spec.rate or 1.0, decay=0.0, moments=32)
        self.spec = spec
        self.magnitude = 1.0
        """C."""
        self.before: dict[int, torch.Tensor] = {}
        """`f(m₀)` by batch."""
        self.residuals: list[torch.Tensor] = []
        """Of this step's micro-batches."""
        self.tracked = torch.zeros(3, dtype=torch.float64)
        """Smoothed residual, smoothed square of its distance from that, and the number of steps in
        them."""

    def prepare(
        self, subject: Subject, priors: Mapping[str, torch.Tensor]
    ) -> torch.optim.Optimizer:
        super().prepare(subject, priors)
        counts = [
            (mask.values.numel() // mask.site.pattern.group, mask.site.pattern)
            for mask in self.masks.values()
        ]
        self.magnitude = self.spec.magnitude or magnitude_for(counts, self.spec.flips)
        for mask in self.masks.values():
            mask.values.data.mul_(self.magnitude)
        rate = self.spec.rate or self.spec.step_size * self.magnitude
        return torch.optim.SGD([mask.values for mask in self.masks.values()], rate)

    def loss_terms(
        self, subject: Subject, number: int, context: StepContext
    ) -> dict[str, torch.Tensor]:
        """Return the loss of a draw, with the policy gradient as its gradient."""
        set_step(subject.module, context)
        with torch.no_grad(), showing(subject.module, "soft"):
            if subject.varies or number not in self.before:
                self._show_starting(True)
                self.before[number] = _total(subject.loss_terms(number, context))
                self._show_starting(False)
            loss = _total(subject.loss_terms(number, context))
        residual = loss - self.before[number]
        self.residuals.append(residual)
        factor = self._advantage(float(residual))
        along = [
            (mask.values * factor * self._score(mask, context)).sum()
            for mask in self.masks.values()
        ]
        surrogate = torch.stack(along).sum()
        return {"loss": loss + surrogate - surrogate.detach()}

    def _show_starting(self, starting: bool) -> None:
        for mask in self.masks.values():
            mask.parametrized_by(DrawnMask).starting = starting

    def _score(self, mask: LearnableMask, context: StepContext) -> torch.Tensor:
        """Return `∂ log P / ∂π` of what is drawn in this step, in the shape of the values."""
        values, site = mask.values.detach(), mask.site
        order = mask.parametrized_by(DrawnMask).order(values, context, site.name)
        return score(values.reshape(-1, site.pattern.group), order).reshape(values.shape)

    def _advantage(self, residual: float) -> float:
        """Return `r - δ`, in units of its usual size unless the rate is given raw; zero while that
        is unknown."""
        smoothed, square, count = self.tracked.tolist()
        young = 1 - SMOOTHING**count if count else 1.0
        away = residual - smoothed / young
        if self.spec.rate is not None:
            return away
        return away / math.sqrt(square / young) if square else 0.0

    def after_step(self, context: StepContext) -> None:
        residual = float(
            reduce(torch.stack(self.residuals).mean(), "mean")
        )  # every process tracks the same
        self.residuals = []
        smoothed, square, count = self.tracked.tolist()
        away = residual - (smoothed / (1 - SMOOTHING**count) if count else 0.0)
        self.tracked = torch.tensor(
            [
                SMOOTHING * smoothed + (1 - SMOOTHING) * residual,
                SMOOTHING * square + (1 - SMOOTHING) * away**2,
                count + 1,
            ],
            dtype=torch.float64,
        )

    def state(self) -> dict[str, torch.Tensor]:
        return {"tracked": self.tracked}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        self.tracked = state["tracked"]

    def facts(self) -> dict[str, float]:
        """Report C, and as `moved` the share of groups whose logits favour another mask than at the
        start, better or not."""
        moved = groups = 0
        for mask in self.masks.values():
            drawn = mask.parametrized_by(DrawnMask)
            different = drawn.hard(mask.values, drawn.prior) ^ drawn.prior
            different = different.reshape(-1, mask.site.pattern.group).any(-1)
            moved, groups = moved + int(different.sum()), groups + len(different)
        return {"magnitude": self.magnitude, "moved": moved / groups}


def stays(magnitude: float, pattern: NMPattern) -> float:
    """Return the probability that a group draws what it starts with, at `C = magnitude`."""
    odds = [j * math.exp(magnitude) for j in range(1, pattern.keep + 1)]
    return math.prod(odd / (odd + pattern.zeros) for odd in odds)


def magnitude_for(groups: Sequence[tuple[int, NMPattern]], flips: float) -> float:
    """Find the C at which `flips` of all groups, given as counts by pattern, differ from the start
    in a draw; zero when even an even distribution flips fewer."""
    low, high = 0.0, MAX_MAGNITUDE
    for _ in range(60):
        middle = (low + high) / 2
        expected = sum(count * (1 - stays(middle, pattern)) for count, pattern in groups)
        low, high = (middle, high) if expected > flips else (low, middle)
    return high


def _total(terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([term.float() for term in terms.values()]).sum()


LEARNED = LearnedMethod(PolicyGradient, lambda spec, pattern: 8.0 + MASK_BYTES)
