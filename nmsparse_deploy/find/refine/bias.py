"""Bias correction: what pruning takes from the mean of a layer's output is given back through its
bias.

    b̂ = b + (W - Ŵ) E[X]

This is the exact minimiser of `E‖W X + b - Ŵ X - b̂‖²` over `b̂` for any `Ŵ`: the mean error
becomes zero, and the error can only fall. `b` is the original bias, so doing it twice changes
nothing; a later change of the weights asks for it again, and a bias that `reconstruct` has trained
is overwritten, so it goes before that. `X` is the pruned stream. Layers without a bias are left
alone: giving them one would add an operation to the model.

Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, 2019, section
4.2 (the same correction, for rounding instead of pruning).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nmsparse_deploy.find.facts import Json
from nmsparse_deploy.find.refine.base import BlockPair, BlockResult, PrunedLayer
from nmsparse_deploy.recipe import Bias


@dataclass(frozen=True)
class BiasFacts:
    """The numbers of corrected biases and of layers without one, and the largest change."""

    corrected: int
    without: int
    largest: float

    def to_json(self) -> Json:
        return {
            "corrected": self.corrected,
            "without a bias": self.without,
            "largest change": self.largest,
        }


def corrected(bias: torch.Tensor, layer: PrunedLayer) -> torch.Tensor:
    """Return the bias `[R]` that makes the mean error of every output zero. Needs `stats.total`."""
    lost = (layer.dense - layer.weight).double()
    return (bias.double() + lost @ layer.stats.mean.double()).float()


def refine(block: BlockPair, step: Bias) -> BlockResult:
    """Correct the bias of every layer that has one."""
    biases = {
        name: value.detach() for name, value in block.dense.named_parameters(remove_duplicate=False)
    }
    others, without, moved = {}, 0, 0.0
    for name, layer in block.layers.items():
        place = f"{name.rpartition('.')[0]}.bias"
        bias = biases.get(place)
        if bias is None:
            without += 1
            continue
        others[place] = corrected(bias, layer)
        moved = max(moved, float((others[place] - bias).abs().max()))
    return BlockResult({}, BiasFacts(len(others), without, moved), others)
