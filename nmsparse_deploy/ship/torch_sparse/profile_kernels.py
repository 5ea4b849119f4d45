"""Which kernels a PyTorch model ran, layer by layer, and what that proves.

One pass is profiled with a named range around every layer that was put in place. The profiler ties
a kernel to the operation that launched it, so a kernel below a layer's range is that layer's.
Inside a CUDA graph there are no ranges; there only the names of the kernels are counted, for the
whole pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.prove import TensorCheck
from nmsparse_deploy.ship.evidence import EngineEvidence, LayerEvidence, Level, Reason
from nmsparse_deploy.ship.tensorrt.log import is_sparse_kernel
from nmsparse_deploy.system.sparse_cores import shape_verdict

RANGE = "nmsparse gemm "
KernelCounts = Mapping[str, int]
"""How often each kernel ran, by its name."""


@dataclass(frozen=True)
class LayerGemm:
    """A multiplication as it is known before it runs."""

    parameter: str
    layer: str
    k: int
    n: int
    why_not: str | None = None
    """Why sparse kernels cannot run it at all."""
    kept_dense: str | None = None
    """Why the dense kernel was chosen; None where the sparse one was."""


def profile_kernels(
    call: Callable[[], Any], module: nn.Module, paths: Iterable[str]
) -> tuple[dict[str, KernelCounts], KernelCounts]:
    """Run `call` once to warm up and once profiled; returns the kernels of every layer, and all
    kernels."""
    call()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with _named(module, paths), torch.profiler.profile(activities=activities) as recorded:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    events = list(recorded.events() or ())
    return by_layer(events), all_kernels(events)


def all_kernels(events: Iterable[Any]) -> KernelCounts:
    """Count every kernel of a profile by name."""
    device = torch.autograd.DeviceType.CUDA
    seen = Counter(event.name for event in events if event.device_type == device)
    return {name: count for name, count in seen.items() if not name.startswith(RANGE)}


def by_layer(events: Iterable[Any]) -> dict[str, KernelCounts]:
    """Count the kernels below every range, by the layer that it names."""
    counts: dict[str, Counter[str]] = {}
    for event in events:
        if event.name.startswith(RANGE) and event.device_type == torch.autograd.DeviceType.CPU:
            counts.setdefault(event.name.removeprefix(RANGE), Counter()).update(_below(event))
    return {path: dict(kernels) for path, kernels in counts.items()}


def _below(event: Any) -> Iterator[str]:
    for kernel in event.kernels:
        yield kernel.name
    for child in event.cpu_children:
        yield from _below(child)


@contextmanager
def _named(module: nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """Put a named range around every call of these layers."""
    ranges: dict[str, torch.profiler.record_function] = {}

    def enter(path: str) -> None:
        ranges[path] = torch.profiler.record_function(RANGE + path)
        ranges[path].__enter__()

    def leave(path: str) -> None:
        ranges.pop(path).__exit__(None, None, None)

    handles = []
    for path in paths:
        layer = module.get_submodule(path)
        handles.append(layer.register_forward_pre_hook(lambda _m, _a, path=path: enter(path)))
        handles.append(layer.register_forward_hook(lambda _m, _a, _o, path=path: leave(path)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def evidence(
    engine: str,
    artefact: str,
    gemms: Iterable[LayerGemm],
    precision: str,
    rows: Mapping[str, int],
    checks: Mapping[str, TensorCheck],
    kernels: Mapping[str, KernelCounts] | None,
    ran: KernelCounts | None = None,
) -> EngineEvidence:
    """Gather the evidence for a PyTorch model.

    `rows` are those of what a layer reads, by layer path; `kernels` None means that nobody watched;
    `ran` are all kernels of the pass, of which sparse ones outside every layer are told.
    """
    layers = tuple(
        _layer(gemm, precision, rows, checks.get(gemm.parameter), kernels) for gemm in gemms
    )
    placed = {name for counts in (kernels or {}).values() for name in counts}
    stray = tuple(
        sorted(name for name in ran or {} if is_sparse_kernel(name) and name not in placed)
    )
    return EngineEvidence(
        engine,
        artefact,
        True,
        layers,
        "input shapes" if rows else "equal rows",
        unplaced=stray,
        unplaced_kernels=len(stray),
    )


def _layer(
    gemm: LayerGemm,
    precision: str,
    rows: Mapping[str, int],
    check: TensorCheck | None,
    kernels: Mapping[str, KernelCounts] | None,
) -> LayerEvidence:
    proofs: dict[Level, str] = {}
    reason, text = _climb(gemm, check, kernels, proofs)
    flops = 2 * gemm.k * gemm.n * rows.get(gemm.layer, 1)
    return LayerEvidence(
        gemm.layer, gemm.parameter, gemm.k, gemm.n, precision, flops, proofs, reason, text
    )


def _climb(
    gemm: LayerGemm,
    check: TensorCheck | None,
    kernels: Mapping[str, KernelCounts] | None,
    proofs: dict[Level, str],
) -> tuple[Reason | None, str]:
    """Fill `proofs` level by level; returns why the next one was not reached."""
    if check is None or not check.ok:
        return "not in pattern", check.problems[0] if check else "its weight was not verified"
    proofs["pattern"] = (
        f"{check.tensor}: {check.groups} groups of {check.pattern} along axis {check.axis}, 0 bad"
    )
    if gemm.why_not is not None:
        return "shape", gemm.why_not
    proofs["shape"] = f"{gemm.k} x {gemm.n}: {shape_verdict(gemm.k, gemm.n, TWO_FOUR)}"
    proofs["eligible"] = "an ordinary layer in a shape and type that the library takes"
    if gemm.kept_dense is not None:
        return "dense was faster", gemm.kept_dense
    proofs["chosen"] = "runs on compressed weights"
    if kernels is None:
        return "not checked", "nobody watched the model run"
    ran = kernels.get(gemm.layer, {})
    sparse = {name: count for name, count in ran.items() if is_sparse_kernel(name)}
    if not sparse:
        return "unknown", f"its kernels were {', '.join(ran) or 'not seen'}"
    proofs["observed"] = "; ".join(f"{name} ran {count} times" for name, count in sparse.items())
    return "not checked", "no hardware counters were read for its kernel"
