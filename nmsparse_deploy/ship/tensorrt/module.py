"""The `tensorrt` module of this machine: is it there, can it be used, and the two objects that it
calls back.

An exception that leaves a callback ends the process, so callbacks keep it and the builder code
raises it afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from nmsparse_deploy.errors import MissingExtra, NmsparseError, first_line
from nmsparse_deploy.system.doctor import no_cuda
from nmsparse_deploy.system.progress import Progress

SEVERITIES = {"VERBOSE": "V", "INFO": "I", "WARNING": "W", "ERROR": "E", "INTERNAL_ERROR": "F"}


def require_cuda(what: str) -> None:
    """Raise `NmsparseError` without a CUDA device. Ask before anything else: without one, TensorRT
    may crash."""
    if why := no_cuda():
        raise NmsparseError(
            f"{what} needs an NVIDIA GPU: {why}.",
            f"run it on a machine with one, after pip install 'nmsparse-deploy[{extra()}]'",
        )


def load_tensorrt(what: str) -> Any:
    """Import `tensorrt`. Raises `MissingExtra` without it, `NmsparseError` when its libraries do
    not load."""
    try:
        import tensorrt
    except ModuleNotFoundError as error:
        raise MissingExtra("tensorrt", extra(), what) from error
    except (ImportError, OSError) as error:
        raise NmsparseError(
            f"TensorRT is installed, but cannot be loaded: {first_line(error)}.",
            f"pip install --force-reinstall 'nmsparse-deploy[{extra()}]'",
        ) from error
    return tensorrt


def extra() -> str:
    """Return the extra of TensorRT 11, unless ONNX Runtime's own TensorRT provider is here, which
    loads TensorRT 10."""
    providers = find_spec("onnxruntime")
    folders = providers.submodule_search_locations if providers else None
    shared = (
        Path(folder) / "capi" / "libonnxruntime_providers_tensorrt.so" for folder in folders or ()
    )
    return "trt10" if any(path.is_file() for path in shared) else "trt11"


@cache
def recorder(trt: Any) -> Any:
    """Return the one logger of this process: TensorRT goes on writing to the first that it was
    given."""

    class Recorder(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.file: TextIO | None = None
            self.kept: BaseException | None = None

        def log(self, severity: Any, msg: str) -> None:
            try:
                if self.file is not None:
                    self.file.write(f"[{SEVERITIES.get(severity.name, '?')}] {msg}\n")
            except BaseException as error:  # Ctrl-C or a full disk
                self.kept = self.kept or error

        @contextmanager
        def writing_to(self, path: Path) -> Iterator[None]:
            """Write every message to `path`, one severity letter in front; raises what was kept
            when it ends well."""
            self.kept = None
            with open(path, "w", encoding="utf-8", errors="backslashreplace") as self.file:
                try:
                    yield
                    self.raise_kept()
                finally:
                    file, self.file = self.file, None
                    file.flush()

        def raise_kept(self) -> None:
            if self.kept is not None:
                raise self.kept

    return Recorder()


def monitor(trt: Any, logger: Any, name: str, progress: Progress) -> Any:
    """Return a monitor of the build's outermost phases that stops it once something was kept from
    being raised."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self._steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                total = self._steps.get(phase_name)
                if total:
                    progress(f"building {name}: {phase_name}", min(step + 1, total), total)
            except BaseException as error:  # Ctrl-C
                logger.kept = logger.kept or error
            return logger.kept is None

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()
