"""Mask methods: functions on one weight matrix, with the statistics that they declare to need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from nmsparse_deploy.find.calibration.layer_stats import LayerStats
from nmsparse_deploy.find.methods.grid import Grid
from nmsparse_deploy.masks import project
from nmsparse_deploy.pattern import Pattern, Scope
from nmsparse_deploy.registry import METHODS, MethodEntry


@dataclass(frozen=True)
class LayerResult:
    """A bool mask `[outputs, reduction]` (True = keep) and, when the method changes weights, the
    new fp32 weight.

    `grid` is what the weight was rounded to, if it was.
    """

    mask: torch.Tensor
    weight: torch.Tensor | None = None
    grid: Grid | None = None


class PruneLayer(Protocol):
    """`weight` is `[outputs, reduction]` in fp32; `mask` is a starting mask for methods that refine
    one.

    `pattern` is an `NMPattern`, and any `Pattern` where the method declares a scope.
    """

    def __call__(
        self,
        weight: torch.Tensor,
        stats: LayerStats,
        pattern: Any,
        mask: torch.Tensor | None = None,
    ) -> LayerResult: ...


@dataclass(frozen=True)
class Method:
    """A one-shot method with its code loaded; `facts` is its line of the registry."""

    facts: MethodEntry
    prune_layer: PruneLayer

    @classmethod
    def load(cls, name: str) -> Method:
        """Import the method `name`. One that only ranks weights gets the shared projection."""
        facts, code = METHODS[name], METHODS.load(name)
        return cls(
            facts, partial(_keep_highest, code, facts.scope or "row") if facts.ranks else code
        )


def _keep_highest(
    scores: Callable[[torch.Tensor, LayerStats], torch.Tensor],
    scope: Scope,
    weight: torch.Tensor,
    stats: LayerStats,
    pattern: Pattern,
    mask: torch.Tensor | None = None,
) -> LayerResult:
    return LayerResult(project(scores(weight, stats), pattern, scope=scope))


def prune_matrices(
    method: Method,
    weight: torch.Tensor,
    stats: LayerStats,
    pattern: Pattern,
    grid: Grid | None = None,
    mask: torch.Tensor | None = None,
) -> LayerResult:
    """Prune `weight` by `method`; a stack of experts `[E*out, in]` matrix by matrix, each with its
    own statistics."""
    options: dict[str, Any] = {} if grid is None else {"grid": grid}
    if not stats.experts:
        return method.prune_layer(weight, stats, pattern, mask, **options)
    count, results = len(stats.experts), []
    masks = [None] * count if mask is None else mask.chunk(count)
    for number, (rows, matrix_stats) in enumerate(zip(weight.chunk(count), stats.experts)):
        if grid is not None:
            options["grid"] = Grid(grid.scales.chunk(count)[number], grid.width, grid.bits)
        results.append(method.prune_layer(rows, matrix_stats, pattern, masks[number], **options))
    return stacked(results, grid)


def stacked(results: Sequence[LayerResult], grid: Grid | None = None) -> LayerResult:
    """Return the results of a stack's matrices as that of the stack; all of them changed weights,
    or none did."""
    weights = [result.weight for result in results if result.weight is not None]
    return LayerResult(
        torch.cat([result.mask for result in results]),
        torch.cat(weights) if weights else None,
        grid,
    )


def relative_error(weight: torch.Tensor, pruned: torch.Tensor, gram: torch.Tensor) -> float:
    """Return `tr[(W-Ŵ) G (W-Ŵ)ᵀ] / tr[W G Wᵀ]`: the layer's output error on the calibration data,
    as a share of its output."""
    return error_over([(weight, pruned, gram)])


def error_over(layers: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> float:
    """Return the relative error of several `(weight, pruned, gram)` together."""

    def energy(m: torch.Tensor, gram: torch.Tensor) -> float:
        return float(((m @ gram) * m).sum(dtype=torch.float64))

    lost = total = 0.0
    for weight, pruned, gram in layers:
        total += energy(weight, gram)
        lost += energy(weight - pruned, gram)
    return lost / total if total > 0 else 0.0
