"""Peak memory of this process: over its whole life, and over one stretch of work.

Linux keeps the high-water mark of resident memory and lets a process reset its own; elsewhere a stretch reports the
mark of the whole life. On a GPU the stretch is measured by PyTorch's allocator instead.
"""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

import torch

_before_reset = 0


def peak_memory_mb() -> int:
    """Largest resident memory so far, in MB."""
    return max(_before_reset, _mark_kb()) // 1024


def start_stretch() -> None:
    """From here on `stretch_peak_mb` counts anew."""
    global _before_reset
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    _before_reset = max(_before_reset, _mark_kb())
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def stretch_peak_mb() -> int:
    """Largest memory since `start_stretch`, in MB: resident, or on the GPU allocated."""
    return torch.cuda.max_memory_allocated() >> 20 if torch.cuda.is_available() else _mark_kb() // 1024


def _mark_kb() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
