"""The increase of the loss when a part of the model is pruned: tried out, or predicted from its
curvature.

* `direct`: prune one fusion group, leave everything else dense, and measure the increase of the
  loss on the calibration samples. One pass over the samples a group, started at the group's block.
* `hutchinson`: the mean diagonal of the Hessian, `tr(H) / n`, of every weight, estimated by `zᵀ H
  z` with Rademacher `z` (Hutchinson 1990). MixGPT's sensitivity (Shao et al. 2024,
  arXiv:2310.09499). One `z` covers all weights at once: with `v = H z`, `E[z_i · v_i] = tr(H_ii)`
  for the part `i` of a weight. Needs memory for a double backward pass.

The trial prune of `direct` is a cheap method (Wanda unless told otherwise) on the dense stream,
without what a later weight update or refinement repairs: figures are too high for a better method,
and it is their ranking that counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nmsparse_deploy.find.calibration.layer_stats import LayerStats
from nmsparse_deploy.find.calibration.suffix_replay import SuffixReplay
from nmsparse_deploy.find.methods.base import Method, prune_matrices
from nmsparse_deploy.find.plan.make_plan import PlanRow
from nmsparse_deploy.find.refine.base import PrunedLayer
from nmsparse_deploy.models.base import to_rows
from nmsparse_deploy.models.loaded import Batch, LoadedModel
from nmsparse_deploy.models.objective import Objective
from nmsparse_deploy.system.progress import Progress, silent


@dataclass(frozen=True)
class LossIncrease:
    """The mean increase of the loss over samples, and its standard error (the same samples, dense
    and pruned)."""

    mean: float
    error: float


@dataclass(frozen=True)
class HessianTrace:
    """`tr(H) / n` of one weight, its standard error over probes, and n."""

    mean: float
    error: float
    size: int


def direct(
    loaded: LoadedModel,
    blocks: Sequence[str],
    parts: Sequence[Sequence[PlanRow]],
    batches: Sequence[Batch],
    measure: Objective,
    method: Method,
    progress: Progress = silent,
) -> list[LossIncrease]:
    """Measure the increase of the loss when each of `parts` alone is pruned by `method` to its
    rows' patterns.

    A part is what is pruned together, within one block: a fusion group, or a single target. The
    model is left as it was found.
    """
    increases: dict[int, LossIncrease] = {}
    replay = _replay(loaded, blocks, batches, measure)
    for index, stats in _in_order(replay, parts, method):
        progress("trying fusion groups one by one", len(increases), len(parts))
        with pruned(loaded.module, parts[index], method, stats):
            increases[index] = _increase(replay.dense, replay.run())
    return [increases[index] for index in range(len(parts))]


def from_curvature(
    loaded: LoadedModel,
    blocks: Sequence[str],
    parts: Sequence[Sequence[PlanRow]],
    batches: Sequence[Batch],
    measure: Objective,
    method: Method,
    traces: Mapping[str, HessianTrace],
) -> list[LossIncrease]:
    """Predict the increase of the loss that a curvature alike in all directions would give:
    `Σ ½ tr(H)/n · ‖W - Ŵ‖²` over the part's weights.

    Ranks groups of different sizes; not calibrated in the objective's unit.
    """
    increases: dict[int, LossIncrease] = {}
    for index, stats in _in_order(_replay(loaded, blocks, batches, measure), parts, method):
        damage = {
            row.target.name: _damage(loaded.module, row, method, stats) / 2 for row in parts[index]
        }
        error = math.sqrt(sum((traces[name].error * half) ** 2 for name, half in damage.items()))
        increases[index] = LossIncrease(
            sum(traces[name].mean * half for name, half in damage.items()), error
        )
    return [increases[index] for index in range(len(parts))]


def _damage(
    module: nn.Module, row: PlanRow, method: Method, stats: Mapping[str, LayerStats]
) -> float:
    """Return `‖W - Ŵ‖²`."""
    weight = module.get_parameter(row.target.name).detach()
    return float((weight.double() - trial(module, row, method, stats).double()).square().sum())


def _in_order(
    replay: SuffixReplay, parts: Sequence[Sequence[PlanRow]], method: Method
) -> Iterator[tuple[int, dict[str, LayerStats]]]:
    """Yield the number of every part, block by block, with the statistics of its block and the
    replay starting there."""
    for block in range(1 + max(part[0].target.block for part in parts)):
        here = [index for index, part in enumerate(parts) if part[0].target.block == block]
        stats = (
            _statistics(replay, [row for index in here for row in parts[index]], method)
            if here
            else {}
        )
        for index in here:
            yield index, stats
        replay.advance()


def together(
    loaded: LoadedModel,
    blocks: Sequence[str],
    rows: Sequence[PlanRow],
    batches: Sequence[Batch],
    measure: Objective,
    method: Method,
    progress: Progress = silent,
) -> LossIncrease:
    """Measure the increase of the loss when all `rows` are pruned at once: what the sum of single
    increases stands for."""
    replay = _replay(loaded, blocks, batches, measure)
    dense = {
        row.target.name: loaded.module.get_parameter(row.target.name).detach().clone()
        for row in rows
    }
    changed: dict[str, torch.Tensor] = {}
    progress("trying the plan as a whole", 0, 0)
    for block in range(len(blocks)):
        here = [row for row in rows if row.target.block == block]
        stats = _statistics(replay, here, method) if here else {}
        changed |= {row.target.name: trial(loaded.module, row, method, stats) for row in here}
        replay.advance()
    try:
        _write(loaded.module, changed)
        replay.start_over()
        return _increase(replay.dense, replay.run())
    finally:
        _write(loaded.module, dense)


def _replay(
    loaded: LoadedModel, blocks: Sequence[str], batches: Sequence[Batch], measure: Objective
) -> SuffixReplay:
    references: dict[int, torch.Tensor] = {}

    def see(number: int, output: Any) -> torch.Tensor:
        if measure.kind != "cross-entropy":
            references.setdefault(number, measure.signal(output).detach())
        return measure.loss(output, batches[number], references.get(number)).cpu()

    return SuffixReplay(loaded.module, blocks, batches, see)


def _statistics(
    replay: SuffixReplay, rows: Sequence[PlanRow], method: Method
) -> dict[str, LayerStats]:
    return (
        {}
        if method.facts.needs == "none"
        else replay.statistics([row.target for row in rows], method.facts.needs)
    )


def _increase(dense: Sequence[torch.Tensor], pruned: Sequence[torch.Tensor]) -> LossIncrease:
    difference = torch.cat(list(pruned)).double() - torch.cat(list(dense)).double()
    error = float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return LossIncrease(float(difference.mean()), error)


@contextmanager
def pruned(
    module: nn.Module, rows: Sequence[PlanRow], method: Method, stats: Mapping[str, LayerStats]
) -> Iterator[None]:
    """Prune some targets inside the block; afterwards the model is as it was."""
    dense = {
        row.target.name: module.get_parameter(row.target.name).detach().clone() for row in rows
    }
    try:
        _write(module, {row.target.name: trial(module, row, method, stats) for row in rows})
        yield
    finally:
        _write(module, dense)


def trial(
    module: nn.Module, row: PlanRow, method: Method, stats: Mapping[str, LayerStats]
) -> torch.Tensor:
    """Return the weight of a target as `method` prunes it, in the parameter's shape and dtype."""
    assert row.pattern is not None
    parameter = module.get_parameter(row.target.name).detach()
    weight = to_rows(parameter, row.target.axis).float()
    known = stats.get(row.target.fusion, LayerStats.none())
    result = prune_matrices(method, weight, known, row.pattern)
    return PrunedLayer(weight, known, row.pattern, row.target.axis, parameter.shape, result).stored(
        parameter.dtype
    )


