"""Refinements: functions that take a pruned layer, a pruned block or a pruned model, and make it
better.

A layer refinement sees one matrix and the statistics of its inputs. A block refinement sees the
block as a module, the pruned model's stream at its entrance and the dense model's at its exit. Both
may be chained in a recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from nmsparse_deploy.find.calibration.layer_stats import LayerStats
from nmsparse_deploy.find.facts import RefinementFacts
from nmsparse_deploy.find.learn.checkpoint import Checkpoints
from nmsparse_deploy.find.learn.learner import Subject
from nmsparse_deploy.find.learn.loop import Outcome
from nmsparse_deploy.find.methods.base import LayerResult, error_over, stacked
from nmsparse_deploy.masks import normalise_zeros
from nmsparse_deploy.models.base import from_rows
from nmsparse_deploy.pattern import NMPattern, Pattern
from nmsparse_deploy.system.progress import Progress


@dataclass(frozen=True)
class PrunedLayer:
    """One target while its block is pruned: the dense weight as rows `[R, n]` in fp32, and what
    stands for it now."""

    dense: torch.Tensor
    stats: LayerStats
    pattern: Pattern
    axis: int
    shape: torch.Size
    result: LayerResult

    @property
    def groups(self) -> NMPattern:
        """Return the pattern, for refinements that work in groups; a recipe refuses to combine them
        with other patterns."""
        assert isinstance(self.pattern, NMPattern)
        return self.pattern

    @property
    def weight(self) -> torch.Tensor:
        """Return the present weight as rows, zeros off the mask."""
        kept = self.dense if self.result.weight is None else self.result.weight
        return torch.where(self.result.mask, kept, 0.0)

    def matrices(self) -> list[PrunedLayer]:
        """Return the layer itself, or the matrices of a stack of experts, each with its own
        statistics."""
        count = len(self.stats.experts)
        if not count:
            return [self]
        weights = [None] * count if self.result.weight is None else self.result.weight.chunk(count)
        parts = zip(
            self.dense.chunk(count), self.stats.experts, self.result.mask.chunk(count), weights
        )
        return [
            PrunedLayer(dense, stats, self.pattern, 1, dense.shape, LayerResult(mask, weight))
            for dense, stats, mask, weight in parts
        ]

    def error(self, weight: torch.Tensor) -> float | None:
        """Return the relative output error of `weight` (rows) on the calibration data; None without
        a Gram."""
        parts = self.matrices()
        grams = [part.stats.gram for part in parts if part.stats.gram is not None]
        if len(grams) < len(parts):
            return None
        return error_over(zip([part.dense for part in parts], weight.chunk(len(parts)), grams))

    def stored(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the present weight in the shape and dtype of the parameter, every zero of it
        exactly +0.0."""
        return self.baked(dtype)[0]

    def baked(self, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
        """Return the weight as `stored` does, and how many kept values were -0.0."""
        weight = from_rows(self.weight, self.shape, self.axis).to(dtype)
        return weight, normalise_zeros(weight)


@dataclass(frozen=True)
class BlockPair:
    """A pruned block beside its dense twin, with what a refinement of its loss needs. Names are
    those inside the block.

    `module` holds the pruned weights and `dense` the original ones, both fp32 and free to be used
    up. `inputs` are the pruned model's hidden states at the entrance, one tensor per batch;
    `dense_inputs` those of the dense model for the same samples (None unless the step asks for the
    dense stream). `run(module, number, x)` calls a block on batch `number` as the model would, in
    the dtype of the stream. `distance(number, x, dense)`: how far the model's output for that batch
    is from the dense model's when the block puts out `x` instead of `dense`; None unless the step
    wants to know in this block.
    """

    module: nn.Module
    dense: nn.Module
    layers: Mapping[str, PrunedLayer]
    inputs: Sequence[torch.Tensor]
    dense_inputs: Sequence[torch.Tensor] | None
    run: Callable[[nn.Module, int, torch.Tensor], torch.Tensor]
    distance: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None


@dataclass(frozen=True)
class BlockResult:
    """New results by parameter name, facts for the record, and other parameters (norms, biases)
    that changed too."""

    layers: dict[str, LayerResult]
    facts: RefinementFacts
    others: dict[str, torch.Tensor] = field(default_factory=dict)


RefineLayer = Callable[[PrunedLayer, Any], LayerResult]
"""`(layer, step)`: the better mask, weight, or both; `step` holds the settings of the recipe."""


def refine_matrices(refine: RefineLayer, layer: PrunedLayer, step: Any) -> LayerResult:
    """Refine a layer; a stack of experts matrix by matrix."""
    if not layer.stats.experts:
        return refine(layer, step)
    parts = layer.matrices()
    results = [refine(part, step) for part in parts]
    if any(
        result.weight is not None for result in results
    ):  # a refinement may leave some matrices as they were
        results = [
            replace(result, weight=part.dense if result.weight is None else result.weight)
            for part, result in zip(parts, results)
        ]
    return stacked(results)


RefineBlock = Callable[[BlockPair, Any], BlockResult]
"""`(block, step)`: the same for all layers of a block at once."""


@dataclass(frozen=True)
class PrunedModel:
    """A pruned model with what it is trained on.

    `subject.module` holds the pruned weights in fp32; its sites have the masks `masks`, bool rows
    by parameter name. `dense(name)` are the rows of the dense weight.
    """

    subject: Subject
    masks: Mapping[str, torch.Tensor]
    dense: Callable[[str], torch.Tensor]
    seed: int
    checkpoints: Checkpoints | None
    progress: Progress


RefineModel = Callable[[PrunedModel, Any], Outcome]
"""`(pruned, step)`: what every parameter that changed is now, by name, and facts. The module is
left as it was."""
