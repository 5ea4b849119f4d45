"""Bias correction: what pruning takes from the mean of a layer's output is given back through its bias.

    b̂ = b + (W - Ŵ) E[X]

This is the exact minimiser of `E‖W X + b - Ŵ X - b̂‖²` over `b̂` for any `Ŵ`: the mean error becomes zero, and the error
can only fall. `b` is the original bias, so doing it twice changes nothing; a later change of the weights asks for it
again, and a bias that `reconstruct` has trained is overwritten, so it goes before that. `X` is the pruned stream.
Layers without a bias are left alone: giving them one would add an operation to the model.

Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, 2019, section 4.2 (the same
correction, for rounding instead of pruning).
"""

from __future__ import annotations

import torch

from nmsparse_deploy.find.refine.base import Block, BlockResult, Layer
from nmsparse_deploy.recipe import Bias


def corrected(bias: torch.Tensor, layer: Layer) -> torch.Tensor:
    """The bias `[R]` that makes the mean error of every output zero. Needs `stats.total`."""
    lost = (layer.dense - layer.weight).double()
    return (bias.double() + lost @ layer.stats.mean.double()).float()


def refine(block: Block, step: Bias) -> BlockResult:
    biases = {name: value.detach() for name, value in block.dense.named_parameters(remove_duplicate=False)}
    others, without, moved = {}, 0, 0.0
    for name, layer in block.layers.items():
        place = f"{name.rpartition('.')[0]}.bias"
        bias = biases.get(place)
        if bias is None:
            without += 1
            continue
        others[place] = corrected(bias, layer)
        moved = max(moved, float((others[place] - bias).abs().max()))
    return BlockResult({}, others, {"corrected": len(others), "without a bias": without, "largest change": moved})
