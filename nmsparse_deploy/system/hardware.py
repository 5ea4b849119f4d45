"""Which processor this is, and what it computes in."""

from __future__ import annotations

from pathlib import Path

import torch


def compute_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """bf16 where the processor multiplies it natively, fp32 elsewhere."""
    if wanted != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[wanted]
    fast = device.type == "cuda" or "avx512_bf16" in _cpu_flags() or "amx_bf16" in _cpu_flags()
    return torch.bfloat16 if fast else torch.float32


def _cpu_flags() -> str:
    try:
        return next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return ""
