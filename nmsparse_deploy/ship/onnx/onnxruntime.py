"""ONNX Runtime: on the CPU the reference for numerics, on a GPU a dense baseline. Both multiply the
zeros.

Its TensorRT provider (10.x) can be allowed to use sparse weights; it does not say which tactics it
chose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from nmsparse_deploy.errors import MissingExtra, NmsparseError, UsageError, first_line
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.ship.engine import (
    Case,
    Engine,
    EngineSettings,
    Inspection,
    Tensor,
    settings_of,
)

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_EXTRAS = {"cuda": "ort-gpu", "tensorrt": "ort-gpu,trt10"}
_LEVELS = {
    "none": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}


PLAIN, ALLOWED = "onnxruntime-tensorrt", "onnxruntime-tensorrt-sparse"
GPU_ARMS: Mapping[str, Mapping[str, Any]] = {
    "onnxruntime-cuda": {"provider": "cuda"},
    PLAIN: {"provider": "tensorrt"},
    ALLOWED: {"provider": "tensorrt", "sparse": True},
}


class OnnxSettings(EngineSettings):
    """Options of ONNX Runtime."""

    threads: int = Field(0, ge=0, description="of the processor; 0: as many as ONNX Runtime likes")
    optimization: Literal["none", "basic", "extended", "all"] = Field(
        "all", description="of the graph"
    )
    provider: Literal["cpu", "cuda", "tensorrt"] = Field("cpu", description="what computes")
    sparse: bool = Field(False, description="whether the provider tensorrt may use sparse tactics")

    @model_validator(mode="after")
    def _only_tensorrt_is_sparse(self) -> OnnxSettings:
        if self.sparse and self.provider != "tensorrt":
            raise UsageError(
                f"The provider '{self.provider}' has no sparse kernels; only 'tensorrt' can be allowed to "
                "use them."
            )
        return self


class OnnxRuntime(Engine):
    """One session of ONNX Runtime."""

    name, title, label = "onnxruntime", "ONNX Runtime", "ONNX"
    settings_type = OnnxSettings
    twins: ClassVar[Mapping[str, str]] = {ALLOWED: PLAIN}

    def __init__(self, session: Any, settings: OnnxSettings, version: str) -> None:
        self._session = session
        self._settings = settings
        self._version = version
        self._inputs = {value.name: value.type for value in session.get_inputs()}

    @classmethod
    def build(cls, artefact: Path, settings: Mapping[str, Any] | None = None) -> Self:
        """Open an ONNX file.

        Raises `NmsparseError` when the provider cannot run the graph, or when ONNX Runtime silently
        takes another.
        """
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise MissingExtra("onnxruntime", "onnx", "Running an ONNX file") from error
        chosen = settings_of(cls, OnnxSettings, settings)
        if not artefact.is_file():
            raise UsageError(f"There is no ONNX file '{artefact}'.")
        options = ort.SessionOptions()
        options.intra_op_num_threads = chosen.threads
        options.log_severity_level = 4
        options.graph_optimization_level = getattr(
            ort.GraphOptimizationLevel, _LEVELS[chosen.optimization]
        )
        wanted = PROVIDERS[chosen.provider]
        if wanted not in ort.get_available_providers():
            raise NmsparseError(
                f"This ONNX Runtime has no '{wanted}'.",
                f"pip install 'nmsparse-deploy[{_EXTRAS.get(chosen.provider, 'onnx')}]'",
            )
        try:
            session = ort.InferenceSession(str(artefact), options, providers=_providers(chosen))
        except Exception as error:
            raise NmsparseError(_why(error, artefact, wanted)) from error
        if session.get_providers()[0] != wanted:
            raise NmsparseError(
                f"ONNX Runtime was asked for '{wanted}' and silently took "
                f"'{session.get_providers()[0]}'."
            )
        return cls(session, chosen, ort.__version__)

    def inspect(self) -> Inspection:
        """Return evidence; `sparse_kernels` is None where they were allowed: nothing here sees if
        one was chosen."""
        allowed = self._settings.sparse
        reason = (
            "TensorRT was allowed to use sparse tactics, and this provider does not say which it chose"
            if (allowed)
            else "no sparse GEMM kernels are in use here; the zeros are multiplied"
        )
        return Inspection(
            self.name,
            self._version,
            None if allowed else False,
            reason,
            {
                "requested": [PROVIDERS[self._settings.provider]],
                "providers": self._session.get_providers(),
                "threads": self._settings.threads,
                "optimization": self._settings.optimization,
            },
        )

    def run(self, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Return outputs by name. Floating-point inputs are converted to the type of the graph's
        inputs."""
        feed = self._feed(batch)
        names = [value.name for value in self._session.get_outputs()]
        try:
            return dict(zip(names, self._session.run(names, feed)))
        except Exception as error:
            raise NmsparseError(
                f"ONNX Runtime could not run this batch: {first_line(error)}."
            ) from error

    def bound(self, batch: Mapping[str, Tensor]) -> Callable[[], None]:
        """Return a call that runs `batch` with inputs and outputs where the provider works."""
        import onnxruntime as ort

        device = "cpu" if self._settings.provider == "cpu" else "cuda"
        binding = self._session.io_binding()
        for name, value in self._feed(batch).items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value, device, 0))
        for output in self._session.get_outputs():
            binding.bind_output(output.name, device)

        def call() -> None:
            try:
                self._session.run_with_iobinding(binding)
            except Exception as error:
                raise NmsparseError(
                    f"ONNX Runtime could not run this batch: {first_line(error)}."
                ) from error

        call()
        return call

    @classmethod
    def arms(cls, run: RunDir) -> dict[str, dict[str, Case]]:
        """Return for every graph CUDA kernels as the dense baseline, and TensorRT with and without
        sparse weights.

        The CUDA provider has no sparse kernels, so its time is that of a dense model. Allowed is
        not chosen, and what TensorRT chose is what `build` finds out, not this.
        """
        return {
            f"{cls.label} {name}": {arm: Case(path, settings) for arm, settings in GPU_ARMS.items()}
            for name, path in cls.artefacts(run).items()
        }

    def _feed(self, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        missing, unknown = set(self._inputs) - set(batch), set(batch) - set(self._inputs)
        if missing or unknown:
            raise UsageError(
                f"The graph takes the inputs {', '.join(self._inputs)}, not {', '.join(batch) or 'none'}."
            )
        return {name: _as_input(value, self._inputs[name]) for name, value in batch.items()}


def _providers(chosen: OnnxSettings) -> list[Any]:
    """Return what runs the graph, with its options, and for TensorRT what runs the nodes that it
    leaves."""
    if chosen.provider != "tensorrt":
        return [PROVIDERS[chosen.provider]]
    return [(PROVIDERS["tensorrt"], {"trt_sparsity_enable": chosen.sparse}), PROVIDERS["cuda"]]


def _as_input(value: Tensor, kind: str) -> np.ndarray:
    if isinstance(value, torch.Tensor):  # NumPy knows no bf16
        value = (value.float() if value.dtype == torch.bfloat16 else value).detach().cpu().numpy()
    wanted = {
        "tensor(float16)": np.float16,
        "tensor(float)": np.float32,
        "tensor(double)": np.float64,
    }.get(kind)
    return (
        value.astype(wanted)
        if wanted and value.dtype != wanted and value.dtype.kind == "f"
        else value
    )


def _why(error: Exception, artefact: Path, provider: str) -> str:
    text = str(error)
    if "NOT_IMPLEMENTED" in text or "Could not find an implementation" in text:
        kind = "bf16 " if "bfloat16" in text.lower() or _has_bf16(artefact) else ""
        return f"ONNX Runtime's {provider} has no kernels for a node of this {kind}graph: {first_line(error)}."
    return f"ONNX Runtime could not open '{artefact}': {first_line(error)}."


def _has_bf16(artefact: Path) -> bool:
    import onnx

    model = onnx.load(str(artefact), load_external_data=False)
    return any(tensor.data_type == onnx.TensorProto.BFLOAT16 for tensor in model.graph.initializer)
