"""Every place where an ONNX graph multiplies by a constant weight, and which axis of the stored
tensor it reduces.

Values made from stored tensors are followed forwards, node by node in the order of the file,
through the operators that keep zeros where they are; what reaches an operator that multiplies and
sums is a weight use, and what does so on a way that is not followed is said to.
"""

from __future__ import annotations

import ast
from collections import ChainMap, Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.prove.onnx_file import load_model, subgraphs
from nmsparse_deploy.prove.onnx_fold import Constants, Shape, inferred_shapes
from nmsparse_deploy.prove.onnx_follow import carried, follow, zero_pointed
from nmsparse_deploy.prove.onnx_readers import READERS, Operand, operands
from nmsparse_deploy.prove.onnx_tensor import decode, dtype_name
from nmsparse_deploy.prove.onnx_values import (
    MAX_NESTED,
    MAX_PARTS,
    MAX_PATH,
    STANDARD,
    Opaque,
    Several,
    Stored,
    Value,
    ZeroPoint,
    constant_tensor,
    dims,
    is_matrix,
    is_selected,
    label_of,
    length_of,
    lost,
    number,
    numbers,
    rank_of,
)

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

SCOPES = "pkg.torch.onnx.name_scopes"


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
    doubts: tuple[str, ...] = ()
    """The same, if the weight is meant to be sparse."""
    blind: str = ""
    """Why it is not known which stored values mean zero."""
    start: int = 0
    """Where the weight begins along the reduction axis, when it is joined to others there."""
    picks: tuple[np.ndarray | None, ...] = field(default=(), compare=False)
    """By stored axis: the places that the node multiplies by, where these are not all."""
    zero: ZeroPoint | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Untraced:
    """Constant weights whose stored tensor could not be tied to the reduction axis."""

    node: str
    op: str
    tensor: str
    reason: str
    others: tuple[str, ...] = ()
    """Matrices that went into the same value."""


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
        self._shared: Counter[str] = Counter()
        self._values: ChainMap[str, Value | None] = ChainMap()
        self._model = load_model(path)
        opset = max(
            (o.version for o in self._model.opset_import if o.domain in STANDARD), default=1
        )
        self._constants = Constants(self.folder, opset, self.shape)
        self._graphs: list[int] = []
        """The numbers of the graphs that are being read, the outermost first."""
        self._count = 0
        self._walk(self._model.graph, "")

    @property
    def folder(self) -> Path:
        """Where external data lies."""
        return self.path.parent

    def read(self, tensor: str) -> np.ndarray:
        """Return a stored tensor, decoded, in memory."""
        if tensor not in self.tensors:
            raise UsageError(f"'{self.path}' has no tensor '{tensor}'.")
        return decode(self.tensors[tensor], self.folder)

    # --- what a node asks about its inputs ---

    def constant(self, name: str) -> np.ndarray | None:
        """Return a small value that does not depend on the inputs of the model."""
        return self._constants.value(name)

    def shape(self, name: str) -> Shape | None:
        """Return the shape of a value, as far as it is known."""
        value = self._values.get(name)
        if isinstance(value, Stored):
            return value.shape
        for number_of_graph in reversed(self._graphs):
            if number_of_graph < len(self._inferred) and name in self._inferred[number_of_graph]:
                return self._inferred[number_of_graph][name]
        return None

    @cached_property
    def _inferred(self) -> list[dict[str, Shape]]:
        return inferred_shapes(self._model)

    # --- graphs ---

    def _walk(
        self, graph: GraphProto, where: str, bound: Sequence[Value | None] = ()
    ) -> list[Value | None]:
        """Read one graph; return the values of its outputs. `where` names the node and attribute
        that hold it, `bound` gives the values of its inputs."""
        self._graphs.append(self._count)
        self._count += 1
        for i, given in enumerate(graph.input if where else ()):
            self._values[given.name] = bound[i] if i < len(bound) else None
            self._constants.makers[given.name] = None
        for tensor in graph.initializer:
            self._store(tensor, tensor.name, where)
        for sparse in graph.sparse_initializer:
            name = sparse.values.name
            self._values[name] = Opaque((name,), "is stored in ONNX's sparse format")
        for node in graph.node:
            self._step(node, where)
        self._graphs.pop()
        return [self._values.get(output.name) for output in graph.output]

    def _inner(
        self, node: NodeProto, name: str, graph: GraphProto, bound: Sequence[Value | None]
    ) -> list[Value | None]:
        """Read a graph that a node holds; its names are its own."""
        values, makers = self._values, self._constants.makers
        self._values, self._constants.makers = values.new_child(), makers.new_child()
        results = self._walk(graph, f"{node.name or node.op_type}.{name}", bound)
        self._values, self._constants.makers = values, makers
        return results

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
            same = self._shared[name]
            self._shared[name] += 1
            label = f"{name}@{where}" + (f"#{same}" if same else "")
            self.plain[label] = name
        shape = tuple(tensor.dims)
        none = (None,) * len(shape)
        self._claim(name, Stored(label, shape, tuple(range(len(shape))), none))
        self.tensors[label] = tensor
        self._constants.makers[name] = tensor

    def _constant_node(self, node: NodeProto, where: str) -> None:
        tensor = constant_tensor(node)
        for name in node.output[:1]:
            if tensor is None:
                self._claim(name, Opaque((name,), "is a constant of a kind that is no tensor"))
            else:
                self._store(tensor, name, where)

    def _step(self, node: NodeProto, where: str) -> None:
        if node.domain in STANDARD and node.op_type == "Constant":
            return self._constant_node(node, where)
        inputs = [self._values.get(name) if name else None for name in node.input]
        inner = [(name, graph) for name, graph in subgraphs(node)]
        results: list[Value | None] = []
        if inner:
            results = self._controlled(node, inputs, inner)
        for name in node.output:
            if name:
                self._claim(name)
                self._constants.makers[name] = node if name == node.output[0] else None
        for operand in operands(node, inputs, self):
            self._use(node, operand)
        if not inner:
            results = self._follow(node, inputs)
        self._values.update((name, value) for name, value in zip(node.output, results) if name)

    def _follow(self, node: NodeProto, inputs: Sequence[Value | None]) -> list[Value | None]:
        """Return what the node makes of constants, by output; None for what is computed at run
        time."""
        followed = follow(node, inputs, self)
        if isinstance(followed, list):
            return [self._bounded(value) for value in followed]
        if followed is not None:
            return [self._bounded(followed)]
        constant = [value for value, name in zip(inputs, node.input) if name]
        if not constant or any(is_selected(value) for value in constant):
            moved = carried(node, inputs, self)
            return [moved for _ in node.output]
        # A product of constants is like an activation; its factors have rows of their own.
        product = (node.domain if node.domain not in STANDARD else "", node.op_type) in READERS
        reason = f"passes through {node.op_type}"
        return [lost(constant, self, reason, product) for _ in node.output]

    def _bounded(self, value: Value) -> Value:
        if isinstance(value, Stored) and len(value.path) > MAX_PATH:
            return lost(
                [value], self, f"passes through more than {MAX_PATH} operators", value.selected
            )
        if isinstance(value, Several) and (value.count > MAX_PARTS or value.depth > MAX_NESTED):
            return lost([value], self, "is joined to too many others", value.selected)
        return value

    # --- control flow ---

    def _controlled(
        self,
        node: NodeProto,
        inputs: Sequence[Value | None],
        inner: Sequence[tuple[str, GraphProto]],
    ) -> list[Value | None]:
        """Read the graphs of a node; return the values of its outputs that are constant."""
        if node.op_type not in ("Loop", "Scan"):
            branches = [self._inner(node, name, graph, ()) for name, graph in inner]
            if node.op_type != "If":
                return []
            return [_either([value for value in values if value]) for values in zip(*branches)]
        (name, graph), *rest = inner
        for other, unused in rest:
            self._inner(node, other, unused, ())
        if node.op_type == "Loop":
            return self._loop(node, name, graph, inputs[2:], [None, None], [], 1)
        scanned = min(max(0, number(node, "num_scan_inputs")), len(inputs))
        axes = numbers(node, "scan_input_axes") or [0] * scanned
        stacks = list(inputs[len(inputs) - scanned :])
        slices = [_slices(value, axis) for value, axis in zip(stacks, axes)]
        return self._loop(node, name, graph, inputs[: len(inputs) - scanned], [], slices, 0)

    def _loop(
        self,
        node: NodeProto,
        name: str,
        graph: GraphProto,
        states: Sequence[Value | None],
        before: Sequence[Value | None],
        after: Sequence[Value | None],
        skipped: int,
    ) -> list[Value | None]:
        """Read a body whose inputs are `before`, the states and `after`. A state that it hands
        through stays what it is; `skipped` outputs come before the states."""
        carried = f"is carried from step to step by a {node.op_type}"
        bound: list[Value | None] = []
        for i, state in enumerate(states):
            fixed = _handed_through(graph, len(before) + i, skipped + i)
            bound.append(state if fixed or state is None else lost([state], self, carried, True))
        results = self._inner(node, name, graph, [*before, *bound, *after])[skipped:]
        made = [
            None if value is None else lost([value], self, f"passes through a {node.op_type}", True)
            for value in results
        ]
        return [
            bound[i]
            if i < len(bound) and _handed_through(graph, len(before) + i, skipped + i)
            else m
            for i, m in enumerate(made)
        ]

    # --- uses ---

    def _use(self, node: NodeProto, operand: Operand) -> None:
        found: list[WeightUse] = []
        self._part(node, operand, operand.value, 0, found)
        self.uses += _merged(found)

    def _part(
        self, node: NodeProto, operand: Operand, value: Value, start: int, found: list[WeightUse]
    ) -> None:
        """Add the uses of a value that begins at `start` of the reduction axis."""
        reason = operand.unknown or (value.reason if isinstance(value, Opaque) else "")
        if isinstance(value, Several):
            rank = rank_of(value) or 0
            axis = operand.axis - rank if operand.axis >= 0 else operand.axis
            for part in value.parts:
                self._part(node, operand, part, start, found)
                start += length_of(part, axis) if axis == value.axis else 0
            return None
        if isinstance(value, Opaque):
            return self._lose(node, value.tensors, reason)
        axis, rank = operand.axis, len(value.shape)
        if not reason and not -rank <= axis < rank:
            return None  # not a shape that the operator takes
        if not reason and operand.zero:
            value = zero_pointed(value, operand.zero, operand.zero_axes, self)
        origin = value.origin[axis] if not reason else None
        if origin is None:
            mixed = "is reshaped so that its reduction axis is mixed with another"
            return self._lose(node, (value.tensor,), reason or mixed)
        stored, n_axis = self.tensors[value.tensor], operand.n_axis
        n = value.shape[n_axis] if n_axis is not None and -rank <= n_axis < rank else 1
        found.append(
            WeightUse(
                label_of(node),
                node.op_type,
                value.tensor,
                origin,
                tuple(stored.dims),
                dtype_name(stored),
                value.shape[axis] // operand.groups,
                n,
                _scopes(node),
                value.path,
                value.problems,
                value.doubts,
                value.blind,
                start,
                value.picks if any(picks is not None for picks in value.picks) else (),
                value.zero,
            )
        )

    def _lose(self, node: NodeProto, tensors: Sequence[str], reason: str) -> None:
        first, *rest = tensors
        others = tuple(name for name in rest if is_matrix(dims(self, name)))
        self.untraced.append(Untraced(label_of(node), node.op_type, first, reason, others))


