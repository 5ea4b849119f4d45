"""The plan stage: load, find the fusion groups, measure what each costs and saves, and decide under the constraint."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nmsparse_deploy import models
from nmsparse_deploy.data.calibration_sample import draw
from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.find.methods.base import Method
from nmsparse_deploy.find.plan.allocation import (
    Allocation,
    FusionGroup,
    PatternChoice,
    candidates,
    choices,
    decisions,
    solve,
    totals,
)
from nmsparse_deploy.find.plan.latency import Latency, LatencySource, source
from nmsparse_deploy.find.plan.make_plan import Plan, PlanRow, by_fusion, make_plan
from nmsparse_deploy.find.plan.mixed_ratios import mixed_ratios
from nmsparse_deploy.find.plan.sensitivity import LossIncrease, direct, from_curvature, hutchinson, together
from nmsparse_deploy.models.discovery import trace_inputs
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.models.objective import Objective, objective
from nmsparse_deploy.models.roofline import count_flops
from nmsparse_deploy.pattern import Pattern, Unstructured, parse_pattern
from nmsparse_deploy.recipe import DEFAULT_MODEL, Allocate
from nmsparse_deploy.system import hardware
from nmsparse_deploy.system.progress import Progress, silent

Batches = list[dict[str, Any]]


def plan(model: str = DEFAULT_MODEL, spec: Allocate = Allocate(budget=1.0), progress: Progress = silent) -> Allocation:  # noqa: B008
    """Decide {dense, pattern} for every fusion group of `model` under the one constraint of `spec`, or the share of
    zeros of every matrix when the pattern is unstructured.

    Raises `NmsparseError` with the best that can be reached when the constraint cannot be met.
    """
    latencies = source(spec.gpu, spec.rows, Path(spec.latency_table) if spec.latency_table else None)
    asked = parse_pattern(spec.pattern)
    mixed = isinstance(asked, Unstructured)
    patterns: list[Pattern] = [asked] if isinstance(asked, Unstructured) else [*candidates(spec)]
    model = str(Path(model).resolve()) if Path(model).exists() else model
    progress(f"loading {model}", 0, 0)
    loaded = models.load(model)
    if spec.max_ppl_increase is not None and loaded.family != "llm":
        raise UsageError("Only language models have a perplexity.", "give --budget or --min-speedup")
    base = make_plan(loaded.discover(), asked, spec.include, spec.exclude)
    parts = [[row] for row in base.pruned()] if mixed else fusion_groups(base)
    times = [[latencies.group([row.target for row in part], pattern) for pattern in patterns] for part in parts]
    share = flop_share(loaded, base, spec.calibration.length)
    device = hardware.device()
    compute = hardware.compute_dtype(spec.compute, device)
    sample = draw(loaded, spec.calibration, progress, compute)
    start = time.perf_counter()
    curved = spec.estimator == "hutchinson"  # second derivatives drown in the rounding of 16 bits
    loaded.module.to(device, torch.float32 if curved else compute)
    trials = _Trials(loaded, base.blocks, _batches(loaded, sample.inputs, spec.calibration.batch),
                     Method.load(spec.method), progress)
    rises = trials.rises(parts, patterns, spec)
    weights = sum(row.target.k * row.target.n for row in base.rows)
    groups, chosen = _choose(asked, parts, patterns, rises, times, spec, share, weights)
    total = totals(groups, chosen, share, weights, loaded.family == "llm" and not mixed)
    total["measured_together"] = trials.together(groups, chosen)
    rules = {row.target.name: row.reason for row in base.rows if row.pattern is None}
    facts = _facts(spec, latencies, trials.measure, sample.to_json())
    return Allocation(model, spec.pattern, decisions(groups, chosen, share, trials.measure.unit,
                                                     asked), rules, total,
                      {**facts, "seconds": round(time.perf_counter() - start, 1)})


def _choose(asked: Pattern, parts: Sequence[Sequence[PlanRow]], patterns: Sequence[Pattern],
            rises: Sequence[Sequence[LossIncrease]], times: Sequence[Sequence[Latency]], spec: Allocate, share: float,
            weights: int) -> tuple[list[FusionGroup], list[PatternChoice]]:
    """The groups with all their choices, and the one that was taken: by the constraint, or by MixGPT's rule."""
    if isinstance(asked, Unstructured):
        own = mixed_ratios([rise.mean for (rise,) in rises], asked.ratio, spec.spread)
        groups = [choices(part, [Unstructured(ratio)], rise, latency, dense=False)
                  for part, ratio, rise, latency in zip(parts, own, rises, times)]
        return groups, [group.choices[0] for group in groups]
    groups = [choices(part, patterns, rise, latency, dense=not spec.vary_keep)
              for part, rise, latency in zip(parts, rises, times)]
    return groups, solve(groups, spec, share, weights)


