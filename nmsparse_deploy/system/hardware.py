"""Which processor this is, and what it computes in."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch


def compute_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Choose bf16 where the processor multiplies it natively and fp32 elsewhere, unless `wanted` says which."""
    import torch

    if wanted != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[wanted]
    flags = _cpu().get("flags", "").split()
    fast = device.type == "cuda" or "avx512_bf16" in flags or "amx_bf16" in flags
    return torch.bfloat16 if fast else torch.float32


def cpu_name() -> str:
    """Return the processor's name and how many logical cores it has."""
    name = _cpu().get("model name") or platform.processor() or platform.machine()
    return f"{name} ({psutil.cpu_count()} logical cores)"


@cache
def _cpu() -> Mapping[str, str]:
    """Read what Linux tells of the first core; empty elsewhere."""
    try:
        core = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in core.splitlines())}
