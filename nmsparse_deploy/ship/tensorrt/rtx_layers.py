"""The layer list that a verbose TensorRT-RTX build prints, as data.

One line a layer: `Name: ..., LayerType: gemm, Inputs: [ {Name: ..., Dimensions: [32,64], ..., Datatype: Half, ...}],
Constants: [...], Outputs: [...], TacticName: ..., StreamId: 0, Metadata: [ONNX Layer: node_a][ONNX Layer: node_b]`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

LISTED = ", LayerType: "
"""In the one message of a build log that lists the layers, and in no other."""
GEMM_KINDS = ("gemm", "runtime_fusion", "correlation")
"""What the compiler makes of matrix products: alone, with what surrounds them, and as convolutions."""


@dataclass(frozen=True)
class LayerTensor:
    """A tensor that a layer reads or writes."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class PlanLayer:
    """One layer of a plan."""

    name: str
    kind: str
    inputs: tuple[LayerTensor, ...]
    constants: tuple[LayerTensor, ...]
    outputs: tuple[LayerTensor, ...]
    tactic: str
    onnx_nodes: tuple[str, ...]

    @property
    def is_gemm(self) -> bool:
        return self.kind in GEMM_KINDS


_LINE = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), (?P<rest>.*)$")
_TENSOR = re.compile(
    r"\{ ?Name: (?P<name>.*?), Dimensions: \[(?P<shape>[\d,]*)\],.*?Datatype: (?P<dtype>\w+)"
)
_ONNX = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_TACTIC = re.compile(r"TacticName: (.*?), StreamId")


def layers(text: str) -> list[PlanLayer]:
    """Return the layers that a log message lists; lines of another form are not layers."""
    return [_layer(match) for line in text.splitlines() if (match := _LINE.match(line.strip()))]


def _layer(match: re.Match[str]) -> PlanLayer:
    rest = match["rest"]
    tactic = _TACTIC.search(rest)
    return PlanLayer(
        match["name"],
        match["kind"],
        _tensors(rest, "Inputs", "Constants"),
        _tensors(rest, "Constants", "Outputs"),
        _tensors(rest, "Outputs", "TacticName"),
        tactic[1] if tactic else "",
        tuple(_ONNX.findall(rest)),
    )


def _tensors(rest: str, start: str, stop: str) -> tuple[LayerTensor, ...]:
    """Return what lies between two headings of a line."""
    part = rest.partition(f"{start}: ")[2].partition(f"{stop}: ")[0]
    return tuple(
        LayerTensor(t["name"], tuple(int(n) for n in t["shape"].split(",") if n), t["dtype"])
        for t in _TENSOR.finditer(part)
    )