def fusion_groups(base: Plan) -> list[list[PlanRow]]:
    """The targets that may get the pattern, by fusion group, in the order of the blocks."""
    return list(by_fusion(base.pruned()).values())


def flop_share(loaded: LoadedModel, base: Plan, length: int) -> float:
    """Share of the groups' GEMMs in all FLOPs of one sample of `length` tokens (text only)."""
    inputs = loaded.sample_inputs(1, length)
    reads = trace_inputs(loaded.module, base.blocks, inputs)
    inside = sum(2 * reads[row.target.name].rows * row.target.k * row.target.outputs for row in base.pruned())
    return min(1.0, inside / count_flops(loaded.module, inputs))


class _Trials:
    """What is tried out on one model with one sample."""

    def __init__(self, loaded: LoadedModel, blocks: Sequence[str], batches: Batches, method: Method,
                 progress: Progress) -> None:
        self.loaded = loaded
        self.blocks = blocks
        self.batches = batches
        self.method = method
        self.progress = progress
        with torch.no_grad():
            self.measure: Objective = objective(loaded, loaded.module(**batches[0]))

    def rises(self, parts: Sequence[Sequence[PlanRow]], patterns: Sequence[Pattern],
              spec: Allocate) -> list[list[LossIncrease]]:
        """For every part, its rise under every pattern."""
        given = (self.loaded, self.blocks)
        todo = [[replace(row, pattern=pattern) for row in part] for part in parts for pattern in patterns]
        if spec.estimator == "direct":
            flat = direct(*given, todo, self.batches, self.measure, self.method, self.progress)
        else:
            names = [row.target.name for part in parts for row in part]
            traces = hutchinson(self.loaded, names, self.batches, self.measure, probes=spec.probes,
                                 seed=spec.calibration.seed, progress=self.progress)
            if any(isinstance(pattern, Unstructured) for pattern in patterns):  # MixGPT ranks by curvature alone
                own = [traces[row.target.name] for (row,) in parts]
                return [[LossIncrease(abs(trace.mean), trace.error)] for trace in own]
            flat = from_curvature(*given, todo, self.batches, self.measure, self.method, traces)
        return [flat[at : at + len(patterns)] for at in range(0, len(flat), len(patterns))]

    def together(self, groups: Sequence[FusionGroup], chosen: Sequence[PatternChoice]) -> dict[str, float]:
        rows = [replace(row, pattern=choice.pattern) for group, choice in zip(groups, chosen) if choice.pattern
                for row in group.rows]
        rise = together(self.loaded, self.blocks, rows, self.batches, self.measure, self.method, self.progress)
        return {"loss_rise": rise.mean, "standard_error": rise.error}


def _batches(loaded: LoadedModel, inputs: dict[str, torch.Tensor], size: int) -> Batches:
    """Batches in the model's own dtype: nothing here runs under autocast."""
    dtype = next(loaded.module.parameters()).dtype
    return [{name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
             for name, value in batch.items()} for batch in loaded.batches(inputs, size)]


def _facts(spec: Allocate, latencies: LatencySource, measure: Objective, sample: dict[str, Any]) -> dict[str, Any]:
    asked = {name: getattr(spec, name) for name in ("max_ppl_increase", "min_speedup", "budget")}
    return {"constraint": {name: value for name, value in asked.items() if value is not None},
            "vary_keep": spec.vary_keep,
            "spread": spec.spread if isinstance(parse_pattern(spec.pattern), Unstructured) else None,
            "estimator": spec.estimator, "method": spec.method,
            "objective": measure.kind, "unit": measure.unit, "latency": latencies.to_json(), "calibration": sample}