def _merged(uses: Sequence[WeightUse]) -> list[WeightUse]:
    """Join the parts of one tensor that were cut out and put together again, such as the gates of a
    recurrent layer in another order."""
    merged: list[WeightUse] = []
    for use in uses:
        for i, other in enumerate(merged):
            whole = _joined(other, use)
            if whole is not None:
                merged[i] = whole
                break
        else:
            merged.append(use)
    return merged


def _joined(first: WeightUse, second: WeightUse) -> WeightUse | None:
    plain = first.picks and second.picks and first.zero is None and second.zero is None
    if not plain or first != replace(second, n=first.n):
        return None
    differ = [
        axis
        for axis, (a, b) in enumerate(zip(first.picks, second.picks))
        if not (a is b or (a is not None and b is not None and np.array_equal(a, b)))
    ]
    if len(differ) != 1 or differ[0] == first.axis:
        return None
    a, b = first.picks[differ[0]], second.picks[differ[0]]
    if a is None or b is None:
        return None
    places: np.ndarray | None = np.unique(np.concatenate([a, b]))
    if places is not None and places.size == first.shape[differ[0]]:
        places = None
    picks = (*first.picks[: differ[0]], places, *first.picks[differ[0] + 1 :])
    any_left = any(place is not None for place in picks)
    return replace(first, n=first.n + second.n, picks=picks if any_left else ())


