"""The bench stage on a CPU: time dense and pruned side by side, and predict what a GPU could
win."""

from __future__ import annotations

import time

import torch
from torch import nn

from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.measure.bench import (
    CPU_SENTENCE,
    BenchResult,
    Call,
    interleave,
    ratio,
    summarise,
)
from nmsparse_deploy.models.discovery import discover, trace_inputs
from nmsparse_deploy.models.roofline import count_flops, predict
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.recipe import Bench
from nmsparse_deploy.registry import ENGINES
from nmsparse_deploy.runs.load import load_dense, load_pruned
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.ship.engine import Engine
from nmsparse_deploy.system.environment import environment
from nmsparse_deploy.system.progress import Progress, silent


def bench(run: RunDir, spec: Bench = Bench(), progress: Progress = silent) -> BenchResult:
    """Time dense and pruned side by side on this machine's CPU: PyTorch, and what a runtime can run
    of the run.

    Raises what the runtime says where it was asked for and nothing runs in it.
    """
    start = time.perf_counter()
    pruned, dense = load_pruned(run), load_dense(run)
    inputs = pruned.sample_inputs(spec.batch, spec.length)
    calls: dict[str, Call] = {
        "dense": _forward(dense.module, inputs),
        "pruned": _forward(pruned.module, inputs),
    }
    kernels = {"dense": "PyTorch CPU", "pruned": "PyTorch CPU"}
    engine: type[Engine] = ENGINES.load(spec.engine)
    refusal: NmsparseError = UsageError(
        f"The run '{run.path}' holds nothing that {engine.title} runs.",
        f"nmsparse-deploy {engine.exported_by} {run.path}",
    )
    for precision, artefact in engine.artefacts(run).items():
        name = f"pruned, {engine.label} {precision}"
        try:
            calls[name] = engine.build(artefact).bound(inputs)
        except NmsparseError as error:
            refusal = error
            continue
        kernels[name] = f"{engine.title} CPU"
    if len(calls) == 2 and spec.engine != Bench().engine:
        raise refusal
    progress(f"timing {len(calls)} arms, {spec.rounds} rounds", 0, 0)
    times = interleave(calls, spec.rounds)
    arms = tuple(summarise(name, kernels[name], times[name]) for name in calls)
    # A speed-up is only ever one over a twin that runs on the same kernels.
    ratios = {
        name: ratio(times["dense"], times[name])
        for name in calls
        if name != "dense" and kernels[name] == kernels["dense"]
    }
    masked = MaskSet.load(run / "masks.safetensors").masks
    discovery = discover(dense.module, inputs)
    targets = [
        t
        for t in discovery.targets
        if t.name in masked and masked[t.name].pattern.implies(TWO_FOUR)
    ]
    rows = (
        trace_inputs(dense.module, discovery.blocks, inputs)[targets[0].name].rows if targets else 0
    )
    bounds = predict(targets, rows, count_flops(dense.module, inputs)) if targets else []
    result = BenchResult(
        "cpu",
        {"batch": spec.batch, "length": spec.length},
        arms,
        ratios,
        CPU_SENTENCE,
        tuple(bounds),
        environment(),
    )
    run.write_json("bench.json", result.to_json())
    run.finish("bench", time.perf_counter() - start, spec=spec.model_dump(mode="json"))
    return result


def _forward(module: nn.Module, inputs: dict[str, torch.Tensor]) -> Call:
    def call() -> None:
        with torch.inference_mode():
            module(**inputs)

    return call
