"""ONNX Runtime: on the CPU the reference for numerics, on a GPU a dense baseline. Both multiply the zeros.

Its TensorRT provider (10.x) can be allowed to use sparse weights; it does not say which tactics it chose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from nmsparse_deploy.errors import MissingExtra, NmsparseError, UsageError, first_line
from nmsparse_deploy.ship.engine import Tensor

DEFAULTS: dict[str, Any] = {"threads": 0, "optimization": "all", "provider": "cpu", "sparse": False}
"""0 threads: as many as ONNX Runtime likes. `sparse`: TensorRT may use sparse tactics."""
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
_EXTRAS = {"cuda": "ort-gpu", "tensorrt": "ort-gpu,trt10"}
_LEVELS = {"none": "ORT_DISABLE_ALL", "basic": "ORT_ENABLE_BASIC", "extended": "ORT_ENABLE_EXTENDED",
           "all": "ORT_ENABLE_ALL"}


class OnnxRuntime:
    """One session of ONNX Runtime."""

    def __init__(self, session: Any, settings: dict[str, Any], version: str) -> None:
        self._session = session
        self._settings = settings
        self._version = version
        self._inputs = {value.name: value.type for value in session.get_inputs()}

    @classmethod
    def build(cls, artefact: Path, settings: Mapping[str, Any] | None = None) -> Self:
        """Open an ONNX file. Settings: `threads`, `optimization` (none, basic, extended, all), `provider` (cpu, cuda,
        tensorrt), `sparse`.

        Raises `NmsparseError` when the provider cannot run the graph, or when ONNX Runtime silently takes another.
        """
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise MissingExtra("onnxruntime", "onnx", "Running an ONNX file") from error
        unknown = set(settings or {}) - set(DEFAULTS)
        if unknown:
            raise UsageError(f"ONNX Runtime has no setting '{min(unknown)}'; it has {', '.join(DEFAULTS)}.")
        chosen = DEFAULTS | dict(settings or {})
        if chosen["optimization"] not in _LEVELS:
            raise UsageError(f"'{chosen['optimization']}' is not an optimization level; choose one of "
                             f"{', '.join(_LEVELS)}.")
        if chosen["provider"] not in PROVIDERS:
            raise UsageError(f"There is no provider '{chosen['provider']}'; choose one of {', '.join(PROVIDERS)}.")
        if chosen["sparse"] and chosen["provider"] != "tensorrt":
            raise UsageError(f"The provider '{chosen['provider']}' has no sparse kernels; only 'tensorrt' can be "
                             "allowed to use them.")
        if not artefact.is_file():
            raise UsageError(f"There is no ONNX file '{artefact}'.")
        options = ort.SessionOptions()
        options.intra_op_num_threads = chosen["threads"]
        options.log_severity_level = 4
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _LEVELS[chosen["optimization"]])
        wanted = PROVIDERS[chosen["provider"]]
        if wanted not in ort.get_available_providers():
            raise NmsparseError(f"This ONNX Runtime has no '{wanted}'.",
                                f"pip install 'nmsparse-deploy[{_EXTRAS.get(chosen['provider'], 'onnx')}]'")
        try:
            session = ort.InferenceSession(str(artefact), options, providers=_providers(chosen))
        except Exception as error:
            raise NmsparseError(_why(error, artefact, wanted)) from error
        if session.get_providers()[0] != wanted:
            raise NmsparseError(f"ONNX Runtime was asked for '{wanted}' and silently took "
                                f"'{session.get_providers()[0]}'.")
        return cls(session, chosen, ort.__version__)

    def inspect(self) -> dict[str, Any]:
        """Return evidence; `sparse_kernels` is None where they were allowed: nothing here sees if one was chosen."""
        reason = "TensorRT was allowed to use sparse tactics, and this provider does not say which it chose" if (
            self._settings["sparse"]) else "no sparse GEMM kernels are in use here; the zeros are multiplied"
        return {"engine": "onnxruntime", "version": self._version,
                "requested": [PROVIDERS[self._settings["provider"]]], "providers": self._session.get_providers(),
                "threads": self._settings["threads"], "optimization": self._settings["optimization"],
                "sparse_kernels": None if self._settings["sparse"] else False, "reason": reason}

    def run(self, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Return outputs by name. Floating-point inputs are converted to the type of the graph's inputs."""
        feed = self._feed(batch)
        names = [value.name for value in self._session.get_outputs()]
        try:
            return dict(zip(names, self._session.run(names, feed)))
        except Exception as error:
            raise NmsparseError(f"ONNX Runtime could not run this batch: {first_line(error)}.") from error

    def bound(self, batch: Mapping[str, Tensor]) -> Callable[[], None]:
        """Return a call that runs `batch` with inputs and outputs where the provider works; it waits until all is done.

        It has run once already, so what cannot run is a `NmsparseError` here.
        """
        import onnxruntime as ort

        device = "cpu" if self._settings["provider"] == "cpu" else "cuda"
        binding = self._session.io_binding()
        for name, value in self._feed(batch).items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value, device, 0))
        for output in self._session.get_outputs():
            binding.bind_output(output.name, device)

        def call() -> None:
            try:
                self._session.run_with_iobinding(binding)
            except Exception as error:
                raise NmsparseError(f"ONNX Runtime could not run this batch: {first_line(error)}.") from error

        call()
        return call

    def _feed(self, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        missing, unknown = set(self._inputs) - set(batch), set(batch) - set(self._inputs)
        if missing or unknown:
            raise UsageError(f"The graph takes the inputs {', '.join(self._inputs)}, not {', '.join(batch) or 'none'}.")
        return {name: _as_input(value, self._inputs[name]) for name, value in batch.items()}


def _providers(chosen: Mapping[str, Any]) -> list[Any]:
    """Return what runs the graph, with its options, and for TensorRT what runs the nodes that it leaves."""
    if chosen["provider"] != "tensorrt":
        return [PROVIDERS[chosen["provider"]]]
    return [(PROVIDERS["tensorrt"], {"trt_sparsity_enable": chosen["sparse"]}), PROVIDERS["cuda"]]


def _as_input(value: Tensor, kind: str) -> np.ndarray:
    if isinstance(value, torch.Tensor):  # NumPy knows no bf16
        value = (value.float() if value.dtype == torch.bfloat16 else value).detach().cpu().numpy()
    wanted = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(double)": np.float64}.get(kind)
    return value.astype(wanted) if wanted and value.dtype != wanted and value.dtype.kind == "f" else value


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
