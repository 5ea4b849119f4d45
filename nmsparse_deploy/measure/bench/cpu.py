"""The bench stage on a CPU: time dense and pruned side by side, and predict what a GPU could win."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.measure.bench import CPU_SENTENCE, BenchResult, interleave, ratio, summarise
from nmsparse_deploy.models.discovery import discover, trace_inputs
from nmsparse_deploy.models.roofline import count_flops, predict
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.recipe import Bench
from nmsparse_deploy.runs.load import load_dense, load_pruned
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.ship.onnx.onnxruntime import OnnxRuntime
from nmsparse_deploy.system.environment import environment
from nmsparse_deploy.system.progress import Progress, silent


def bench(run: RunDir, spec: Bench = Bench(), progress: Progress = silent) -> BenchResult:  # noqa: B008
    """Time dense and pruned side by side on this machine's CPU: PyTorch, and ONNX Runtime where exported."""
    start = time.perf_counter()
    pruned, dense = load_pruned(run), load_dense(run)
    inputs = pruned.sample_inputs(spec.batch, spec.length)
    calls = {"dense": _forward(dense.module, inputs), "pruned": _forward(pruned.module, inputs)}
    kernels = {"dense": "PyTorch CPU", "pruned": "PyTorch CPU"}
    for path in run.graphs(whole=True):
        name = f"pruned, ONNX {path.parent.name}"
        try:
            calls[name] = OnnxRuntime.build(path).bound(inputs)
        except NmsparseError:
            continue
        kernels[name] = "ONNX Runtime CPU"
    progress(f"timing {len(calls)} arms, {spec.rounds} rounds", 0, 0)
    times = interleave(calls, spec.rounds)
    arms = tuple(summarise(name, kernels[name], times[name]) for name in calls)
    # A speed-up is only ever one over a twin that runs on the same kernels.
    ratios = {name: ratio(times["dense"], times[name]) for name in calls
              if name != "dense" and kernels[name] == kernels["dense"]}
    masked = MaskSet.load(run / "masks.safetensors").masks
    found = discover(dense.module, inputs)
    targets = [t for t in found.targets if t.name in masked and masked[t.name].pattern.implies(TWO_FOUR)]
    rows = trace_inputs(dense.module, found.blocks, inputs)[targets[0].name].rows if targets else 0
    bounds = predict(targets, rows, count_flops(dense.module, inputs)) if targets else []
    result = BenchResult("cpu", {"batch": spec.batch, "length": spec.length}, arms, ratios, CPU_SENTENCE,
                         tuple(bound.to_json() for bound in bounds), environment())
    run.write_json("bench.json", result.to_json())
    run.finish("bench", time.perf_counter() - start, spec=spec.model_dump(mode="json"))
    return result


def _forward(module: nn.Module, inputs: dict[str, torch.Tensor]) -> Any:
    def call() -> None:
        with torch.inference_mode():
            module(**inputs)

    return call
