"""Reconstruct: train what survives in one block so that the pruned stream comes out as the dense
stream does.

The input is what the *pruned* model feeds the block, the target what the *dense* model has at its
exit, residual included, so a block also repairs what those before it have shifted. Surviving
weights, norms and biases move; the mask is applied to every gradient and the zeros stay. In halves,
first what runs before the norm between attention and MLP is trained on the hidden states there,
then the rest on the block's output. The error of a token is relative to the size of its target,
which is how the next norm will see it. The last blocks (`through`) may be trained on what the model
makes of their output instead: the Kullback-Leibler divergence from the dense model's predictions. A
held-out share of the batches decides which epoch is kept; when none is better than the start, the
start is.

Guo et al., EBFT, 2024, arXiv:2402.12419 (a block at a time); Zimmer et al., 2025, arXiv:2510.14444
(units of any size).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nmsparse_deploy.find.learn.losses import relative_error
from nmsparse_deploy.find.methods.base import LayerResult
from nmsparse_deploy.find.refine.base import BlockPair, BlockResult
from nmsparse_deploy.find.refine.units import Unit, UnitFacts, units
from nmsparse_deploy.models.base import from_rows, to_rows
from nmsparse_deploy.recipe import Reconstruct


@dataclass(frozen=True)
class TrainedUnit:
    """The held-out loss before and after training a unit, and how many steps there were."""

    before: float
    after: float
    steps: int


def refine(block: BlockPair, step: Reconstruct) -> BlockResult:
    """Train the block's units one after the other; see the module's docstring."""
    assert block.dense_inputs is not None
    held_out = min(len(block.inputs) - 1, round(step.holdout * len(block.inputs)))
    facts = []
    for unit in units(block, step.unit):
        with torch.no_grad():
            targets = [unit.forward(block.dense, i, x) for i, x in enumerate(block.dense_inputs)]
        facts.append(_train(block, unit, targets, held_out, step))
    trained = dict(block.module.named_parameters())
    layers = {
        name: LayerResult(layer.result.mask, to_rows(trained[name].detach(), layer.axis))
        for name, layer in block.layers.items()
    }
    others = {
        name: value.detach()
        for name, value in trained.items()
        if name not in layers and not torch.equal(value, block.dense.get_parameter(name))
    }
    return BlockResult(layers, UnitFacts(tuple(facts)), others)


def _train(
    block: BlockPair, unit: Unit, targets: Sequence[torch.Tensor], held_out: int, step: Reconstruct
) -> TrainedUnit:
    """Train a unit by Adam with a cosine; leave the best weights in the module."""
    trained = {name: block.module.get_parameter(name) for name in unit.parameters}
    masks = {
        name: from_rows(layer.result.mask, layer.shape, layer.axis)
        for name, layer in block.layers.items()
        if name in trained
    }
    for parameter in block.module.parameters():
        parameter.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    count = len(targets) - held_out
    evaluated = range(count, len(targets)) if held_out else range(count)
    optimiser = torch.optim.Adam(trained.values(), lr=step.rate, betas=(0.9, 0.95))
    order = torch.Generator().manual_seed(0)
    start = best = _loss(block, unit, targets, evaluated)
    kept = {name: value.detach().clone() for name, value in trained.items()}
    total = step.epochs * count
    for epoch in range(step.epochs):
        for place, number in enumerate(torch.randperm(count, generator=order).tolist()):
            optimiser.param_groups[0]["lr"] = step.rate * _schedule((epoch * count + place) / total)
            loss = _error(block, unit, number, targets[number])
            loss.backward(inputs=list(trained.values()))
            for name, mask in masks.items():
                trained[name].grad.mul_(mask)  # type: ignore[union-attr]
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        reached = _loss(block, unit, targets, evaluated)
        if reached < best:
            best, kept = reached, {name: value.detach().clone() for name, value in trained.items()}
    with torch.no_grad():
        for name, value in kept.items():
            trained[name].copy_(value)
            trained[name].requires_grad_(False)
    return TrainedUnit(start, best, total)


def _schedule(share: float, warm: float = 0.05) -> float:
    return min(1.0, share / warm + warm) * (1 + math.cos(math.pi * share)) / 2


@torch.no_grad()
def _loss(
    block: BlockPair, unit: Unit, targets: Sequence[torch.Tensor], numbers: Sequence[int]
) -> float:
    losses = [float(_error(block, unit, number, targets[number])) for number in numbers]
    return sum(losses) / len(losses)


def _error(block: BlockPair, unit: Unit, number: int, target: torch.Tensor) -> torch.Tensor:
    """Return the error of the unit's output, or of the model's where the unit ends the block and
    the block may look so far."""
    output = unit.forward(block.module, number, block.inputs[number])
    if block.distance is None or not unit.leaves:
        return relative_error(output, target)
    return block.distance(number, output, target)
