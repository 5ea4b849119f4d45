"""Memory of this process: its peak over its whole life, over a run, and over one stretch of work; and what is free.

Linux keeps the high-water mark of resident memory and lets a process reset its own; elsewhere a stretch reports the
mark of the whole life. On a GPU a stretch and a run are measured by PyTorch's allocator instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import resource
from pathlib import Path

import torch

from nmsparse_deploy.errors import UsageError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 1 << 10, "MIB": 1 << 20,
         "GIB": 1 << 30, "TIB": 1 << 40}
_before_reset = 0
_run_before_reset = 0


def peak_memory_mb() -> int:
    """Largest resident memory so far, in MB."""
    return max(_before_reset, _mark_kb()) // 1024


def start_run() -> None:
    """From here on `run_peak` counts anew."""
    global _run_before_reset
    start_stretch()
    _run_before_reset = 0


def run_peak() -> int:
    """Largest memory since `start_run`, in bytes: resident, or on the GPU allocated."""
    return max(_run_before_reset, _stretch_peak())


def start_stretch() -> None:
    """From here on `stretch_peak_mb` counts anew."""
    global _before_reset, _run_before_reset
    _run_before_reset = run_peak()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    _before_reset = max(_before_reset, _mark_kb())
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def stretch_peak_mb() -> int:
    """Largest memory since `start_stretch`, in MB: resident, or on the GPU allocated."""
    return _stretch_peak() >> 20


def _stretch_peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _mark_kb() * 1024


def _mark_kb() -> int:
    try:
        return _status("self", "VmHWM")
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _status(process: str, field: str) -> int:
    return int(Path(f"/proc/{process}/status").read_text().split(f"{field}:")[1].split()[0])


def used() -> int:
    """Bytes in use now: resident, or on the GPU allocated."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    try:
        return _status("self", "VmRSS") * 1024
    except (OSError, IndexError):
        return _mark_kb() * 1024


def free() -> int | None:
    """Bytes that are free on the GPU, or on the machine without one; None where the system does not say."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    try:
        return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return None


def give_back() -> None:
    """Return what is not used any more to the system; the C library keeps freed pieces below 32 MB otherwise."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def parse_size(text: str) -> int:
    """`3GB`, `512 MiB`, `2e9` -> bytes. Raises `UsageError`."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS or not float(match[1]):
        raise UsageError(f"'{text}' is no amount of memory.", "write it like 3GB or 800MB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def megabytes(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
