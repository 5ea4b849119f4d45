"""Every place where an ONNX graph multiplies by a constant weight, and which axis of the stored
tensor it reduces.

Values made from one stored tensor are followed forwards, node by node in the order of the file,
through the operators that keep zeros where they are; what reaches a MatMul, Gemm or Conv is a
weight use.
"""

from __future__ import annotations

import ast
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.prove.onnx_file import load_model, subgraphs
from nmsparse_deploy.prove.onnx_tensor import decode, dtype_name
from nmsparse_deploy.prove.onnx_values import FOLLOW, Opaque, Stored, Value, constant_tensor, number

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

SCOPES = "pkg.torch.onnx.name_scopes"
MAX_PATH = 64
STANDARD = ("", "ai.onnx")


@dataclass(frozen=True)
class WeightUse:
    """One multiplication by a stored weight. `axis` is the reduction axis in the layout of the
    stored tensor."""

    node: str
    op: str
    tensor: str
    axis: int
    shape: tuple[int, ...]
    """As stored."""
    dtype: str
    k: int
    n: int
    scopes: tuple[str, ...] = ()
    """Module paths, outermost first, as the exporter noted them on the node."""
    path: tuple[str, ...] = ()
    """Operators between the stored tensor and the node."""
    problems: tuple[str, ...] = ()
    """Why the stored values do not prove what the node multiplies by."""


@dataclass(frozen=True)
class Untraced:
    """A constant weight whose stored tensor could not be tied to the reduction axis."""

    node: str
    op: str
    tensor: str
    reason: str


