"""What this machine can do, what clashes, and what to type next."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil

from nmsparse_deploy.system.assets import cache_dir
from nmsparse_deploy.system.sparse_cores import MIN_CAPABILITY

State = Literal["ok", "missing", "problem"]
DISK_GB, MEMORY_GB = 4, 4
"""What the demo needs, with room to spare."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `hint` is what to type."""

    subject: str
    state: State
    found: str
    hint: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def examine() -> list[Finding]:
    """Look at everything; never raises."""
    return [
        _torch(),
        _gpu(),
        _cusparselt(),
        *_packages(),
        _tensorrt(),
        *_clashes(),
        _memory(),
        _disk(),
    ]


def next_command(findings: list[Finding]) -> str:
    """Return the one command that makes most sense now."""
    problems = [f.hint for f in findings if f.state == "problem" and f.hint]
    return problems[0] if problems else "nmsparse-deploy prune"


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _torch() -> Finding:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return Finding(
        "torch", "ok", f"{torch.__version__} ({build}), {torch.get_num_threads()} threads"
    )


def no_cuda() -> str | None:
    """Return why PyTorch cannot use a GPU here, or None where it can."""
    import torch

    if torch.cuda.is_available():
        return None
    return (
        "this torch is a CPU build" if torch.version.cuda is None else "torch sees no CUDA device"
    )


def _gpu() -> Finding:
    import torch

    if why := no_cuda():
        return Finding(
            "GPU",
            "missing",
            f"none: {why}; masks, checks and ONNX work, sparse kernels cannot run here",
        )
    capability = torch.cuda.get_device_capability()
    name = f"{torch.cuda.get_device_name()}, compute capability {capability[0]}.{capability[1]}"
    if capability < MIN_CAPABILITY:
        needed = f"{MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
        return Finding(
            "GPU", "problem", f"{name}: no sparse tensor cores ({needed} or newer has them)"
        )
    return Finding("GPU", "ok", name)


def _cusparselt() -> Finding:
    import torch

    backend = getattr(torch.backends, "cusparselt", None)
    if backend is not None and torch.cuda.is_available() and backend.is_available():
        return Finding("cuSPARSELt", "ok", str(backend.version()))
    return Finding("cuSPARSELt", "missing", "not available: PyTorch cannot run 2:4 kernels here")


def _packages() -> list[Finding]:
    rows = []
    for package, extra in (
        ("transformers", ""),
        ("onnx", "onnx"),
        ("onnxscript", "onnx"),
        ("onnxruntime", "onnx"),
        ("timm", "vision"),
        ("pillow", "vision"),
        ("diffusers", "diffusion"),
        ("lm_eval", "eval"),
    ):
        release = installed(package) or (
            installed("onnxruntime-gpu") if package == "onnxruntime" else None
        )
        hint = f"pip install 'nmsparse-deploy[{extra}]'"
        rows.append(
            Finding(package, "ok", release)
            if release
            else Finding(package, "missing", "not installed", hint)
        )
    return rows


def _tensorrt() -> Finding:
    for package in ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"):
        release = installed(package)
        if release:
            return Finding("TensorRT", "ok", f"{release} (major {release.split('.')[0]})")
    return Finding(
        "TensorRT",
        "missing",
        "not installed: exports are kept as ONNX, no engine is built",
        "pip install 'nmsparse-deploy[trt11]'",
    )


def _clashes() -> list[Finding]:
    rows = []
    if installed("onnxruntime") and installed("onnxruntime-gpu"):
        rows.append(
            Finding(
                "onnxruntime",
                "problem",
                "onnxruntime and onnxruntime-gpu overwrite each other's files",
                "pip uninstall onnxruntime",
            )
        )
    tensorrt = installed("tensorrt") or ""
    if installed("onnxruntime-gpu") and tensorrt and int(tensorrt.split(".")[0]) > 10:
        rows.append(
            Finding(
                "TensorRT",
                "problem",
                f"onnxruntime-gpu's TensorRT provider loads TensorRT 10, not {tensorrt}",
                "pip install 'nmsparse-deploy[trt10,ort-gpu]'",
            )
        )
    rows += _torchvision_clash()
    return rows


def _torchvision_clash() -> list[Finding]:
    import torch

    release = installed("torchvision")
    if release is None:
        return []
    try:
        import torchvision  # noqa: F401
    except Exception:
        return [
            Finding(
                "torchvision",
                "problem",
                f"{release} was built for another torch than {torch.__version__}; "
                "it breaks transformers and timm",
                "pip uninstall torchvision",
            )
        ]
    return [Finding("torchvision", "ok", release)]


def _memory() -> Finding:
    free = psutil.virtual_memory().available / 1e9
    return Finding("memory", "ok" if free > MEMORY_GB else "problem", f"{free:.1f} GB available")


def _disk() -> Finding:
    rows = [
        (place, shutil.disk_usage(_existing(place)).free / 1e9)
        for place in (Path.cwd(), cache_dir())
    ]
    state: State = "ok" if all(free > DISK_GB for _, free in rows) else "problem"
    return Finding(
        "disk",
        state,
        f"{rows[0][1]:.0f} GB free here, {rows[1][1]:.0f} GB free in the cache {cache_dir()}",
    )


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
