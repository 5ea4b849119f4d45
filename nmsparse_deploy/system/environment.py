"""When, with which versions and on what hardware: what every result carries beside its figures."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

from typing_extensions import TypedDict  # the one that pydantic reads

from nmsparse_deploy.system.hardware import cpu_name

PACKAGES = (
    "nmsparse-deploy",
    "torch",
    "transformers",
    "timm",
    "diffusers",
    "numpy",
    "safetensors",
    "tokenizers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "gguf",
)


class Hardware(TypedDict):
    """The machine that a result was computed on."""

    cpu: str
    threads: int
    gpu: str | None


class Environment(TypedDict):
    """The circumstances that every result carries."""

    versions: dict[str, str]
    hardware: Hardware


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that can change a result."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def environment() -> Environment:
    """Return versions and hardware, as every result carries them."""
    import torch

    return {
        "versions": versions(),
        "hardware": {
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }
