"""Memory of this process: its peak over its whole life, over a run, and since the last reset; and
what is free.

Linux keeps the high-water mark of resident memory and lets a process reset its own; elsewhere the
mark of the whole life stands in. On a GPU a run and a reset are measured by PyTorch's allocator
instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import resource
from pathlib import Path

import psutil
import torch

from nmsparse_deploy.errors import UsageError

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
}
_before_reset = 0
_run_before_reset = 0


def peak_memory_mb() -> int:
    """Return the largest resident memory so far, in MB."""
    return max(_before_reset, _high_water_mark()) >> 20


def start_run() -> None:
    """Let `run_peak` count anew from here on."""
    global _run_before_reset
    reset_peak()
    _run_before_reset = 0


def run_peak() -> int:
    """Return the largest memory since `start_run`, in bytes: resident, or on the GPU allocated."""
    return max(_run_before_reset, _peak_since_reset())


def reset_peak() -> None:
    """Let `peak_since_reset_mb` count anew from here on."""
    global _before_reset, _run_before_reset
    _run_before_reset = run_peak()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    _before_reset = max(_before_reset, _high_water_mark())
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_since_reset_mb() -> int:
    """Return the largest memory since `reset_peak`, in MB: resident, or on the GPU allocated."""
    return _peak_since_reset() >> 20


def _peak_since_reset() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _high_water_mark()


def _high_water_mark() -> int:
    """Return the largest resident memory in bytes since it was reset last; psutil does not tell
    it."""
    try:
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def used_memory() -> int:
    """Return the bytes in use now: resident, or on the GPU allocated."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return int(psutil.Process().memory_info().rss)


def free_memory(device: torch.device | None = None) -> int:
    """Return the bytes that are free on a device: by default on the GPU, where there is one."""
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def give_back() -> None:
    """Return what is not used any more to the system; the C library keeps freed pieces below 32 MB
    otherwise."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def parse_size(text: str) -> int:
    """Turn `3GB`, `512 MiB` or `2e9` into bytes. Raises `UsageError`."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS or not float(match[1]):
        raise UsageError(f"'{text}' is no amount of memory.", "write it like 3GB or 800MB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def megabytes(count: float) -> str:
    """Write bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
