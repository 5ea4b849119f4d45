"""TensorRT 10 and 11 as a runtime: load an engine, run it on CUDA tensors, see which kernels ran.

Inputs and outputs are named, and live in buffers of PyTorch whose addresses TensorRT gets. With
`cuda_graph` one enqueue is captured and replayed, without it every run enqueues again; a benchmark
reports the two apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from pydantic import Field

from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.recipe import Build
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.runs.section import Section
from nmsparse_deploy.ship.engine import (
    BuiltEngine,
    Case,
    Engine,
    EngineSettings,
    Inspection,
    Tensor,
    built_engines,
    settings_of,
)
from nmsparse_deploy.ship.onnx.gemms import fixed_shapes, graph_inputs
from nmsparse_deploy.ship.tensorrt.build import build_engine
from nmsparse_deploy.ship.tensorrt.module import load_tensorrt, recorder, require_cuda
from nmsparse_deploy.ship.tensorrt.section import section
from nmsparse_deploy.ship.tensorrt.sidecar import Settings, Sidecar
from nmsparse_deploy.ship.tensorrt.stage import OFF, ON, build_twins
from nmsparse_deploy.system.progress import Progress

DEVICE = "cuda"
_TYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
    "FP8": torch.float8_e4m3fn,
}


class TensorRtSettings(EngineSettings):
    """Options of TensorRT. An engine that is built already takes only `cuda_graph`."""

    batch: int = Field(1, ge=1, description="samples per call")
    length: int = Field(128, ge=1, description="tokens per sample")
    shapes: dict[str, tuple[int, ...]] = Field(
        {}, description="shapes of inputs that batch and length do not settle"
    )
    sparse: bool = Field(True, description="whether the builder may use sparse kernels")
    level: int = Field(4, ge=0, le=5, description="builder optimisation level")
    timing_iterations: int = Field(
        8, ge=1, description="timings that are averaged for every tactic"
    )
    route: str | None = Field(None, description="build-route knobs, where TensorRT lists them")
    allow_fp32: bool = Field(False, description="build although no weight is in low precision")
    folder: Path | None = Field(
        None, description="where the engine goes; left out: beside the ONNX file"
    )
    cuda_graph: bool = Field(False, description="replay one captured enqueue")


class TensorRT(Engine):
    """One engine with one execution context."""

    name, title, label = "tensorrt", "TensorRT", "TensorRT"
    settings_type = TensorRtSettings
    twins: ClassVar[Mapping[str, str]] = {ON: OFF}

    def __init__(self, trt: Any, engine: Any, runtime: Any, path: Path, cuda_graph: bool) -> None:
        self.path = path
        self._runtime, self._engine, self._cuda_graph = runtime, engine, cuda_graph
        self._context = engine.create_execution_context()
        self._version = trt.__version__
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._inputs = [
            name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        ]
        self._outputs = [name for name in names if name not in self._inputs]
        if hasattr(self._context, "nvtx_verbosity"):
            self._context.nvtx_verbosity = (
                trt.ProfilingVerbosity.NONE
            )  # ranges cost time in every enqueue
        self._stream = torch.cuda.Stream()
        self._buffers: dict[str, torch.Tensor] = {}
        self._graph: Any = None

    @classmethod
    def build(cls, artefact: Path, settings: Mapping[str, Any] | None = None) -> Self:
        """Load an engine, or build one from an ONNX file and load that.

        Raises `NmsparseError` without a GPU, without TensorRT, or when the file is no engine of
        this version and GPU.
        """
        chosen = settings_of(cls, TensorRtSettings, settings)
        if not artefact.is_file():
            raise UsageError(f"There is no file '{artefact}'.")
        require_cuda(f"Loading '{artefact.name}' in TensorRT")
        if artefact.suffix == ".onnx":
            shapes = fixed_shapes(
                graph_inputs(artefact), chosen.batch, chosen.length, chosen.shapes
            )
            wanted = Settings(
                shapes,
                chosen.sparse,
                chosen.level,
                chosen.timing_iterations,
                chosen.route,
                chosen.allow_fp32,
            )
            artefact = build_engine(
                artefact, chosen.folder or artefact.parent, artefact.stem, wanted
            )
        return cls._load(artefact, chosen.cuda_graph)

    @classmethod
    def _load(cls, path: Path, cuda_graph: bool) -> Self:
        trt = load_tensorrt("Running a TensorRT engine")
        if path.with_suffix(".json").is_file():
            Sidecar.load(path).check(path)
        runtime = trt.Runtime(recorder(trt))
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise NmsparseError(
                f"TensorRT {trt.__version__} cannot load '{path}': it is damaged, or was built by "
                "another version or for another GPU.",
                "nmsparse-deploy build makes it again",
            )
        return cls(trt, engine, runtime, path, cuda_graph)

    def inspect(self) -> Inspection:
        return Inspection(
            self.name,
            self._version,
            None,
            "the evidence beside the engine says which it holds",
            {
                "path": str(self.path),
                "inputs": [*self._inputs],
                "outputs": [*self._outputs],
                "cuda_graph": self._cuda_graph,
            },
        )

    @classmethod
    def artefacts(cls, run: RunDir) -> dict[str, Path]:
        """Return the engines of a run, by folder and name."""
        paths = [run / row.path for row in built_engines(run) if row.engine == cls.name]
        return {f"{path.parent.name}/{path.stem}": path for path in paths}

    @classmethod
    def arms(cls, run: RunDir) -> dict[str, dict[str, Case]]:
        """Return for every folder of twins its engines, as CUDA graphs."""
        works: dict[str, dict[str, Case]] = {}
        for path in cls.artefacts(run).values():
            works.setdefault(f"{cls.label} {path.parent.name}", {})[path.stem] = Case(
                path, {"cuda_graph": True}
            )
        return works

    @classmethod
    def deploy(cls, run: RunDir, spec: Build, progress: Progress) -> list[BuiltEngine]:
        """Build twins, which differ in sparse weights alone, and gather the evidence for both."""
        if spec.options:
            raise UsageError(
                f"{cls.title} has no setting '{min(spec.options)}' beside those of the recipe."
            )

        def profile(engine: Path, shapes: Mapping[str, Sequence[int]]) -> Mapping[str, int]:
            # Zeros of the right shape: which kernels run does not depend on the values.
            zeros = {name: np.zeros(tuple(shape), np.float32) for name, shape in shapes.items()}
            return cls.build(engine).observe(zeros)

        return build_twins(run, spec, cls.name, cls.verify, profile, progress)

    @classmethod
    def section(cls, row: BuiltEngine) -> Section:
        """Return the evidence for an engine, layer by layer."""
        return section(row)

    def bound(self, batch: Mapping[str, Tensor]) -> Callable[[], None]:
        """Return a call that runs `batch`, which is on the device already, and waits for the
        end."""
        call = self.prepare(batch)

        def waiting() -> None:
            call()
            self._stream.synchronize()

        waiting()
        return waiting

    def run(self, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Return outputs by name, as float32 where NumPy lacks the type. Inputs are cast to the
        types of the engine."""
        self.prepare(batch)()
        self._stream.synchronize()
        outputs = {name: self._buffers[name] for name in self._outputs}
        narrow = (torch.bfloat16, torch.float8_e4m3fn)
        return {
            name: (value.float() if value.dtype in narrow else value).cpu().numpy()
            for name, value in outputs.items()
        }

    def prepare(self, batch: Mapping[str, Tensor]) -> Callable[[], None]:
        """Copy `batch` to the device; the returned call runs the engine once on it, without waiting
        for the end."""
        if set(batch) != set(self._inputs):
            raise UsageError(
                f"The engine takes the inputs {', '.join(self._inputs)}, not "
                f"{', '.join(batch) or 'none'}."
            )
        if any(
            self._buffers.get(name) is None
            or self._buffers[name].shape != torch.as_tensor(value).shape
            for name, value in batch.items()
        ):
            self._allocate(
                {name: tuple(torch.as_tensor(value).shape) for name, value in batch.items()}
            )
        with torch.cuda.stream(self._stream):
            for name, value in batch.items():
                self._buffers[name].copy_(torch.as_tensor(value))
        if not self._cuda_graph:
            return self._enqueue
        if self._graph is None:
            self._graph = self._capture()
        return self._replay

    def observe(self, batch: Mapping[str, Tensor]) -> dict[str, int]:
        """Count how often each kernel ran in one pass, by name, as the CUDA profiler saw it after a
        warm-up."""
        call = self.prepare(batch)
        call()
        self._stream.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
            call()
            self._stream.synchronize()
        on_device = (
            event
            for event in recorded.events() or ()
            if event.device_type == torch.autograd.DeviceType.CUDA
        )
        return dict(Counter(event.name for event in on_device))

    def _allocate(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Make buffers for these input shapes, and give TensorRT their addresses."""
        self._graph, self._buffers = None, {}
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                minimum, optimum, maximum = self._engine.get_tensor_profile_shape(name, 0)
                raise UsageError(
                    f"The engine was built for '{name}' from {tuple(minimum)} to {tuple(maximum)}, best "
                    f"{tuple(optimum)}, not for {shape}.",
                    "build one for this shape",
                )
        self._context.infer_shapes()
        for name in (*self._inputs, *self._outputs):
            shape, kind = (
                tuple(self._context.get_tensor_shape(name)),
                self._engine.get_tensor_dtype(name).name,
            )
            if kind not in _TYPES or min(shape, default=0) < 0:
                raise NmsparseError(
                    f"'{name}' of '{self.path}' does not fit a tensor: type {kind}, shape {shape}."
                )
            self._buffers[name] = torch.empty(shape, dtype=_TYPES[kind], device=DEVICE)
            self._context.set_tensor_address(name, self._buffers[name].data_ptr())

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise NmsparseError(f"TensorRT could not run '{self.path}' on this batch.")

    def _capture(self) -> Any:
        """Capture one enqueue as a CUDA graph; a pass before it lets TensorRT allocate, which
        captures do not allow."""
        self._enqueue()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self._enqueue()
        return graph

    def _replay(self) -> None:
        with torch.cuda.stream(self._stream):
            self._graph.replay()
