"""Three forms of a learnable mask: a logit per candidate, a logit per weight, a score per weight.

A group of M weights `w` has the candidates `S_i`, all binary rows with N ones. With logits `pi`,
scale `kappa`, temperature `tau` and Gumbel noise `g_i = -log(-log u_i)`:

    y  = softmax((kappa*pi + g) / tau)          relaxed choice of a candidate
    m~ = y S                                    relaxed mask, entries in [0, 1] that sum to N
    m* = S[argmax pi]                           the mask

Either `pi` is trained itself (`candidates`), or `pi = S a` with one number per weight (`compact`),
the log-linear law on the same candidates; `m*` then keeps the N largest `a`. For the loss
`L(w*m~) - lambda*sum (w*m~)^2` with `G = dL/d(w*m~)` the backward pass is

    c = w*G - 2*lambda*w^2*m~,   dpi = kappa/tau * y*(S c - <y, S c>),   da = S^T dpi

and needs nothing but the seed of `u` from the forward pass. `scores` keep the N largest in the
forward pass and hand `w*G - 2*lambda*w^2*m` through to the scores as if the choice were the
identity.

Fang et al., MaskLLM, NeurIPS 2024, arXiv:2409.17481, sections 3.2 and 3.3 (`candidates`); Bengio et
al. 2013, arXiv:1308.3432 (straight-through). Written from the papers' formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.find.learn.mask_parametrization import MaskParametrization
from nmsparse_deploy.find.learn.plackett_luce import MAX_UNIFORM, MIN_UNIFORM
from nmsparse_deploy.find.learn.step_context import LinearSchedule, StepContext
from nmsparse_deploy.masks import project
from nmsparse_deploy.pattern import NMPattern

MAX_CANDIDATES = 10
"""Candidates that get a logit each; beyond, one number per weight is cheaper."""

MAX_DISTRIBUTION = 1000
"""Candidates that a distribution is kept over at most; beyond, only scores fit."""

CHUNK, LARGE = 1 << 17, 1 << 24
"""Numbers of a temporary at a time: on a CPU what its cache holds, elsewhere what is worth a
kernel."""


@dataclass(frozen=True)
class Annealing:
    """Settings that the parametrisations of this file share; `confidence` is the probability of the
    prior's candidate at the first step."""

    kappa: LinearSchedule
    tau: LinearSchedule
    confidence: float
    noise: bool = True
    regulariser: float = 0.0

    def margin(self, pattern: NMPattern) -> float:
        """Return by how much a weight of the prior is ahead of the others at the start, in units of
        the logits."""
        return margin(pattern, self.confidence) / self.kappa.start


@cache
def candidates(pattern: NMPattern) -> torch.Tensor:
    """Return `[C, M]`: every mask of a group, the one that keeps the first weights first."""
    table = torch.zeros(math.comb(pattern.group, pattern.keep), pattern.group)
    for row, kept in zip(table, combinations(range(pattern.group), pattern.keep)):
        row[list(kept)] = 1
    return table


def margin(pattern: NMPattern, confidence: float) -> float:
    """Return the `x` for which candidates of weight `exp(x * overlap with the prior)` give the
    prior `confidence`.

    Raises `UsageError` when chance alone gives more.
    """
    keep, count = pattern.keep, math.comb(pattern.group, pattern.keep)
    if confidence <= 1 / count:
        raise UsageError(
            f"confidence {confidence:g} is no more than chance, which gives each of the {count} masks of "
            f"a {pattern} group {1 / count:.2g}."
        )

    def probability(x: float) -> float:
        weights = [
            math.comb(keep, o) * math.comb(pattern.zeros, keep - o) * math.exp(x * (o - keep))
            for o in range(keep + 1)
        ]
        return 1 / sum(weights)

    low, high = 0.0, 1.0
    while probability(high) < confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < confidence else (low, middle)
    return high


def form_for(pattern: NMPattern) -> str:
    """Return what `auto` means for a pattern."""
    count = math.comb(pattern.group, pattern.keep)
    return (
        "candidates"
        if count <= MAX_CANDIDATES
        else "compact"
        if count <= MAX_DISTRIBUTION
        else "scores"
    )