def _either(values: Sequence[Value]) -> Value | None:
    """Return the value of an If's output: one of the constants that its branches give."""
    parts = [
        part
        for value in values
        for part in (value.parts if isinstance(value, Several) else [value])
    ]
    if not parts:
        return None
    chosen = tuple(replace(part, selected=True) for part in parts)
    return Several(chosen, None, selected=True)


def _slices(value: Value | None, axis: int) -> Value | None:
    """Return what a Scan hands on of a stack: one slice after the other."""
    if not isinstance(value, Stored):
        return None if value is None else replace(value, selected=True)
    if not -len(value.shape) <= axis < len(value.shape):
        return Opaque((value.tensor,), "is scanned along an axis that it does not have")
    axis %= len(value.shape)
    return replace(
        value,
        shape=value.shape[:axis] + value.shape[axis + 1 :],
        origin=value.origin[:axis] + value.origin[axis + 1 :],
        in_order=False,
    ).then("Scan")


def _handed_through(graph: GraphProto, given: int, result: int) -> bool:
    """Tell whether an output of a body is one of its inputs, unchanged."""
    if given >= len(graph.input) or result >= len(graph.output):
        return False
    name, wanted = graph.input[given].name, graph.output[result].name
    return name == wanted or any(
        node.op_type == "Identity" and list(node.input) == [name] and wanted in node.output
        for node in graph.node
    )


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