class OnnxGraph:
    """A parsed model: its constant tensors, where each is used as a weight, and what could not be
    followed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, TensorProto] = {}
        self.uses: list[WeightUse] = []
        self.untraced: list[Untraced] = []
        self.plain: dict[str, str] = {}
        """The name in the file of a tensor that shares it with a tensor of another branch."""
        self._values: ChainMap[str, Value | None] = ChainMap()
        self._walk(load_model(path).graph, "")

    @property
    def folder(self) -> Path:
        """Where external data lies."""
        return self.path.parent

    def read(self, tensor: str) -> np.ndarray:
        """Return a stored tensor, decoded, in memory."""
        if tensor not in self.tensors:
            raise UsageError(f"'{self.path}' has no tensor '{tensor}'.")
        return decode(self.tensors[tensor], self.folder)

    def _walk(self, graph: GraphProto, where: str) -> list[Value | None]:
        """Read one graph; return the values of its outputs. `where` names the node and attribute
        that hold it."""
        for tensor in graph.initializer:
            self._store(tensor, tensor.name, where)
        for sparse in graph.sparse_initializer:
            self._values[sparse.values.name] = Opaque(
                sparse.values.name, "is stored in ONNX's sparse format"
            )
        for node in graph.node:
            for name, inner in subgraphs(node):
                outer, self._values = self._values, self._values.new_child()
                self._walk(inner, f"{node.name or node.op_type}.{name}")
                self._values = outer
            self._step(node, where)
        return [self._values.get(output.name) for output in graph.output]

    def _claim(self, name: str, value: Value | None = None) -> None:
        """Give a name its one value in this graph: names are local to a graph, and seen by the
        graphs in it."""
        if name in self._values:
            raise UsageError(
                f"'{self.path}' defines '{name}' twice, so it does not say which value a weight has."
            )
        self._values[name] = value

    def _store(self, tensor: TensorProto, name: str, where: str) -> None:
        label = name
        if name in self.tensors and name not in self._values:
            number = sum(other == name for other in self.plain.values())
            label = f"{name}@{where}" + (f"#{number}" if number else "")
            self.plain[label] = name
        shape = tuple(tensor.dims)
        self._claim(name, Stored(label, shape, tuple(range(len(shape)))))
        self.tensors[label] = tensor

    def _constant(self, node: NodeProto, where: str) -> None:
        tensor = constant_tensor(node)
        for name in node.output[:1]:
            if tensor is None:
                self._claim(name, Opaque(name, "is a constant of a kind that is no tensor"))
            else:
                self._store(tensor, name, where)

    def _step(self, node: NodeProto, where: str) -> None:
        if node.domain in STANDARD and node.op_type == "Constant":
            return self._constant(node, where)
        for name in node.output:
            if name:
                self._claim(name)
        if node.domain in STANDARD and node.op_type in _WEIGHTS:
            self._use(node)
        result = self._follow(node)
        if result is not None:
            self._values.update((name, result) for name in node.output if name)

    def _follow(self, node: NodeProto) -> Value | None:
        """Return what the node makes of constants; None when anything in it is computed at run
        time."""
        inputs = [self._values.get(name) if name else None for name in node.input]
        follow = FOLLOW.get(node.op_type) if node.domain in STANDARD else None
        if follow and inputs:
            followed = follow(node, inputs, lambda value: self.tensors[value.tensor], self.folder)
            if isinstance(followed, Stored) and len(followed.path) > MAX_PATH:
                return Opaque(followed.tensor, f"passes through more than {MAX_PATH} operators")
            if followed is not None:
                return followed
        first = next((value for value in inputs if value is not None), None)
        if first is not None and all(
            value is not None or not name for value, name in zip(inputs, node.input)
        ):
            reason = first.reason if isinstance(first, Opaque) else f"passes through {node.op_type}"
            return Opaque(first.tensor, reason)
        return None

    def _use(self, node: NodeProto) -> None:
        for value, axis, n_axis in _WEIGHTS[node.op_type](node, self._values):
            name = node.name or (node.output[0] if node.output else "")
            if isinstance(value, Opaque):
                self.untraced.append(Untraced(name, node.op_type, value.tensor, value.reason))
                continue
            origin = value.origin[axis]
            if origin is None:
                self.untraced.append(
                    Untraced(
                        name,
                        node.op_type,
                        value.tensor,
                        "is reshaped so that its reduction axis is mixed with another",
                    )
                )
                continue
            stored = self.tensors[value.tensor]
            self.uses.append(
                WeightUse(
                    name,
                    node.op_type,
                    value.tensor,
                    origin,
                    tuple(stored.dims),
                    dtype_name(stored),
                    value.shape[axis],
                    value.shape[n_axis] if n_axis is not None else 1,
                    _scopes(node),
                    value.path,
                    value.problems,
                )
            )


Values = Mapping[str, Value | None]
Operands = Iterable[tuple[Value, int, int | None]]
"""(value, its reduction axis, the axis of the outputs)."""


def _ranked(value: Value | None, min_rank: int, max_rank: int = 64) -> bool:
    return isinstance(value, Opaque) or (
        isinstance(value, Stored) and min_rank <= len(value.shape) <= max_rank
    )


def _inputs(node: NodeProto, values: Values) -> list[Value | None]:
    return [values.get(name) for name in node.input[:2]] + [None] * (2 - len(node.input[:2]))


def _matmul(node: NodeProto, values: Values) -> Operands:
    a, b = _inputs(node, values)
    if b is not None and _ranked(b, 1):
        vector = isinstance(b, Stored) and len(b.shape) == 1
        yield (b, 0, None) if vector else (b, -2, -1)
    if a is not None and _ranked(a, 1):
        vector = isinstance(a, Stored) and len(a.shape) == 1
        yield (a, 0, None) if vector else (a, -1, -2)


def _gemm(node: NodeProto, values: Values) -> Operands:
    a, b = _inputs(node, values)
    if b is not None and _ranked(b, 2, 2):
        yield (b, 1, 0) if number(node, "transB") else (b, 0, 1)
    if a is not None and _ranked(a, 2, 2):
        yield (a, 0, 1) if number(node, "transA") else (a, 1, 0)


def _conv(node: NodeProto, values: Values) -> Operands:
    weight = _inputs(node, values)[1]
    if weight is not None and _ranked(weight, 3):
        yield weight, 1, 0


_WEIGHTS: dict[str, Callable[[NodeProto, Values], Operands]] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
}


def _scopes(node: NodeProto) -> tuple[str, ...]:
    """Read the module paths of a node: the exporter prints a Python list of strings; anything else
    says nothing."""
    text = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]")
    try:
        scopes = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return ()
    return tuple(s for s in scopes if isinstance(s, str)) if isinstance(scopes, list) else ()


def weight_uses(path: str | Path) -> list[WeightUse]:
    """Return every multiplication by a stored weight, in the order of the nodes."""
    return OnnxGraph(Path(path)).uses


def read_weight(path: str | Path, use: WeightUse) -> np.ndarray:
    """Return the stored tensor of a weight use, decoded. For many of them, keep one `OnnxGraph` and
    `read` it."""
    return OnnxGraph(Path(path)).read(use.tensor)
