"""Compute the small constants of an ONNX graph (shapes, axes, indices, scales, zero points) when
they are asked for, and the shapes of run-time values. Bounded: what would be large stays unknown."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.prove.onnx_file import subgraphs
from nmsparse_deploy.prove.onnx_tensor import BITS, decode, dtype_name
from nmsparse_deploy.prove.onnx_values import STANDARD, constant_tensor, entry_of, squeezed

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

MAX_VALUES = 1 << 20
MAX_DEPTH = 32
MAX_INFERRED = 1 << 30
"""Bytes of a model whose shapes are inferred."""
_ELEMENTWISE = """
Abs Add And BitwiseAnd BitwiseNot BitwiseOr Cast CastLike Ceil Div Equal Exp Floor Greater Identity
Less Log Max Min Mod Mul Neg Not Or Pow Reciprocal Round Sign Sqrt Sub Where"""
_MOVING = """
Concat Flatten Gather ReduceMax ReduceMin ReduceProd ReduceSum Reshape Slice Squeeze Transpose
Unsqueeze"""
ELEMENTWISE, MOVING = frozenset(_ELEMENTWISE.split()), frozenset(_MOVING.split())
"""What is computed."""

Shape = tuple[int | None, ...]
Makers = ChainMap[str, "TensorProto | NodeProto | np.ndarray | None"]


class Constants:
    """The constants in sight of the graph that is being read, computed on demand."""

    def __init__(
        self, folder: Path, opset: int, shape: Callable[[str], tuple[int | None, ...] | None]
    ) -> None:
        self.folder, self.opset, self.shape = folder, opset, shape
        self.makers: Makers = ChainMap()
        """Name -> the tensor or the node that gives it; the value, once it is computed."""

    def value(self, name: str, depth: int = 0) -> np.ndarray | None:
        """Return a constant; None when it depends on the inputs, is large, or could not be
        computed."""
        scope = next((scope for scope in self.makers.maps if name in scope), None)
        if scope is None or depth > MAX_DEPTH:
            return None
        maker = scope[name]
        if maker is None or isinstance(maker, np.ndarray):
            return maker
        scope[name] = None  # what is asked for while it is computed would depend on itself
        made = scope[name] = self._made(maker, depth)
        return made

    def _made(self, maker: TensorProto | NodeProto, depth: int) -> np.ndarray | None:
        if not hasattr(maker, "op_type"):
            size = math.prod(maker.dims)
            known = 0 <= size <= MAX_VALUES and dtype_name(maker) in BITS
            return decode(maker, self.folder) if known else None
        if maker.domain not in STANDARD or any(subgraphs(maker)):
            return None
        try:
            with np.errstate(all="ignore"):
                return self._run(maker, depth)
        except UsageError:
            raise
        except Exception:  # a reference operator raises whatever its NumPy code meets
            return None

    def _run(self, node: NodeProto, depth: int) -> np.ndarray | None:
        if node.op_type == "Constant":
            tensor = constant_tensor(node)
            return None if tensor is None else self._made(tensor, depth)
        if node.op_type in ("Shape", "Size"):
            return self._shape_of(node)
        inputs = [self.value(name, depth + 1) for name in node.input if name]
        if any(array is None for array in inputs) or not inputs:
            return None
        arrays = [array for array in inputs if array is not None]
        if node.op_type == "ConstantOfShape":
            fill = entry_of(node, "value")
            value = decode(fill.t, self.folder) if fill is not None else np.zeros(1, np.float32)
            return np.broadcast_to(value.reshape(-1)[:1].reshape(()), _sizes(arrays[0]))
        if node.op_type == "Expand":
            shape = np.broadcast_shapes(arrays[0].shape, _sizes(arrays[1]))
            return np.broadcast_to(arrays[0], shape)
        if node.op_type in ELEMENTWISE:
            small = [squeezed(array) for array in arrays]
            if math.prod(np.broadcast_shapes(*(array.shape for array in small))) > MAX_VALUES:
                return None
            whole = np.broadcast_shapes(*(array.shape for array in arrays))
            return np.broadcast_to(self._evaluate(node, small), whole)
        if node.op_type in MOVING and sum(array.size for array in arrays) <= MAX_VALUES:
            enlarged = math.prod(max(1, array.size) for array in arrays[:2])
            if node.op_type == "Gather" and enlarged > MAX_VALUES:
                return None
            return self._evaluate(node, arrays)
        return None

    def _evaluate(self, node: NodeProto, arrays: list[np.ndarray]) -> np.ndarray:
        """Run one node in ONNX's reference implementation."""
        from onnx.reference import ReferenceEvaluator

        names = [name for name in node.input if name]
        evaluator = ReferenceEvaluator(node, opsets={"": self.opset})
        outputs: Sequence[object] = evaluator.run(None, dict(zip(names, arrays)))  # type: ignore[assignment]
        return np.asarray(outputs[0])

    def _shape_of(self, node: NodeProto) -> np.ndarray | None:
        shape = self.shape(node.input[0])
        if shape is None or None in shape:
            return None
        sizes = np.array(shape, np.int64).reshape(-1)
        if node.op_type == "Size":
            return np.array(math.prod(size or 0 for size in shape))
        start, end = (entry_of(node, name) for name in ("start", "end"))
        return sizes[start.i if start is not None else 0 : end.i if end is not None else None]


def _sizes(shape: np.ndarray) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in shape.reshape(-1)[:16])
    if shape.size > 16 or math.prod(sizes) > 1 << 40:
        raise ValueError("too large")
    return sizes


def inferred_shapes(model: ModelProto) -> list[dict[str, Shape]]:
    """Return the shapes that ONNX infers, by name, for the graph and the graphs in it, in the order
    of `graphs_of`."""
    import onnx

    if sum(node.ByteSize() for node in model.graph.node) > MAX_INFERRED:
        return []
    bare = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    graph = bare.graph
    graph.name = model.graph.name or "graph"
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.value_info.extend(model.graph.value_info)
    graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        if tensor.ByteSize() <= 4096:
            graph.initializer.append(tensor)
        else:
            graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    with suppress(Exception):  # the inference raises types of its own for what it does not know
        bare = onnx.shape_inference.infer_shapes(bare)
    return [_shapes(inner) for inner in graphs_of(bare.graph)]


def graphs_of(graph: GraphProto) -> Iterator[GraphProto]:
    """Yield a graph, and the graphs in it, in the order in which they are read."""
    yield graph
    for node in graph.node:
        for _, inner in subgraphs(node):
            yield from graphs_of(inner)


def _shapes(graph: GraphProto) -> dict[str, Shape]:
    return {
        value.name: tuple(
            int(d.dim_value) if d.HasField("dim_value") else None
            for d in value.type.tensor_type.shape.dim
        )
        for value in (*graph.value_info, *graph.input, *graph.output)
        if value.type.tensor_type.HasField("shape")
    }
