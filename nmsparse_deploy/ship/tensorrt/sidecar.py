"""The file beside an engine that says what it is: `NAME.engine` is nothing without `NAME.json`.

It ties the engine to the very bytes of the ONNX graph and of its weights by SHA-256, so that what
was proven about the graph may be said of the engine, and records settings, versions and the GPU.
The raw evidence lies beside it: `NAME.log` (the builder's every message), `NAME.layers.json` (the
inspector) and, once it was watched, `NAME.kernels.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from nmsparse_deploy.errors import CheckFailed, UsageError
from nmsparse_deploy.system.assets import digest

FORMAT = "nmsparse-engine-1"
LOG, LAYERS, KERNELS, CACHE, FAILED_LOG = (
    ".log",
    ".layers.json",
    ".kernels.json",
    ".cache",
    ".failed.log",
)
FILES = (".engine", LOG, LAYERS, KERNELS, CACHE, FAILED_LOG)


@dataclass(frozen=True)
class FileId:
    """A file as it was: its path, seen from the engine's folder, and its content."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Settings:
    """The settings that decide which tactics an engine gets. Twins differ in `sparse` alone."""

    shapes: Mapping[str, tuple[int, ...]]
    """The one shape of each input: minimum, optimum and maximum of the profile."""
    sparse: bool = True
    level: int = 4
    """Builder optimisation level. Below 4 a heuristic decides which kernels are tried at all."""
    timing_iterations: int = 8
    """TensorRT's own default of 1 decides sparse against dense on one noisy sample."""
    route: str | None = None
    """Build-route knobs, `-name=value`, where TensorRT lists them."""
    allow_fp32: bool = False
    """Build with sparse weights although the graph has no weight in 16 or 8 bits."""


@dataclass(frozen=True)
class BuildEnvironment:
    """Versions and GPU that a build depended on beside the graph and the settings."""

    tensorrt: str
    torch: str
    cuda: str | None
    gpu: str
    capability: str
    timing_cache: str = "started empty, shared with no engine"


@dataclass(frozen=True)
class Sidecar:
    """The facts about one engine."""

    engine: FileId
    onnx: tuple[FileId, ...]
    """The graph first, then its external data."""
    settings: Settings
    environment: BuildEnvironment
    seconds: float
    statistics: dict[str, int]
    """What TensorRT tells about the plan, in bytes; empty where it tells nothing."""

    def save(self, path: Path) -> None:
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"
        path.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, engine: Path) -> Sidecar:
        """Return the sidecar of an engine file. Raises `UsageError` when it is missing or
        damaged."""
        path = engine.with_suffix(".json")
        if not path.is_file():
            raise UsageError(
                f"'{engine}' has no '{path.name}' beside it, so nothing ties it to an ONNX file.",
                "nmsparse-deploy build writes both",
            )
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data.pop("format") != FORMAT:
                raise ValueError(f"its format is not '{FORMAT}'")
            return TypeAdapter(cls).validate_python(data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise UsageError(
                f"'{path}' is damaged or not the sidecar of an engine: {what}."
            ) from error

    def onnx_path(self, engine: Path) -> Path:
        return Path(os.path.normpath(engine.parent / self.onnx[0].path))

    def check(self, engine: Path) -> None:
        """Raise `CheckFailed` unless the engine and the ONNX files are, byte for byte, those of the
        build."""
        if engine.stat().st_size != self.engine.bytes:
            raise CheckFailed(
                f"'{engine}' has {engine.stat().st_size:,} bytes, but {self.engine.bytes:,} were built: "
                "it is truncated or another file.",
                "nmsparse-deploy build makes it again",
            )
        if digest(engine) != self.engine.sha256:
            raise CheckFailed(
                f"'{engine}' is not the file that was built: its SHA-256 differs.",
                "nmsparse-deploy build makes it again",
            )
        for file in self.onnx:
            path = Path(os.path.normpath(engine.parent / file.path))
            if not path.is_file():
                raise CheckFailed(
                    f"'{path}', which '{engine.name}' was built from, is not there any more."
                )
            if path.stat().st_size != file.bytes or digest(path) != file.sha256:
                raise CheckFailed(
                    f"'{path}' has changed since '{engine.name}' was built from it, so what it holds "
                    "says nothing about the engine.",
                    "nmsparse-deploy build makes a new one",
                )


def identify(path: Path, seen_from: Path) -> FileId:
    return FileId(os.path.relpath(path, seen_from), path.stat().st_size, digest(path))


def onnx_files(graph: Path) -> Sequence[Path]:
    """Return an ONNX file and the files that hold its weights."""
    import onnx

    tensors = onnx.load(str(graph), load_external_data=False).graph.initializer
    names = {
        entry.value
        for tensor in tensors
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    folder = graph.parent.resolve()
    outside = sorted(name for name in names if not (folder / name).resolve().is_relative_to(folder))
    if outside:
        raise UsageError(f"'{graph}' keeps weights outside its own folder, in '{outside[0]}'.")
    return [graph, *(graph.parent / name for name in sorted(names))]