class CandidateDistribution(MaskParametrization):
    """A distribution over the candidates of every group; logits `[groups, C]`, or `[groups, M]`
    when compact."""

    def __init__(self, pattern: NMPattern, annealing: Annealing, compact: bool) -> None:
        if (count := math.comb(pattern.group, pattern.keep)) > MAX_DISTRIBUTION:
            raise UsageError(
                f"A {pattern} group has {count:,} masks, too many for a distribution.",
                "form: scores",
            )
        self.pattern, self.annealing, self.compact = pattern, annealing, compact

    def start(self, rows: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
        """Put every weight shared with the prior ahead by the same margin; candidates sum to zero
        in every group."""
        groups = prior.reshape(-1, self.pattern.group).float()
        shared, mean = groups, self.pattern.density
        if not self.compact:
            shared, mean = (
                groups @ candidates(self.pattern).to(groups.device).T,
                self.pattern.keep * mean,
            )
        return self.annealing.margin(self.pattern) * (shared - mean)

    def hard(self, values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if self.compact:
            return project(values.reshape(rows.shape), self.pattern)
        table = candidates(self.pattern).to(values.device).bool()
        return table[values.argmax(-1)].reshape(rows.shape)

    def soft(
        self, values: torch.Tensor, rows: torch.Tensor, context: StepContext, name: str
    ) -> torch.Tensor:
        point = AnnealingPoint(
            self.annealing.kappa.at(context.progress),
            self.annealing.tau.at(context.progress),
            self.annealing.regulariser / context.parts,
            self.compact,
        )
        if self.annealing.noise:
            point = AnnealingPoint(
                point.kappa,
                point.tau,
                point.regulariser,
                point.compact,
                lambda: context.generator(name, values.device),
            )
        seen = relaxed(
            values, rows.reshape(-1, self.pattern.group), candidates(self.pattern).to(values), point
        )
        return seen.reshape(rows.shape)


class StraightThroughScores(MaskParametrization):
    """A score for every weight; the highest of a group are kept, also while training."""

    def __init__(self, pattern: NMPattern, annealing: Annealing) -> None:
        self.pattern, self.annealing = pattern, annealing

    def start(self, rows: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
        return self.annealing.margin(self.pattern) * (prior.float() - self.pattern.density)

    def hard(self, values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return project(values.detach(), self.pattern)

    def soft(
        self, values: torch.Tensor, rows: torch.Tensor, context: StepContext, name: str
    ) -> torch.Tensor:
        seen: torch.Tensor = _StraightThrough.apply(
            values, rows, self.hard(values, rows), self.annealing.regulariser / context.parts
        )
        return seen


@dataclass(frozen=True)
class AnnealingPoint:
    """A point on the schedules of a relaxation. `noise` makes the generator of the uniform draws,
    the same at every call; None: no noise."""

    kappa: float
    tau: float
    regulariser: float = 0.0
    compact: bool = False
    noise: Callable[[], torch.Generator] | None = None


def relaxed(
    values: torch.Tensor, groups: torch.Tensor, table: torch.Tensor, point: AnnealingPoint
) -> torch.Tensor:
    """Return `w * m~` for groups `[B, M]`, differentiable in the values `[B, C]` (`[B, M]` when
    compact)."""
    seen: torch.Tensor = _Relaxed.apply(values, groups, table, point)
    return seen


def _choices(
    values: torch.Tensor, table: torch.Tensor, point: AnnealingPoint
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield `yᵀ` `[C, groups]` for chunks of the groups; the same numbers whenever it is called.

    Candidates come first here: a softmax over six neighbours in memory takes twenty times as long
    on a CPU.
    """
    generator = point.noise() if point.noise else None
    length = max(1, (CHUNK if values.device.type == "cpu" else LARGE) // len(table))
    for start in range(0, len(values), length):
        part = slice(start, min(start + length, len(values)))
        logits = table @ values[part].T if point.compact else values[part].T
        if generator is None:
            arguments = logits * (point.kappa / point.tau)
        else:
            drawn = torch.rand(logits.shape, generator=generator, device=values.device).clamp_(
                MIN_UNIFORM, MAX_UNIFORM
            )
            arguments = (
                drawn.log_()
                .neg_()
                .log_()
                .to(logits.dtype)
                .sub_(logits, alpha=point.kappa)
                .div_(-point.tau)
            )
        yield part, arguments.softmax(0)


class _Relaxed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: torch.Tensor,
        groups: torch.Tensor,
        table: torch.Tensor,
        point: AnnealingPoint,
    ) -> torch.Tensor:
        ctx.save_for_backward(values, groups)
        ctx.table, ctx.point = table, point
        seen = torch.empty(groups.shape, dtype=values.dtype, device=values.device)
        for part, y in _choices(values, table, point):
            torch.mul((table.T @ y).T, groups[part], out=seen[part])
        return seen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values, groups = ctx.saved_tensors
        table, point = ctx.table, ctx.point
        gradient = torch.empty_like(values)
        for part, y in _choices(values, table, point):
            w, mask = groups[part].to(values.dtype).T, table.T @ y
            c = torch.mul(w, upstream[part].T, out=torch.empty_like(mask))
            if point.regulariser:
                c.addcmul_(w.square(), mask, value=-2 * point.regulariser)
            c.mul_(point.kappa / point.tau)
            a = (table @ c).sub_(mask.mul_(c).sum(0)).mul_(y)  # <y, S c> = <m~, c>
            gradient[part] = (table.T @ a if point.compact else a).T
        return gradient, None, None, None


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor, regulariser: float
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, mask)
        ctx.regulariser = regulariser
        return torch.where(mask, rows, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, mask = ctx.saved_tensors
        w = rows.float()
        return w * (upstream - 2 * ctx.regulariser * w * mask), None, None, None
