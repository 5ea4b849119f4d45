"""Prune one block: statistics, perhaps another order of its channels, a mask for every target, then
the refinements."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from nmsparse_deploy.find.calibration.block_walk import BlockWalk
from nmsparse_deploy.find.calibration.layer_stats import LayerStats
from nmsparse_deploy.find.facts import RefinementFacts, RefinementRecord
from nmsparse_deploy.find.learn.losses import divergence
from nmsparse_deploy.find.methods.base import LayerResult, Method, prune_matrices
from nmsparse_deploy.find.methods.grid import Grid
from nmsparse_deploy.find.plan.make_plan import Plan, PlanRow, by_fusion
from nmsparse_deploy.find.refine.base import (
    BlockPair,
    BlockResult,
    PrunedLayer,
    RefineBlock,
    refine_matrices,
)
from nmsparse_deploy.find.refine.permute import Orders, permute
from nmsparse_deploy.models.base import to_rows
from nmsparse_deploy.models.objective import unlabelled
from nmsparse_deploy.recipe import Prune, Step
from nmsparse_deploy.registry import REFINEMENTS
from nmsparse_deploy.system.memory import peak_since_reset_mb, reset_peak

LearnBlock = Callable[[BlockPair, Any, int, str], BlockResult]
"""A block refinement that learns masks; it gets the block's number and path as well."""


