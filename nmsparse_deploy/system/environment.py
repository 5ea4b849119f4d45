"""When, with which versions and on what hardware: what every result carries beside its figures."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("nmsparse-deploy", "torch", "transformers", "timm", "diffusers", "numpy", "safetensors", "tokenizers",
            "onnx", "onnxscript", "onnxruntime", "gguf")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Installed versions of the packages that can change a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    """Versions and hardware, as every result carries them."""
    import torch

    hardware: dict[str, Any] = {"cpu": _cpu_name(), "threads": torch.get_num_threads(),
                                "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}
    return {"versions": versions(), "hardware": hardware}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} logical cores)" if names else platform.machine()
