"""Open an ONNX file as untrusted input: what is damaged, or grows without end, is refused in a
sentence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nmsparse_deploy.errors import MissingExtra, UsageError, first_line, from_os_error

if TYPE_CHECKING:
    from onnx import FunctionProto, GraphProto, ModelProto, NodeProto

MAX_NODES = 200_000
"""Nodes after every call of a local function is replaced by its body."""
MAX_BYTES = 1 << 28
"""And what they may take beyond the file itself."""
MAX_CALLS = 100
"""Functions that call each other, deep."""

Key = tuple[str, str, str]
Size = tuple[int, int]
"""Nodes and bytes."""


def load_model(path: Path) -> ModelProto:
    """Return the model without its external data, its local functions unfolded."""
    try:
        import onnx
        import onnx.inliner
    except ImportError as error:
        raise MissingExtra("onnx", "onnx", "Reading an ONNX model") from error
    try:
        if not path.is_file():
            raise UsageError(f"There is no ONNX model '{str(path)[:300]}'.")
    except OSError as error:
        raise from_os_error(error) from error
    try:
        model = onnx.load(str(path), format="protobuf", load_external_data=False)
        _refuse_bombs(path, model)
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
    except UsageError:
        raise
    except (
        Exception
    ) as error:  # protobuf and the inliner raise types of their own, which differ between versions
        raise UsageError(
            f"'{path}' is not an ONNX model, or it is damaged ({first_line(error)[:120]})."
        ) from error
    if not model.HasField("graph") or not model.graph.node:
        raise UsageError(f"'{path}' is not an ONNX model, or it is damaged (it has no graph).")
    return model


def _refuse_bombs(path: Path, model: ModelProto) -> None:
    """Raise `UsageError` when the local functions, unfolded, never end or would not fit: calls of
    calls multiply."""
    functions = {(f.domain, f.name, f.overload): f for f in model.functions}
    sizes: dict[Key, Size | None] = {}
    if not functions:
        return
    nodes, size = _unfolded(path, list(nodes_of_graph(model.graph)), functions, sizes, 0)
    if nodes > MAX_NODES or size > MAX_BYTES + model.ByteSize():
        raise UsageError(
            f"'{path}' has local functions that unfold to {nodes:.3g} nodes and {size:.3g} bytes, "
            "which is more than is read."
        )


def _unfolded(
    path: Path,
    nodes: list[NodeProto],
    functions: dict[Key, FunctionProto],
    sizes: dict[Key, Size | None],
    depth: int,
) -> Size:
    if depth > MAX_CALLS:
        raise UsageError(
            f"'{path}' has local functions that call each other more than {MAX_CALLS} deep."
        )
    count = size = 0
    for node in nodes:
        key = (node.domain, node.op_type, node.overload)
        if key not in functions:
            inner: Size = (1, node.ByteSize())
        elif key in sizes:
            known = sizes[key]
            if known is None:
                raise UsageError(
                    f"'{path}' has a local function '{node.op_type}' that calls itself."
                )
            inner = known
        else:
            sizes[key] = None
            body = [step for outer in functions[key].node for step in (outer, *_inside(outer))]
            inner = sizes[key] = _unfolded(path, body, functions, sizes, depth + 1)
        count, size = count + inner[0], size + inner[1]
    return count, size


def nodes_of_graph(graph: GraphProto) -> Iterator[NodeProto]:
    """Yield the nodes of a graph and of the graphs in it."""
    for node in graph.node:
        yield node
        yield from _inside(node)


def _inside(node: NodeProto) -> Iterator[NodeProto]:
    for _, graph in subgraphs(node):
        yield from nodes_of_graph(graph)


def subgraphs(node: NodeProto) -> Iterator[tuple[str, GraphProto]]:
    """Yield the graphs that a node holds, each with the name of its attribute."""
    for entry in node.attribute:
        if entry.HasField("g"):
            yield entry.name, entry.g
        for graph in entry.graphs:
            yield entry.name, graph