@dataclass
class PrunedBlock:
    """The targets of one block by parameter name, other parameters that were changed, and what it
    took."""

    number: int
    layers: dict[str, PrunedLayer]
    others: dict[str, torch.Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    """Largest memory while a layer was pruned, in MB."""
    refinements: list[RefinementRecord] = field(default_factory=list)
    orders: Orders = field(default_factory=dict)
    """Where the entries of the dense weights come from, by parameter and axis, where channels were
    permuted."""

    def report(self, name: str, facts: RefinementFacts, seconds: float) -> None:
        """Put the report of a refinement on record."""
        self.refinements.append(
            RefinementRecord(self.number, name, {**facts.to_json(), "seconds": round(seconds, 3)})
        )


def prune_block(
    module: nn.Module,
    plan: Plan,
    number: int,
    spec: Prune,
    method: Method,
    walk: BlockWalk | None,
    probe: BlockWalk | None = None,
    learn: LearnBlock | None = None,
    given: Mapping[str, LayerResult] | None = None,
) -> PrunedBlock:
    """Prune block `number` of the model `module`, whose weights are still dense there and stay so.

    `walk` is the calibration stream at the block's entrance; None when nothing in the recipe needs
    data. `probe` is a small one in fp32; with it the channels are permuted first, and the dense
    weights in `module` with them. `learn` finds the block's masks in place of the method, `given`
    holds them where they are known already.
    """
    steps = [step for step in spec.refine if REFINEMENTS[step.name].level != "model"]
    leading = (
        []
        if learn
        else list(takewhile(lambda step: REFINEMENTS[step.name].level == "layer", steps))
    )
    rows = plan.pruned(number)
    parts = list(by_fusion(rows).values()) if spec.sequential and walk else [rows]
    pruned = PrunedBlock(number, {})
    if probe is not None:
        _permute(module, plan, pruned, walk, probe)
    for place, part in enumerate(parts):
        stats: dict[str, LayerStats] = {}
        if walk:
            done = {name: layer.stored(torch.float32) for name, layer in pruned.layers.items()}
            stats = walk.statistics(
                number, [row.target for row in part], spec.needs, done, last=place == len(parts) - 1
            )
        for row in part:
            start = time.perf_counter()
            reset_peak()
            layer = _prune_layer(
                module, row, stats.get(row.target.fusion, LayerStats.none()), spec, method, given
            )
            for step in leading:
                layer = replace(
                    layer, result=refine_matrices(REFINEMENTS.load(step.name), layer, step)
                )
            pruned.layers[row.target.name] = layer
            pruned.seconds[row.target.name] = time.perf_counter() - start
            pruned.peaks[row.target.name] = peak_since_reset_mb()
    if learn is not None:
        assert walk is not None
        path = plan.blocks[number]
        _refine_block(
            module,
            plan,
            pruned,
            walk,
            spec.learn,
            lambda block, step: learn(block, step, number, path),
        )
    for step in steps[len(leading) :]:
        refine = REFINEMENTS.load(step.name)
        if REFINEMENTS[step.name].level == "block":
            assert walk is not None
            _refine_block(module, plan, pruned, walk, step, refine)
        else:
            _each_layer(pruned, partial(refine_matrices, refine, step=step))
    if spec.rounds_last:
        _each_layer(pruned, partial(_rounded, spec=spec))
    return pruned


def _each_layer(pruned: PrunedBlock, change: Callable[[PrunedLayer], LayerResult]) -> None:
    """Put what `change` makes of every layer in its place, and count the time."""
    for name, layer in pruned.layers.items():
        start = time.perf_counter()
        pruned.layers[name] = replace(layer, result=change(layer))
        pruned.seconds[name] += time.perf_counter() - start


def _permute(
    module: nn.Module, plan: Plan, pruned: PrunedBlock, walk: BlockWalk | None, probe: BlockWalk
) -> None:
    """Reorder the block's dense weights in place, by the norms of what its layers read."""
    start = time.perf_counter()
    number, rows = pruned.number, plan.pruned(pruned.number)
    stats = (
        walk.statistics(number, [row.target for row in rows], "norms", last=False) if walk else {}
    )
    done = permute(
        module,
        plan.blocks[number],
        rows,
        stats,
        lambda block, x: probe.run(block, number, 0, x),
        probe.example(number),
    )
    pruned.orders = done.orders
    targets = {row.target.name for row in rows}
    pruned.others |= {
        name: module.get_parameter(name).detach().clone()
        for name, _ in done.orders
        if name not in targets
    }
    pruned.report("permute", done.facts, time.perf_counter() - start)


def _prune_layer(
    module: nn.Module,
    row: PlanRow,
    stats: LayerStats,
    spec: Prune,
    method: Method,
    given: Mapping[str, LayerResult] | None,
) -> PrunedLayer:
    assert row.pattern is not None
    parameter = module.get_parameter(row.target.name).detach()
    weight = to_rows(parameter, row.target.axis).float()
    grid = Grid.of(weight, spec.wbits, spec.wgroup) if spec.wbits and not spec.rounds_last else None
    result = (
        given[row.target.name]
        if given
        else prune_matrices(method, weight, stats, row.pattern, grid)
    )
    return PrunedLayer(weight, stats, row.pattern, row.target.axis, parameter.shape, result)


def _rounded(layer: PrunedLayer, spec: Prune) -> LayerResult:
    """Round the survivors to a grid of their own, by a sweep that keeps the mask and lets later
    columns compensate."""
    assert spec.wbits is not None
    weight = layer.weight
    return prune_matrices(
        Method.load("sparsegpt"),
        weight,
        layer.stats,
        layer.pattern,
        Grid.of(weight, spec.wbits, spec.wgroup),
        layer.result.mask,
    )


def _refine_block(
    module: nn.Module,
    plan: Plan,
    pruned: PrunedBlock,
    walk: BlockWalk,
    step: Any,
    refine: RefineBlock,
) -> None:
    """Give the refinement copies of the block, and take over what it returns."""
    start = time.perf_counter()
    path = plan.blocks[pruned.number] + "."
    dense = copy.deepcopy(module.get_submodule(plan.blocks[pruned.number])).float()
    sparse = copy.deepcopy(dense)
    present = pruned.others | {
        name: layer.stored(torch.float32) for name, layer in pruned.layers.items()
    }
    with torch.no_grad():
        for name, value in present.items():
            sparse.get_parameter(name.removeprefix(path)).copy_(value)
    layers = {name.removeprefix(path): layer for name, layer in pruned.layers.items()}
    looks_on = isinstance(step, Step) and step.outlook(len(plan.blocks) - pruned.number)
    done = refine(
        BlockPair(
            sparse,
            dense,
            layers,
            walk.hidden,
            walk.entered,
            lambda block, batch, x: walk.run(block, pruned.number, batch, x),
            _distance(module, pruned.number, walk) if looks_on else None,
        ),
        step,
    )
    for name, result in done.layers.items():
        pruned.layers[path + name] = replace(pruned.layers[path + name], result=result)
    pruned.others |= {path + name: value for name, value in done.others.items()}
    pruned.report(step.name, done.facts, time.perf_counter() - start)


def _distance(module: nn.Module, number: int, walk: BlockWalk) -> Callable[..., torch.Tensor]:
    """Measure how far the model's output moves with this block's; the blocks after this one are
    still dense."""

    def distance(batch: int, x: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            reference = walk.finish(number, batch, dense)
        output = walk.finish(number, batch, x)
        measure = unlabelled(module, output)
        signal = measure.signal(reference)
        if measure.kind == "kl":
            return divergence(measure.signal(output), signal, 1.0)
        return measure.loss(output, {}, signal).mean()

    return distance
