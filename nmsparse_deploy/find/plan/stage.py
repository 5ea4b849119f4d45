"""The plan stage: load, find the fusion groups, measure what each costs and saves, and decide under
the constraint."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from nmsparse_deploy import models
from nmsparse_deploy.data.calibration_sample import draw, sample_hash
from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.find.methods.base import Method
from nmsparse_deploy.find.plan.allocation import (
    Allocation,
    FusionGroup,
    PatternChoice,
    PlanFacts,
    candidates,
    choices,
    decisions,
    solve,
    totals,
)
from nmsparse_deploy.find.plan.latency import Latency, source
from nmsparse_deploy.find.plan.make_plan import Plan, PlanRow, by_fusion, make_plan
from nmsparse_deploy.find.plan.mixed_ratios import mixed_ratios
from nmsparse_deploy.find.plan.sensitivity import (
    LossIncrease,
    direct,
    from_curvature,
    hutchinson,
    together,
)
from nmsparse_deploy.models.discovery import trace_inputs
from nmsparse_deploy.models.loaded import Batch, LoadedModel
from nmsparse_deploy.models.objective import Objective, objective
from nmsparse_deploy.models.roofline import count_flops
from nmsparse_deploy.pattern import Pattern, Unstructured, parse_pattern
from nmsparse_deploy.recipe import DEFAULT_MODEL, Allocate
from nmsparse_deploy.runs.inputs import read_inputs
from nmsparse_deploy.system import hardware
from nmsparse_deploy.system.progress import Progress, silent


def plan(
    model: str = DEFAULT_MODEL, spec: Allocate = Allocate(budget=1.0), progress: Progress = silent
) -> Allocation:
    """Decide {dense, pattern} for every fusion group of `model` under the one constraint of `spec`,
    or the share of zeros of every matrix when the pattern is unstructured.

    Raises `NmsparseError` with the best that can be reached when the constraint cannot be met.
    """
    latencies = source(
        spec.gpu, spec.rows, Path(spec.latency_table) if spec.latency_table else None
    )
    asked = parse_pattern(spec.pattern)
    mixed = isinstance(asked, Unstructured)
    patterns: list[Pattern] = [asked] if isinstance(asked, Unstructured) else [*candidates(spec)]
    model = models.absolute(model)
    progress(f"loading {model}", 0, 0)
    loaded = models.load(model)
    inputs = read_inputs(models.files(loaded.source), spec.calibration.data, progress=progress)
    if spec.max_ppl_increase is not None and loaded.family != "llm":
        raise UsageError(
            "Only language models have a perplexity.", "give --budget or --min-speedup"
        )
    base = make_plan(loaded.discover(), asked, spec.include, spec.exclude)
    parts = [[row] for row in base.pruned()] if mixed else fusion_groups(base)
    times = [
        [latencies.group([row.target for row in part], pattern) for pattern in patterns]
        for part in parts
    ]
    share = flop_share(loaded, base, spec.calibration.length)
    device = hardware.device()
    compute = hardware.compute_dtype(spec.compute, device)
    sample = draw(loaded, spec.calibration, progress, compute)
    start = time.perf_counter()
    curved = spec.estimator == "hutchinson"  # second derivatives drown in the rounding of 16 bits
    loaded.module.to(device, torch.float32 if curved else compute)
    trials = _Trials(
        loaded,
        base.blocks,
        _batches(loaded, sample.inputs, spec.calibration.batch),
        Method.load(spec.method),
        progress,
    )
    increases = trials.increases(parts, patterns, spec)
    weights = sum(row.target.k * row.target.n for row in base.rows)
    groups, chosen = _choose(asked, parts, patterns, increases, times, spec, share, weights)
    total = totals(
        groups,
        chosen,
        share,
        weights,
        loaded.family == "llm" and not mixed,
        trials.together(groups, chosen),
    )
    rules = {row.target.name: row.reason for row in base.rows if row.pattern is None}
    constraint = {
        name: getattr(spec, name) for name in ("max_ppl_increase", "min_speedup", "budget")
    }
    facts = PlanFacts(
        {name: value for name, value in constraint.items() if value is not None},
        spec.vary_keep,
        spec.spread if mixed else None,
        spec.estimator,
        spec.method,
        trials.measure.kind,
        trials.measure.unit,
        latencies,
        sample.to_json(),
        inputs.model_copy(update={"sample": sample_hash(sample)}).to_json(),
        round(time.perf_counter() - start, 1),
    )
    return Allocation(
        model,
        spec.pattern,
        decisions(groups, chosen, share, trials.measure.unit, asked),
        rules,
        total,
        facts,
    )


def _choose(
    asked: Pattern,
    parts: Sequence[Sequence[PlanRow]],
    patterns: Sequence[Pattern],
    increases: Sequence[Sequence[LossIncrease]],
    times: Sequence[Sequence[Latency]],
    spec: Allocate,
    share: float,
    weights: int,
) -> tuple[list[FusionGroup], list[PatternChoice]]:
    """Return the groups with all their choices, and the one that was taken: by the constraint, or
    by MixGPT's rule."""
    if isinstance(asked, Unstructured):
        own = mixed_ratios([increase.mean for (increase,) in increases], asked.ratio, spec.spread)
        groups = [
            choices(part, [Unstructured(ratio)], increase, latency, dense=False)
            for part, ratio, increase, latency in zip(parts, own, increases, times)
        ]
        return groups, [group.choices[0] for group in groups]
    groups = [
        choices(part, patterns, increase, latency, dense=not spec.vary_keep)
        for part, increase, latency in zip(parts, increases, times)
    ]
    return groups, solve(groups, spec, share, weights)


