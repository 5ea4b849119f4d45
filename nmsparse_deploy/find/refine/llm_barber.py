"""LLM-Barber: rebuild a mask by swapping kept and pruned weights that a block's loss prices the
other way round.

First the attention half, then, after the rebuilt attention, the MLP half. With `x` what the pruned
model feeds a half, `f_d` and `f_s` the half with its dense and with its present weights, and one
gradient per calibration sample:

    L = MSE(f_d(x), f_s(x)),    g = ∂L/∂W_d at the dense weights,    S = |W_d| · sqrt(mean over samples of g²)

In every group the best swap gains `max S of the pruned - min S of the kept`. Of a row's `K` groups
with a positive gain the `⌊τK⌋` with the largest swap that one pair. So every group keeps its count
and the summed score never falls; the rule with one threshold per row, which this replaces, breaks
the pattern where scores are equal. Weights that stay keep the values they have; what grows back is
dense. The residual is the same in `f_d` and `f_s` and drops out of the loss.

Su et al., LLM-Barber: Block-Aware Rebuilder for Sparsity Mask in One-Shot for Large Language
Models, 2024.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from nmsparse_deploy.find.calibration.layer_stats import as_rows
from nmsparse_deploy.find.methods.base import LayerResult
from nmsparse_deploy.find.refine.base import BlockPair, BlockResult, PrunedLayer
from nmsparse_deploy.find.refine.units import Unit, UnitFacts, units
from nmsparse_deploy.models.capture import capture
from nmsparse_deploy.pattern import NMPattern, Pattern
from nmsparse_deploy.recipe import LlmBarber

Call = tuple[nn.Module, torch.Tensor, torch.Tensor]
"""One call of a layer: the layer, its input, and the gradient of the loss at its output."""


@dataclass(frozen=True)
class RebuiltUnit:
    """The mean loss of a sample before a unit's masks were rebuilt, and how many pairs of weights
    were swapped."""

    before: float
    swaps: int


def refine(block: BlockPair, step: LlmBarber) -> BlockResult:
    """Rebuild the masks of the block's halves one after the other; see the module's docstring."""
    for parameter in (*block.module.parameters(), *block.dense.parameters()):
        parameter.requires_grad_(False)
    layers = dict(block.layers)
    facts = []
    for unit in units(block, "half"):
        squares, loss = squared_gradients(block, unit)
        for name, square in squares.items():
            scores = layers[name].dense.abs() * square.sqrt()
            layers[name] = _swapped(
                layers[name],
                rebuild(scores, layers[name].result.mask, layers[name].pattern, step.share),
            )
            block.module.get_parameter(name).copy_(layers[name].stored(torch.float32))
        for name in unit.parameters:  # the next half is compared after this one as it is now
            block.dense.get_parameter(name).copy_(block.module.get_parameter(name))
        facts.append(
            RebuiltUnit(
                loss,
                sum(
                    int((layers[name].result.mask & ~block.layers[name].result.mask).sum())
                    for name in squares
                ),
            )
        )
    return BlockResult(
        {name: layer.result for name, layer in layers.items()}, UnitFacts(tuple(facts))
    )


def rebuild(
    scores: torch.Tensor, mask: torch.Tensor, pattern: Pattern, share: float
) -> torch.Tensor:
    """Swap one pair in the `share` of a row's improvable groups that gain most; `scores` and `mask`
    are `[R, n]`.

    Without groups the pairs are those of the paper: the k-th best pruned weight of a row with its
    k-th worst kept one.
    """
    if not isinstance(pattern, NMPattern):
        return _rebuild_rows(scores, mask, share)
    prices, kept = (rows.unflatten(1, (-1, pattern.group)) for rows in (scores, mask))
    grown = prices.masked_fill(kept, -torch.inf).max(-1, keepdim=True)
    dropped = prices.masked_fill(~kept, torch.inf).min(-1, keepdim=True)
    gain = (grown.values - dropped.values).squeeze(-1)
    allowed = (share * (gain > 0).sum(1, keepdim=True).double()).floor()
    rank = gain.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    swap = (rank < allowed).unsqueeze(-1)
    return kept.scatter(-1, dropped.indices, ~swap).scatter(-1, grown.indices, swap).flatten(1)


def _rebuild_rows(scores: torch.Tensor, mask: torch.Tensor, share: float) -> torch.Tensor:
    grown = scores.masked_fill(mask, -torch.inf).sort(dim=1, descending=True, stable=True)
    dropped = scores.masked_fill(~mask, torch.inf).sort(dim=1, stable=True)
    allowed = (share * (grown.values > dropped.values).sum(1, keepdim=True).double()).floor()
    swap = torch.arange(scores.shape[1], device=scores.device) < allowed
    out = torch.zeros_like(mask).scatter(1, dropped.indices, swap)
    return (mask & ~out) | torch.zeros_like(mask).scatter(1, grown.indices, swap)


def _swapped(layer: PrunedLayer, mask: torch.Tensor) -> PrunedLayer:
    before = layer.result
    weight = None if before.weight is None else torch.where(before.mask, before.weight, layer.dense)
    return replace(layer, result=LayerResult(mask, weight))


def squared_gradients(block: BlockPair, unit: Unit) -> tuple[dict[str, torch.Tensor], float]:
    """Return `mean over samples of g²` for the unit's targets, as rows `[R, n]`, and the mean loss
    of a sample.

    A layer that sees no batch axis (an expert with its share of the tokens) counts a calibration
    batch as one sample.
    """
    squares = {
        name: torch.zeros_like(layer.dense)
        for name, layer in block.layers.items()
        if name in unit.parameters
    }
    samples = dict.fromkeys(squares, 0)
    calls: dict[str, list[Call]] = {}
    losses: list[float] = []

    def record(name: str, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        layer = block.dense.get_submodule(name.rpartition(".")[0])
        return _record(layer, args[0], output, calls.setdefault(name, []))

    with capture(
        block.dense, outputs={name.rpartition(".")[0]: partial(record, name) for name in squares}
    ):
        for number, x in enumerate(block.inputs if squares else ()):
            calls.clear()
            losses += _loss(block, unit, number, x.float())
            for name, batch_calls in calls.items():
                for gradient in _per_sample(batch_calls, len(x)):
                    squares[name].addcmul_(gradient, gradient)
                    samples[name] += 1
    return {name: square / max(samples[name], 1) for name, square in squares.items()}, sum(
        losses
    ) / max(len(losses), 1)


def _record(
    layer: nn.Module, x: torch.Tensor, output: torch.Tensor, calls: list[Call]
) -> torch.Tensor:
    """Report the gradient of the backward pass here; it starts at the unit's first targets and goes
    no further."""
    if not output.requires_grad:
        output = (
            output.requires_grad_().clone()
        )  # a leaf could not be changed in place by what follows
    output.register_hook(lambda gradient: calls.append((layer, x.detach(), gradient)))
    return output


def _loss(block: BlockPair, unit: Unit, number: int, x: torch.Tensor) -> list[float]:
    """Return the losses of one batch's samples, after a backward pass through their sum."""
    with torch.no_grad():
        target = unit.forward(block.module, number, x).float()
    with torch.enable_grad():
        losses = (unit.forward(block.dense, number, x).float() - target).square().flatten(1).mean(1)
        losses.sum().backward()
    return losses.tolist()


def _per_sample(calls: list[Call], batch: int) -> Iterator[torch.Tensor]:
    """Yield `∂L/∂W` of every sample, `[R, n]`: the sum over its tokens of (gradient at the output)
    x (input)."""
    parts = batch if all(x.ndim > 2 and len(x) == batch for _, x, _ in calls) else 1
    split = [(layer, x.chunk(parts), gradient.chunk(parts)) for layer, x, gradient in calls]
    for part in range(parts):
        yield sum(
            (
                _columns(layer, gradients[part]) @ as_rows(layer, xs[part])
                for layer, xs, gradients in split
            ),
            torch.zeros(()),
        )


def _columns(layer: nn.Module, gradient: torch.Tensor) -> torch.Tensor:
    """Return the gradient at a layer's output as `[R, tokens]`."""
    channels = gradient.movedim(1, -1) if isinstance(layer, (nn.Conv1d, nn.Conv2d)) else gradient
    return channels.float().flatten(0, -2).T
