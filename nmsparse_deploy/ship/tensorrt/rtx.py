"""TensorRT-RTX without a GPU: does the graph parse and compile, and what becomes of every GEMM?

Its compiler is the family of TensorRT's own and runs on any machine, and its verbose log lists the
layers of the plan. It chooses no kernels before it sees a GPU and never says whether one is sparse,
so the evidence for a layer ends at "compiles" here. A plan is never deserialised: without a GPU
that can end the process.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import Field

from nmsparse_deploy.errors import CheckFailed, MissingExtra, NmsparseError, UsageError
from nmsparse_deploy.ship.engine import (
    Engine,
    EngineSettings,
    Inspection,
    Recorded,
    Tensor,
    settings_of,
)
from nmsparse_deploy.ship.tensorrt.rtx_layers import LISTED, PlanLayer, layers

EXTRA = "trt-rtx"
PACKAGE = "tensorrt-rtx-cu13"
LEVEL = "compiles"
WIDE = "Float"


@dataclass(frozen=True)
class FusedGemm:
    """One GEMM of the plan. `nodes` are the ONNX nodes with a weight that it computes; several have
    been merged."""

    name: str
    kind: str
    nodes: tuple[str, ...]
    k: int
    n: int
    inputs: tuple[str, ...]
    """Data types of what it reads, the weight included."""
    outputs: tuple[str, ...]

    @property
    def eight_bit(self) -> bool:
        """Tell whether both operands and the result are 8 bits wide."""
        return all(kind in ("Int8", "FP8") for kind in (*self.inputs, *self.outputs))


@dataclass(frozen=True)
class Compiled:
    """A plan that the compiler made of one graph."""

    version: str
    plan_bytes: int
    sizes: dict[str, int]
    layers: int
    gemms: tuple[FusedGemm, ...]
    merged: tuple[tuple[str, ...], ...]
    """Groups of ONNX nodes that became one GEMM."""
    generated: tuple[str, ...]
    """ONNX nodes with a weight that became generated code: no matrix kernel, so no sparse one (a
    single row)."""
    lost: tuple[str, ...]
    """ONNX nodes with a weight that no layer of the plan names."""
    wide: tuple[str, ...]
    """ONNX nodes with a weight whose GEMM reads fp32 though the graph stores something narrower."""

    def to_json(self) -> Recorded:
        return {
            **asdict(self),
            "rung": LEVEL,
            "eight_bit_gemms": sum(gemm.eight_bit for gemm in self.gemms),
        }

    def summary(self) -> str:
        """Return what became of the graph in one sentence."""
        merged = (
            f", {len(self.merged)} of them merged from {sum(map(len, self.merged))}"
            if self.merged
            else ""
        )
        parts = [f"compiles to {len(self.gemms)} GEMMs{merged}"]
        parts += (
            [f"{len(self.generated)} products of one row became generated code"]
            if self.generated
            else []
        )
        parts += [f"{len(self.wide)} GEMMs read fp32 unexpectedly"] if self.wide else []
        parts += [f"{len(self.lost)} products are in no layer"] if self.lost else []
        return f"TensorRT-RTX {self.version} {'; '.join(parts)}"


class RtxSettings(EngineSettings):
    """Sizes that the axes which may vary are compiled for."""

    batch: int = Field(1, ge=1, description="samples per call")
    length: int = Field(128, ge=1, description="tokens per sample")
    past: int = Field(128, ge=1, description="tokens in the cache, where a graph has one")

    @property
    def sizes(self) -> dict[str, int]:
        """Return the length of every axis by its name."""
        return {
            "batch": self.batch,
            **dict.fromkeys(("sequence", "decoder_sequence", "text"), self.length),
            "past": self.past,
        }


class TensorRtRtx(Engine):
    """One compiled graph. It cannot run here; `inspect` tells what is in it."""

    name, title, label = "tensorrt-rtx", "TensorRT-RTX", "TensorRT-RTX"
    settings_type = RtxSettings

    def __init__(self, compiled: Compiled) -> None:
        self.compiled = compiled

    @classmethod
    def build(cls, artefact: Path, settings: Mapping[str, Any] | None = None) -> Self:
        """Parse and compile an ONNX file.

        Raises `CheckFailed` with TensorRT-RTX's own reason when it refuses the graph.
        """
        trt = load()
        if not artefact.is_file():
            raise UsageError(f"There is no ONNX file '{artefact}'.")
        sizes = settings_of(cls, RtxSettings, settings).sizes
        log = _Log.make(trt)
        builder = trt.Builder(log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(artefact)):
            raise CheckFailed(
                f"TensorRT-RTX cannot parse '{artefact}': {_first_error(parser, log.lines)}"
            )
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.add_optimization_profile(_profile(builder, network, artefact, sizes))
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise CheckFailed(
                f"TensorRT-RTX cannot compile '{artefact}': {_first_error(None, log.lines)}"
            )
        listed = [
            layer for _, message in log.lines if LISTED in message for layer in layers(message)
        ]
        if not listed:
            raise NmsparseError(
                f"TensorRT-RTX {trt.__version__} compiled '{artefact}' and listed no layers."
            )
        return cls(judge(artefact, listed, trt.__version__, plan.nbytes, sizes))

    def inspect(self) -> Inspection:
        facts = {
            name: value for name, value in self.compiled.to_json().items() if name != "version"
        }
        return Inspection(
            self.name,
            self.compiled.version,
            None,
            "compiled without a GPU, and kernels are chosen where the plan is loaded",
            {**facts, "summary": self.compiled.summary()},
        )

    def run(self, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Raise `NmsparseError`: a plan is compiled here, never loaded."""
        raise NmsparseError(
            "A TensorRT-RTX plan is only compiled here, never run.",
            "run the ONNX file in ONNX Runtime instead",
        )