def fusion_groups(base: Plan) -> list[list[PlanRow]]:
    """Return the targets that may get the pattern, by fusion group, in the order of the blocks."""
    return list(by_fusion(base.pruned()).values())


def flop_share(loaded: LoadedModel, base: Plan, length: int) -> float:
    """Return the share of the groups' GEMMs in all FLOPs of one sample of `length` tokens (text
    only)."""
    inputs = loaded.trial_inputs(1, length)
    reads = trace_inputs(loaded.module, base.blocks, inputs)
    inside = sum(
        2 * reads[row.target.name].rows * row.target.k * row.target.outputs for row in base.pruned()
    )
    return min(1.0, inside / count_flops(loaded.module, inputs))


class _Trials:
    """Trials on one model with one sample."""

    def __init__(
        self,
        loaded: LoadedModel,
        blocks: Sequence[str],
        batches: list[Batch],
        method: Method,
        progress: Progress,
    ) -> None:
        self.loaded = loaded
        self.blocks = blocks
        self.batches = batches
        self.method = method
        self.progress = progress
        with torch.no_grad():
            self.measure: Objective = objective(loaded, loaded.module(**batches[0]))

    def increases(
        self, parts: Sequence[Sequence[PlanRow]], patterns: Sequence[Pattern], spec: Allocate
    ) -> list[list[LossIncrease]]:
        """Return, for every part, the increase of the loss under every pattern."""
        given = (self.loaded, self.blocks)
        todo = [
            [replace(row, pattern=pattern) for row in part]
            for part in parts
            for pattern in patterns
        ]
        if spec.estimator == "direct":
            flat = direct(*given, todo, self.batches, self.measure, self.method, self.progress)
        else:
            names = [row.target.name for part in parts for row in part]
            traces = hutchinson(
                self.loaded,
                names,
                self.batches,
                self.measure,
                probes=spec.probes,
                seed=spec.calibration.seed,
                progress=self.progress,
            )
            if any(
                isinstance(pattern, Unstructured) for pattern in patterns
            ):  # MixGPT ranks by curvature alone
                own = [traces[row.target.name] for (row,) in parts]
                return [[LossIncrease(abs(trace.mean), trace.error)] for trace in own]
            flat = from_curvature(*given, todo, self.batches, self.measure, self.method, traces)
        return [flat[at : at + len(patterns)] for at in range(0, len(flat), len(patterns))]

    def together(
        self, groups: Sequence[FusionGroup], chosen: Sequence[PatternChoice]
    ) -> LossIncrease:
        """Measure the increase of the loss under the plan as a whole."""
        rows = [
            replace(row, pattern=choice.pattern)
            for group, choice in zip(groups, chosen)
            if choice.pattern
            for row in group.rows
        ]
        return together(
            self.loaded, self.blocks, rows, self.batches, self.measure, self.method, self.progress
        )


def _batches(loaded: LoadedModel, inputs: dict[str, torch.Tensor], size: int) -> list[Batch]:
    """Make batches in the model's own dtype: nothing here runs under autocast."""
    dtype = next(loaded.module.parameters()).dtype
    return [
        {
            name: value.to(dtype)
            if isinstance(value, torch.Tensor) and value.is_floating_point()
            else value
            for name, value in batch.items()
        }
        for batch in loaded.batches(inputs, size)
    ]
