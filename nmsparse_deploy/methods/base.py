"""What a mask method is: a function on one weight matrix, and the statistics it declares to need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..calib.stats import LayerStats, Need
from ..pattern import Pattern, Scope, project
from .grid import Grid


@dataclass(frozen=True)
class LayerResult:
    """A bool mask `[outputs, reduction]` (True = keep) and, when the method changes weights, the new fp32 weight.

    `grid` is what the weight was rounded to, if it was.
    """

    mask: torch.Tensor
    weight: torch.Tensor | None = None
    grid: Grid | None = None


class PruneLayer(Protocol):
    """`weight` is `[outputs, reduction]` in fp32; `mask` is a starting mask for methods that refine one.

    `pattern` is an `NMPattern`, and any `Pattern` where the method declares a scope.
    """

    def __call__(self, weight: torch.Tensor, stats: LayerStats, pattern: Any,
                 mask: torch.Tensor | None = None) -> LayerResult: ...


@dataclass(frozen=True)
class Method:
    """One line of the registry: what it needs, what it does, who published it.

    `scope` says which weights compete for an unstructured mask; None: the method needs groups and finds N:M masks only.
    A method that `quantises` takes a `grid` besides and rounds what it keeps to it.
    """

    prune_layer: PruneLayer
    needs: Need
    updates_weights: bool
    summary: str
    source: str
    scope: Scope | None = None
    quantises: bool = False


def score_method(scores: Callable[[torch.Tensor, LayerStats], torch.Tensor], needs: Need, summary: str,
                 source: str, scope: Scope = "row") -> Method:
    """A method that only ranks weights: the shared projection keeps the highest of every group, or of `scope`."""

    def prune_layer(weight: torch.Tensor, stats: LayerStats, pattern: Pattern,
                    mask: torch.Tensor | None = None) -> LayerResult:
        return LayerResult(project(scores(weight, stats), pattern, scope=scope))

    return Method(prune_layer, needs, False, summary, source, scope)


def relative_error(weight: torch.Tensor, pruned: torch.Tensor, gram: torch.Tensor) -> float:
    """`tr[(W-Ŵ) G (W-Ŵ)ᵀ] / tr[W G Wᵀ]`: the layer's output error on the calibration data, as a share of its output."""
    def energy(m: torch.Tensor) -> float:
        return float(((m @ gram) * m).sum(dtype=torch.float64))

    total = energy(weight)
    return energy(weight - pruned) / total if total > 0 else 0.0