def load() -> Any:
    """Import the library. Raises `MissingExtra`."""
    try:
        import tensorrt_rtx
    except ImportError as error:
        raise MissingExtra(PACKAGE, EXTRA, "Compiling with TensorRT-RTX") from error
    return tensorrt_rtx


def judge(
    artefact: Path, plan: Sequence[PlanLayer], version: str, plan_bytes: int, sizes: dict[str, int]
) -> Compiled:
    """Tie the layers of a plan to the multiplications by a stored weight in the graph it was made
    from."""
    from nmsparse_deploy.prove.onnx_graph import OnnxGraph

    uses = {use.node: use for use in OnnxGraph(artefact).uses if use.op != "Conv"}
    gemms: list[FusedGemm] = []
    seen: set[str] = set()
    wide: set[str] = set()
    mentioned = {node for layer in plan for node in layer.onnx_nodes if node in uses}
    for layer in (layer for layer in plan if layer.is_gemm):
        nodes = tuple(node for node in layer.onnx_nodes if node in uses)
        if not nodes:
            continue
        seen.update(nodes)
        # Scales of the product (alpha and beta) are single numbers in fp32, whatever is multiplied.
        operands = tuple(
            t.dtype
            for t in (*layer.inputs, *layer.constants)
            if t.size > 1 and t.dtype in _OPERANDS
        )
        gemms.append(
            FusedGemm(
                layer.name,
                layer.kind,
                nodes,
                max(uses[node].k for node in nodes),
                sum(uses[node].n for node in nodes),
                tuple(dict.fromkeys(operands)),
                tuple(dict.fromkeys(t.dtype for t in layer.outputs)),
            )
        )
        if WIDE in operands:
            wide.update(node for node in nodes if uses[node].dtype != "F32")
    merged = tuple(gemm.nodes for gemm in gemms if len(gemm.nodes) > 1)
    return Compiled(
        version,
        plan_bytes,
        sizes,
        len(plan),
        tuple(gemms),
        merged,
        tuple(sorted(mentioned - seen)),
        tuple(sorted(uses.keys() - mentioned)),
        tuple(sorted(wide)),
    )


_OPERANDS = ("Float", "Half", "BFloat16", "Int8", "FP8")


class _Log:
    """A logger that keeps every message; made late because its base class is TensorRT-RTX's."""

    @staticmethod
    def make(trt: Any) -> Any:
        class Log(trt.ILogger):
            def __init__(self) -> None:
                super().__init__()
                self.lines: list[tuple[str, str]] = []

            def log(self, severity: Any, message: str) -> None:
                self.lines.append((severity.name, message))

        return Log()


def _first_error(parser: Any, lines: Sequence[tuple[str, str]]) -> str:
    """Return TensorRT-RTX's own words for what went wrong, in one line."""
    errors = [parser.get_error(i) for i in range(parser.num_errors)] if parser else []
    reasons = [
        f"node '{error.node_name()}' ({error.node_operator()}): {error.desc()}" for error in errors
    ]
    reasons += [message for severity, message in lines if severity in ("ERROR", "INTERNAL_ERROR")]
    text = " ".join(next(iter(reasons), "no reason given").split())
    return text[:300] if text.endswith(".") else f"{text[:300]}."


def _profile(builder: Any, network: Any, artefact: Path, sizes: Mapping[str, int]) -> Any:
    """Return one narrow profile: every axis at its one size."""
    import onnx

    from nmsparse_deploy.ship.onnx.tidy import tensor_specs

    profile = builder.create_optimization_profile()
    graph = onnx.load(str(artefact), load_external_data=False).graph
    named = {spec.name: spec.shape for spec in tensor_specs(graph.input)}
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shape = tuple(size_of(axis, sizes, tensor.name) for axis in named[tensor.name])
        profile.set_shape(tensor.name, shape, shape, shape)
    return profile


def size_of(axis: int | str, sizes: Mapping[str, int], tensor: str) -> int:
    """Return the length of an axis: a number, a name, or a sum of them (`past + 1`). Raises
    `UsageError`."""
    if isinstance(axis, int):
        return axis
    total = 0
    for part in re.split(r"\s*\+\s*", axis.strip()):
        if not part.isdecimal() and part not in sizes:
            raise UsageError(
                f"Axis '{axis}' of the input '{tensor}' may vary, and no size was given for '{part}'."
            )
        total += int(part) if part.isdecimal() else sizes[part]
    return total
