"""What things are timed on: a CUDA device with its clock, its graphs and its state, or a dry
stand-in for tests.

On a GPU a call only enqueues, so time is taken between two events on the stream, over as many calls
as it takes for the resolution of the events not to matter. Between two timings the L2 cache is
either left as it is (`warm`) or overwritten (`cold`). A CUDA graph is one recorded call that is
replayed without the host.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

import psutil
import torch

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.system.cuda_graphs import record
from nmsparse_deploy.system.doctor import no_cuda
from nmsparse_deploy.system.environment import Environment, environment
from nmsparse_deploy.system.timing import Call, Clock, wall

MIN_MS = 0.2
"""A timing is at least this long, so that half a microsecond of the events' resolution is
nothing."""
MAX_CALLS = 200
COLD_BYTES = 256 << 20
"""More than any L2 cache."""
REASONS = {
    0x1: "idle",
    0x2: "clocks set by an application",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks",
}
"""Bits of NVML's reasons for a lower clock."""


class Libraries(TypedDict):
    """Versions that kernels come from; None where a library is not there or does not tell."""

    cuda: str | None
    cusparselt: int | None
    cusparselt_loaded: str | None
    """The file that is really loaded; PyTorch only tells what it was built with."""
    cudnn: int | None
    cublas: int | None
    driver: str | None


class GpuState(TypedDict, total=False):
    """The answers of NVML now; None where this GPU or driver does not tell."""

    unavailable: str
    """Why nobody can say; then nothing else is there."""
    sm_mhz: int | None
    memory_mhz: int | None
    most_sm_mhz: int | None
    power_mw: int | None
    power_limit_mw: int | None
    temperature_c: int | None
    throttle_reasons: list[str] | None


class MachineEnvironment(Environment):
    """The circumstances that a figure depends on besides the model."""

    dry: bool
    device: str
    libraries: Libraries
    state: GpuState


@dataclass(frozen=True)
class Machine:
    """A device with the ways to time on it."""

    device: torch.device
    name: str
    clock: Callable[[], Clock]
    """A new clock for one comparison; it keeps what it timed alive."""
    graph: Callable[[Call], Call] | None
    """Turns a call into the replay of its recording; None: no CUDA graphs."""
    dry: bool = False

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def environment(self) -> MachineEnvironment:
        """Return everything a figure depends on besides the model."""
        return {
            **environment(),
            "dry": self.dry,
            "device": self.name,
            "libraries": libraries(),
            "state": state(),
        }


def require_gpu(what: str) -> Machine:
    """Return this machine's CUDA device. Raises `NmsparseError` without one."""
    if why := no_cuda():
        raise NmsparseError(
            f"{what} needs an NVIDIA GPU, and {why}.", "run it on a machine with one (docs/gpu.md)"
        )
    return Machine(torch.device("cuda"), torch.cuda.get_device_name(), events, record)


def dry_machine() -> Machine:
    """Return a stand-in on a processor with the same control flow; nothing that is timed with it
    means anything."""
    return Machine(torch.device("cpu"), "dry run", lambda: wall, None, dry=True)


def events(cold: bool = False) -> Clock:
    """Make a clock of the stream, per call. How many calls lie between two events is settled at its
    first timing."""
    counts: dict[int, tuple[Call, int]] = {}
    flush = torch.empty(COLD_BYTES, dtype=torch.uint8, device="cuda") if cold else None

    def clock(call: Call) -> float:
        if id(call) not in counts:
            call()  # the first one may load a kernel
            once = max(_between_events(call, 1), 1e-3)
            counts[id(call)] = call, 1 if cold else min(MAX_CALLS, math.ceil(MIN_MS / once))
        if flush is not None:
            flush.zero_()
        return _between_events(call, counts[id(call)][1])

    return clock


def _between_events(call: Call, calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / calls


def libraries() -> Libraries:
    """Ask every library that kernels come from."""
    backend = getattr(torch.backends, "cusparselt", None)
    return {
        "cuda": torch.version.cuda,
        "cusparselt": backend.version() if backend is not None else None,
        "cusparselt_loaded": _loaded("libcusparseLt"),
        "cudnn": torch.backends.cudnn.version(),
        "cublas": _cublas_version(),
        "driver": _driver(),
    }


def _loaded(library: str) -> str | None:
    return next(
        (mapped.path for mapped in psutil.Process().memory_maps() if library in mapped.path), None
    )


def _cublas_version() -> int | None:
    path = _loaded("libcublasLt.so")
    try:
        ask = ctypes.CDLL(path).cublasLtGetVersion if path else None
    except (OSError, AttributeError):
        return None
    if ask is None:
        return None
    ask.restype = ctypes.c_size_t
    return int(ask())


def _driver() -> str | None:
    with _nvml() as nvml:
        return _text(nvml.nvmlSystemGetDriverVersion()) if nvml is not None else None


def state() -> GpuState:
    """Read clocks, power, temperature and what holds the clocks down, now; or why nobody can
    say."""
    with _nvml() as nvml:
        if nvml is None:
            return {"unavailable": "no NVIDIA GPU, or the package nvidia-ml-py is not installed"}
        handle = nvml.nvmlDeviceGetHandleByIndex(
            torch.cuda.current_device() if torch.cuda.is_available() else 0
        )
        reasons = _ask(nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", handle)
        held = [text for bit, text in REASONS.items() if reasons is not None and reasons & bit]
        return {
            "sm_mhz": _ask(nvml, "nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_SM),
            "memory_mhz": _ask(nvml, "nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_MEM),
            "most_sm_mhz": _ask(nvml, "nvmlDeviceGetMaxClockInfo", handle, nvml.NVML_CLOCK_SM),
            "power_mw": _ask(nvml, "nvmlDeviceGetPowerUsage", handle),
            "power_limit_mw": _ask(nvml, "nvmlDeviceGetEnforcedPowerLimit", handle),
            "temperature_c": _ask(
                nvml, "nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU
            ),
            "throttle_reasons": held if reasons is not None else None,
        }


def _ask(nvml: Any, name: str, *arguments: Any) -> Any:
    """Ask NVML; None where this GPU or driver does not tell."""
    try:
        return getattr(nvml, name)(*arguments)
    except (nvml.NVMLError, AttributeError):
        return None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


@contextmanager
def _nvml() -> Iterator[Any]:
    """Open NVML, or give None where there is none."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # the package raises types of its own, and its absence is one of them
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def transient(call: Call, machine: Machine) -> int | None:
    """Measure the bytes that one call takes at most beyond what is allocated already; None where
    nobody counts."""
    if machine.device.type != "cuda":
        return None
    machine.synchronise()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    machine.synchronise()
    return torch.cuda.max_memory_allocated() - before
