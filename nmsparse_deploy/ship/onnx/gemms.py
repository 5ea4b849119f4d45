"""The multiplications of an ONNX graph as a compiler sees them: shape, type, what they read, what
they cost.

A GEMM of reduction length K and outputs N costs `2 K` FLOPs for every value of its output. Nodes
that read the same tensor are merged into one GEMM (q/k/v, gate/up), so they are a fusion group
here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.prove import OnnxGraph, WeightUse
from nmsparse_deploy.system.sparse_cores import SPARSE_TYPES

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, ValueInfoProto

    from nmsparse_deploy.ship.onnx import LinkMap

QUANTIZE = "QuantizeLinear"
SEE_THROUGH = (QUANTIZE, "DequantizeLinear", "Cast", "Identity")
"""Between a tensor and the GEMMs that read it, these do not keep a compiler from merging them."""


@dataclass(frozen=True)
class Gemm:
    """One multiplication by a stored weight."""

    node: str
    parameter: str | None
    """The pruned parameter that it holds, where a link map says so."""
    tensor: str
    k: int
    n: int
    dtype: str
    reads: str
    """The tensor that its fusion group reads."""
    flops: int | None
    """At the given input shapes; None where a shape could not be inferred."""

    @property
    def low_precision(self) -> bool:
        return self.dtype in SPARSE_TYPES


@dataclass(frozen=True)
class GraphInput:
    """An input of a graph. An axis is a number, or the name of an axis that may vary."""

    name: str
    shape: tuple[int | str, ...]


def graph_inputs(path: Path) -> tuple[GraphInput, ...]:
    """Return the inputs that a caller has to give."""
    graph = _load(path).graph
    stored = {tensor.name for tensor in graph.initializer}
    return tuple(
        GraphInput(
            value.name,
            tuple(
                d.dim_value if d.HasField("dim_value") else d.dim_param or "?"
                for d in value.type.tensor_type.shape.dim
            ),
        )
        for value in graph.input
        if value.name not in stored
    )


def fixed_shapes(
    inputs: Sequence[GraphInput], batch: int, length: int, given: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, ...]]:
    """Return the one shape of every input that an engine is built for: `given`, or `batch` for a
    free first axis and `length` for a free second axis of a matrix. Raises `UsageError` for an
    input that this does not settle.
    """
    unknown = sorted(set(given) - {value.name for value in inputs})
    if unknown:
        raise UsageError(
            f"The graph has no input '{unknown[0]}'; it has {', '.join(v.name for v in inputs)}."
        )
    return {value.name: _fixed(value, batch, length, given.get(value.name)) for value in inputs}


def _fixed(
    value: GraphInput, batch: int, length: int, given: Sequence[int] | None
) -> tuple[int, ...]:
    guesses: dict[int, int] = {0: batch, 1: length} if len(value.shape) == 2 else {0: batch}
    shape = (
        tuple(given)
        if given is not None
        else tuple(
            size if isinstance(size, int) else guesses.get(axis, 0)
            for axis, size in enumerate(value.shape)
        )
    )
    fits = len(shape) == len(value.shape) and all(
        size > 0 and (isinstance(wanted, str) or wanted == size)
        for size, wanted in zip(shape, value.shape)
    )
    if not fits:
        asked = "x".join(map(str, value.shape))
        raise UsageError(
            f"The input '{value.name}' has the shape {asked}, which {'x'.join(map(str, shape))} is not.",
            f"say --shape {value.name}={asked} with numbers for the names",
        )
    return shape


def gemms(
    path: Path, link: LinkMap | None, shapes: Mapping[str, Sequence[int]]
) -> tuple[Gemm, ...]:
    """Return every multiplication by a stored weight that sums over something, in the order of the
    nodes, with FLOPs at the input `shapes`."""
    graph = OnnxGraph(path)
    model = _load(path)
    parameters = {row.node: row.parameter for row in link.rows} if link else {}
    sizes, reads = _sizes(model, shapes), _reads(model.graph)
    outputs = {
        _name(node.name, node.output): node.output[0] for node in model.graph.node if node.output
    }
    products = []
    for use in graph.uses:
        if (
            use.k == 1 and use.op != "Conv"
        ):  # an outer product, such as the angles of rotary positions
            continue
        size = sizes.get(outputs.get(use.node, ""))
        products.append(
            Gemm(
                use.node,
                parameters.get(use.node),
                use.tensor,
                use.k,
                use.n,
                _computed_in(use),
                reads.get(use.node, use.node),
                None if size is None else 2 * _reduction(use) * size,
            )
        )
    return tuple(products)


def _computed_in(use: WeightUse) -> str:
    """Return the type of the product: a float weight behind Q and DQ is multiplied as 8-bit
    integers."""
    return "I8" if QUANTIZE in use.path else use.dtype


def _reduction(use: WeightUse) -> int:
    return math.prod(use.shape[1:]) if use.op == "Conv" else use.k


def _name(name: str, outputs: Sequence[str]) -> str:
    return name or outputs[0]


def _reads(graph: GraphProto) -> dict[str, str]:
    """Return by node the computed tensor that it multiplies, followed back through what compilers
    see through."""
    constant = {tensor.name for tensor in graph.initializer}
    origin: dict[str, str] = {}
    reads: dict[str, str] = {}
    for node in graph.node:
        computed = [name for name in node.input if name and name not in constant]
        if not computed:
            constant.update(node.output)
            continue
        if node.op_type in SEE_THROUGH:
            origin[node.output[0]] = origin.get(computed[0], computed[0])
        reads[_name(node.name, node.output)] = origin.get(computed[0], computed[0])
    return reads


def _sizes(model: ModelProto, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Count the values of every tensor whose shape follows from the input shapes: what the exporter
    noted, with numbers for the names of free axes, and what ONNX's shape inference finds."""
    import onnx

    named: dict[str, int] = {}
    for value in model.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, shapes.get(value.name, ())):
            named |= {dim.dim_param: size} if dim.dim_param else {}
            dim.dim_value = size  # a oneof: this clears the name
    noted = _known([*model.graph.value_info, *model.graph.output], named)
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except Exception:  # the inference refuses operators that it does not know
        return noted
    return _known([*inferred.value_info, *inferred.output], {}) | noted


def _known(values: Iterable[ValueInfoProto], named: Mapping[str, int]) -> dict[str, int]:
    known = {}
    for value in values:
        shape = value.type.tensor_type.shape
        sizes = [
            d.dim_value if d.HasField("dim_value") else _product(d.dim_param, named)
            for d in shape.dim
        ]
        if value.type.tensor_type.HasField("shape") and all(size is not None for size in sizes):
            known[value.name] = math.prod(size for size in sizes if size is not None)
    return known


def _product(text: str, named: Mapping[str, int]) -> int | None:
    """Read `batch` or `batch*sequence` as a number."""
    parts = [named.get(part, int(part) if part.isdecimal() else None) for part in text.split("*")]
    return None if None in parts else math.prod(part for part in parts if part is not None)


def _load(path: Path) -> ModelProto:
    import onnx

    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf raises types of its own
        raise UsageError(
            f"'{path}' is not an ONNX model, or it is damaged ({str(error)[:120]})."
        ) from error
