"""ONNX Runtime beside PyTorch on a GPU: CUDA kernels as the dense baseline, TensorRT 10 where it is installed.

Both run the exported graph of the pruned model, with inputs and outputs on the device. The CUDA provider has no sparse
kernels, so its time is that of a dense model. TensorRT builds twice, once with sparse weights allowed: allowed is not
chosen, and what was chosen is what `build` finds out, not this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.measure.bench.arms import Phase
from nmsparse_deploy.ship.engine import Tensor
from nmsparse_deploy.ship.onnx.onnxruntime import OnnxRuntime
from nmsparse_deploy.system.progress import Progress, silent
from nmsparse_deploy.system.timing import interleave, ratio, summarise

PLAIN, ALLOWED = "onnxruntime-tensorrt", "onnxruntime-tensorrt-sparse"
ARMS: dict[str, dict[str, Any]] = {
    "onnxruntime-cuda": {"provider": "cuda"}, PLAIN: {"provider": "tensorrt"},
    ALLOWED: {"provider": "tensorrt", "sparse": True},
}


def onnx_phases(graphs: Sequence[Path], inputs: Mapping[str, Tensor], shape: dict[str, int], rounds: int,
                arms: Mapping[str, Mapping[str, Any]] = ARMS,
                progress: Progress = silent) -> tuple[list[Phase], dict[str, str]]:
    """Time every graph in the arms that run here; returns its phases, and by graph and arm why others do not run."""
    phases, failed = [], {}
    for graph in graphs:
        name, calls = f"ONNX {graph.parent.name}", {}
        for arm, settings in arms.items():
            progress(f"opening {name} with {arm}", 0, 0)
            try:
                calls[arm] = OnnxRuntime.build(graph, settings).bound(inputs)
            except NmsparseError as error:
                failed[f"{name}, {arm}"] = error.message
        if not calls:
            continue
        times = interleave(calls, rounds)
        both = PLAIN in calls and ALLOWED in calls
        phases.append(Phase(name, False, shape, tuple(summarise(arm, "ONNX Runtime", times[arm]) for arm in calls), {},
                            {ALLOWED: ratio(times[PLAIN], times[ALLOWED])} if both else {}))
    return phases, failed
