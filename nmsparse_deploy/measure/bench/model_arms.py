"""All arms of one model: what to time them on, their decisions, their evidence, and what may be
concluded.

Every workload has an `auto` of its own: a prefill reads thousands of rows, a decoding step as many
as there are sequences, and what is faster for one need not be for the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

from torch import nn

from nmsparse_deploy.errors import NmsparseError, first_line
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.measure.bench.arms import (
    AUTO,
    DENSE,
    PRUNED,
    SPARSE,
    ArmLayer,
    arm_layers,
    bound,
    decode,
    make_arms,
    make_auto,
    prefill,
    time_phase,
)
from nmsparse_deploy.measure.bench.result import GpuBenchResult, Phase
from nmsparse_deploy.models.discovery import trace_inputs
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.models.roofline import count_flops
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.prove import TensorCheck, verify_tensors
from nmsparse_deploy.ship.evidence import NOT_SPARSE, EngineEvidence
from nmsparse_deploy.ship.quantise import BASE, FORMATS, calibrate
from nmsparse_deploy.ship.torch_sparse.kernel_choice import ROUNDS, GemmDecision, decide_all
from nmsparse_deploy.ship.torch_sparse.profile_kernels import LayerGemm, evidence, profile_kernels
from nmsparse_deploy.ship.torch_sparse.semi_structured import DTYPES, KernelSetting, kernels
from nmsparse_deploy.system.gpu_clock import Machine, state, transient
from nmsparse_deploy.system.progress import Progress, silent
from nmsparse_deploy.system.timing import Call

PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True)
class Job:
    """The work that the arms of one model are timed on."""

    batch: int = 1
    length: int = 128
    precision: str = "fp16"
    rounds: int = ROUNDS
    engine: str = "onnxruntime"
    """The runtime that is timed beside PyTorch."""


@dataclass(frozen=True)
class Workload:
    """One call in every arm; `auto` follows `decisions`, which were made at `rows`, by
    parameter."""

    name: str
    modules: Mapping[str, nn.Module]
    calls: Mapping[str, Call]
    decisions: tuple[GemmDecision, ...]
    rows: Mapping[str, int]


def bench_arms(
    dense: LoadedModel, masks: MaskSet, job: Job, machine: Machine, progress: Progress = silent
) -> GpuBenchResult:
    """Time all arms of a dense model and its masks: phases, decisions, memory, evidence and what
    may be concluded.

    The model stays on the machine's device. Raises `NmsparseError` where sparse kernels cannot run
    the precision.
    """
    why = kernels().why_not(job.precision)
    if why is not None:
        raise NmsparseError(f"Sparse kernels cannot run {job.precision} here: {why}.")
    before = machine.environment()
    dense.module.to(machine.device, DTYPES[BASE if job.precision in FORMATS else job.precision])
    inputs: dict[str, Any] = dict(dense.sample_inputs(job.batch, job.length))
    if dense.family == "llm" and "logits_to_keep" in signature(dense.module.forward).parameters:
        inputs["logits_to_keep"] = 1  # a prefill needs the logits of the last token alone
    discovery = dense.discover()
    traced = trace_inputs(dense.module, discovery.blocks, inputs)
    flops = count_flops(dense.module, inputs)
    sparse = {name: mask for name, mask in masks.masks.items() if mask.pattern.implies(TWO_FOUR)}
    places = arm_layers(dense.module, discovery.targets, sparse, job.precision)
    if not places:
        raise NmsparseError(
            "No ordinary layer of this model has a 2:4 mask, so the arms would all be the same."
        )
    rows = {PREFILL: {site.parameter: traced[site.parameter].rows for site in places}}
    if dense.family == "llm":
        rows[DECODE] = {site.parameter: job.batch for site in places}
    decisions = {name: _decided(places, at, job, machine, progress) for name, at in rows.items()}
    wanted = {site.module for site in discovery.targets if site.name in rows[PREFILL]}
    # What the layers read on the very inputs that are timed: accuracy is not judged here.
    ranges = (
        calibrate(
            dense.module,
            [target for target in discovery.targets if target.module in wanted],
            [inputs],
        )
        if job.precision in FORMATS
        else {}
    )
    arms = make_arms(
        dense.module,
        places,
        {name: mask.unpack() for name, mask in sparse.items()},
        job.precision,
        ranges,
        _settings(decisions),
    )
    works = [_workload(name, arms, places, decisions[name], rows[name], inputs) for name in rows]
    phases, failed = _phases(
        works, {"batch": job.batch, "length": job.length}, machine, job.rounds, progress
    )
    checks = _checks(arms[PRUNED], places, sparse)
    seen = {
        work.name: {
            arm: _evidence(arm, work, places, job.precision, checks) for arm in (SPARSE, AUTO)
        }
        for work in works
    }
    gemm_flops = sum(2 * rows[PREFILL][site.parameter] * site.k * site.n for site in places)
    transients = {
        work.name: {arm: transient(call, machine) for arm, call in work.calls.items()}
        for work in works
    }
    return GpuBenchResult(
        "dry run" if machine.dry else "measured",
        job.precision,
        job.batch,
        job.length,
        len(places),
        _weights(arms, places),
        transients,
        flops,
        gemm_flops / flops if flops else None,
        {work.name: bound(work.decisions, work.rows, _median(phases, work.name)) for work in works},
        {work.name: work.decisions for work in works},
        tuple(phases),
        failed,
        seen,
        verdict(phases, seen, machine.dry),
        before,
        state(),
    )


def _decided(
    places: Sequence[ArmLayer],
    rows: Mapping[str, int],
    job: Job,
    machine: Machine,
    progress: Progress,
) -> tuple[GemmDecision, ...]:
    """Time every shape at the rows that this workload gives it."""
    decisions: list[GemmDecision] = []
    for count in sorted(set(rows.values())):
        shapes: dict[tuple[int, int, bool], list[str]] = {}
        for site in places:
            if site.why_not is None and rows[site.parameter] == count:
                shapes.setdefault((site.k, site.n, site.biased), []).append(site.parameter)
        decisions += decide_all(
            shapes, job.precision, [count], machine, max(5, job.rounds), progress
        )
    return tuple(decisions)


def _settings(
    decisions: Mapping[str, Sequence[GemmDecision]],
) -> dict[str, dict[int, KernelSetting]]:
    settings: dict[str, dict[int, KernelSetting]] = {}
    for made in decisions.values():
        for decision in made:
            for name in decision.weights:
                settings.setdefault(name, {}).update(decision.settings)
    return settings


def _workload(
    name: str,
    arms: Mapping[str, nn.Module],
    places: Sequence[ArmLayer],
    decisions: tuple[GemmDecision, ...],
    rows: Mapping[str, int],
    inputs: Mapping[str, Any],
) -> Workload:
    modules = {**arms, AUTO: make_auto(arms, places, decisions)}
    calls = prefill(modules, inputs) if name == PREFILL else decode(modules, inputs["input_ids"])
    return Workload(name, modules, calls, decisions, rows)


def _phases(
    works: Sequence[Workload],
    shape: dict[str, int],
    machine: Machine,
    rounds: int,
    progress: Progress,
) -> tuple[list[Phase], dict[str, str]]:
    """Time every workload, enqueued plainly and then replayed; what cannot be recorded as a graph
    says why."""
    phases, failed = [], {}
    for replayed in (False, True) if machine.graph is not None else (False,):
        for work in works:
            how = f"{work.name}, {'CUDA graph' if replayed else 'plain'}"
            progress(f"timing {how}", 0, 0)
            try:
                phases.append(time_phase(work.name, work.calls, shape, machine, rounds, replayed))
            except RuntimeError as error:
                failed[how] = first_line(error)
    if not phases:
        raise NmsparseError(
            f"No arm could be timed: {next(iter(failed.values()), 'there was nothing to run')}."
        )
    return phases, failed


def _checks(
    module: nn.Module, places: Sequence[ArmLayer], masked: Mapping[str, Any]
) -> dict[str, TensorCheck]:
    """Check the pattern of what the pruned arms hold."""
    held = {}
    for site in places:
        layer: Any = module.get_submodule(site.layer)
        held[site.parameter] = layer.weight if site.axis else layer.weight.t().contiguous()
    masks = MaskSet({site.parameter: masked[site.parameter] for site in places})
    return {check.tensor: check for check in verify_tensors(held, masks, PRUNED).checks}


def _evidence(
    arm: str,
    work: Workload,
    places: Sequence[ArmLayer],
    precision: str,
    checks: Mapping[str, TensorCheck],
) -> EngineEvidence:
    decided = {name: decision for decision in work.decisions for name in decision.weights}
    kept_dense = {
        name: decision.why
        for name, decision in decided.items()
        if arm == AUTO and decision.keep == "dense"
    }
    layers, every = profile_kernels(
        work.calls[arm], work.modules[arm], [site.layer for site in places]
    )
    gemms = [
        LayerGemm(
            site.parameter, site.layer, site.k, site.n, site.why_not, kept_dense.get(site.parameter)
        )
        for site in places
    ]
    rows = {site.layer: work.rows[site.parameter] for site in places}
    return evidence(f"{work.name}, {arm}", "torch", gemms, precision, rows, checks, layers, every)


def _weights(arms: Mapping[str, nn.Module], places: Sequence[ArmLayer]) -> dict[str, int]:
    """Return bytes of the weights in which the arms differ."""
    sizes: dict[str, int] = {}
    for arm, module in arms.items():
        layers: list[Any] = [module.get_submodule(site.layer) for site in places]
        sizes[arm] = sum(layer.weight_bytes for layer in layers)
    return sizes


def _median(phases: Sequence[Phase], name: str) -> float:
    """Return the dense arm's median, replayed where it was; 0 where it was not timed."""
    medians = [
        arm.median_ms
        for phase in phases
        if phase.name == name
        for arm in phase.arms
        if arm.name == DENSE
    ]
    return medians[-1] if medians else 0.0


def verdict(
    phases: Sequence[Phase], seen: Mapping[str, Mapping[str, EngineEvidence]], dry: bool
) -> str:
    """Return what was won, in one sentence a workload, never without what was seen running."""
    parts = []
    for phase in phases:
        for arm in (SPARSE, AUTO):
            won, pruned = phase.over_dense[arm], phase.over_pruned[arm]
            label = "" if seen[phase.name][arm].sparse_seen else f", {NOT_SPARSE}"
            parts.append(
                f"{phase.name} ({phase.how}), {arm}: {won.speedup:.2f}x over dense ({won.low:.2f} to "
                f"{won.high:.2f}), {pruned.speedup:.2f}x over the same weights on dense kernels{label}"
            )
    sentence = (
        "; ".join(parts)
        + "."
        + "".join(f" {name}: {both[SPARSE].verdict}" for name, both in seen.items())
    )
    return f"DRY RUN, nothing was measured on a GPU. {sentence}" if dry else sentence