@torch.no_grad()
def _write(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    for name, value in weights.items():
        module.get_parameter(name).copy_(value)


def hutchinson(
    loaded: LoadedModel,
    names: Sequence[str],
    batches: Sequence[Batch],
    measure: Objective,
    *,
    probes: int,
    seed: int,
    progress: Progress = silent,
) -> dict[str, HessianTrace]:
    """Estimate the average trace of the loss Hessian for every named parameter. The same seed gives
    the same figures.

    The attention runs PyTorch's composed kernel, because the fused ones have no second derivative.
    """
    parameters = [loaded.module.get_parameter(name) for name in names]
    wanted = [p.requires_grad for p in loaded.module.parameters()]
    forms_by_probe = []
    loaded.module.eval().requires_grad_(False)
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        generator = torch.Generator().manual_seed(seed)
        for probe in range(probes):
            signs = [_rademacher(p, generator) for p in parameters]
            progress("Hutchinson probes", probe, probes)
            forms_by_probe.append(
                _quadratic_forms(loaded.module, parameters, signs, batches, measure)
            )
    finally:
        for parameter, flag in zip(loaded.module.parameters(), wanted):
            parameter.requires_grad_(flag)
    forms = torch.stack(forms_by_probe) / torch.tensor(
        [float(p.numel()) for p in parameters], dtype=torch.float64
    )
    errors = forms.std(0) / math.sqrt(probes) if probes > 1 else torch.zeros(len(names))
    return {
        name: HessianTrace(float(mean), float(error), parameter.numel())
        for name, parameter, mean, error in zip(names, parameters, forms.mean(0), errors)
    }


def _rademacher(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return (torch.randint(0, 2, like.shape, generator=generator) * 2 - 1).to(
        like.device, like.dtype
    )


def _quadratic_forms(
    module: nn.Module,
    parameters: Sequence[nn.Parameter],
    signs: Sequence[torch.Tensor],
    batches: Sequence[Batch],
    measure: Objective,
) -> torch.Tensor:
    """Return `z_i · (H z)_i` for every parameter, of the mean loss over all samples."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    forms = torch.zeros(len(parameters), dtype=torch.float64)
    samples = 0
    for batch in batches:
        with sdpa_kernel([SDPBackend.MATH]):
            output = module(**batch)
            losses = measure.loss(output, batch, measure.signal(output).detach())
            gradients = torch.autograd.grad(losses.sum(), parameters, create_graph=True)
            along = torch.stack([(g * z).sum() for g, z in zip(gradients, signs)]).sum()
            products = torch.autograd.grad(along, parameters, materialize_grads=True)
        forms += torch.stack(
            [(z.double() * v.double()).sum() for z, v in zip(signs, products)]
        ).cpu()
        samples += len(losses)
    return forms / samples
