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


def device() -> torch.device:
    """Return where models compute here: the GPU if there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Choose bf16 where the processor multiplies it natively and fp32 elsewhere, unless `wanted`
    says which."""
    import torch

    if wanted != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[wanted]
    flags = _cpu().get("flags", "").split()
    fast = device.type == "cuda" or "avx512_bf16" in flags or "amx_bf16" in flags
    return torch.bfloat16 if fast else torch.float32


def autocast_for(compute: torch.dtype, where: torch.device) -> torch.autocast:
    """Return the context in which fp32 weights are multiplied in `compute`; nothing is cast for
    fp32 itself."""
    import torch

    return torch.autocast(where.type, compute, enabled=compute != torch.float32)


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
    return {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in core.splitlines())
    }
