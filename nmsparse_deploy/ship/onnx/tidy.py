"""What is done to the graph file after the exporter: real numbers for constant axes, no traces of
this machine."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nmsparse_deploy.errors import NmsparseError

if TYPE_CHECKING:
    import onnx

KEPT_METADATA = ("pkg.torch.onnx.name_scopes", "pkg.torch.onnx.class_hierarchy")


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of the graph. An axis is a number, or the name of an axis that may
    vary."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def tidy(path: Path) -> onnx.ModelProto:
    """Rewrite the graph file (its weights stay where they are) and return it without its
    weights."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    fix_numeric_dims(model)
    expand_rotary_tables(model)
    strip_metadata(model)
    refuse_illegal_types(model)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return model


def fix_numeric_dims(model: onnx.ModelProto) -> int:
    """Turn symbolic axes that are *named* "32" into the number 32, or a compiler takes them for
    dynamic ones.

    Returns how many there were.
    """
    fixed = 0
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param.strip().isdecimal():
                dim.dim_value = int(dim.dim_param)  # a oneof: this clears dim_param
                fixed += 1
    return fixed


def strip_metadata(model: onnx.ModelProto) -> None:
    """Drop stack traces (paths of the exporting machine, most of the graph's size); keep each
    node's module path."""
    for node in model.graph.node:
        kept = [prop for prop in node.metadata_props if prop.key in KEPT_METADATA]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
        node.doc_string = ""
    for value in (
        *model.graph.input,
        *model.graph.output,
        *model.graph.value_info,
        *model.graph.initializer,
    ):
        del value.metadata_props[:]
        value.doc_string = ""


def expand_rotary_tables(model: onnx.ModelProto) -> int:
    """Give `RotaryEmbedding` its tables with a full batch axis, which the operator asks for.

    The exporter's fusion leaves tables of batch 1, because the arithmetic it replaced broadcasts
    them; runtimes then refuse every other batch. It also computes the same table again for every
    layer; those are merged. Returns how many nodes were repaired.
    """
    from onnx import helper, numpy_helper

    producers = {out: node for node in model.graph.node for out in node.output}
    expanded: dict[Any, str] = {}
    nodes, shape, repaired = [], "", 0
    for node in model.graph.node:
        if node.op_type == "RotaryEmbedding" and not (len(node.input) > 3 and node.input[3]):
            if not shape:
                shape = "rotary_table_shape"
                ones = numpy_helper.from_array(np.ones(2, np.int64), "rotary_table_ones")
                model.graph.initializer.append(ones)
                nodes += [
                    helper.make_node(
                        "Shape", [node.input[0]], ["rotary_batch"], "rotary_batch", start=0, end=1
                    ),
                    helper.make_node("Concat", ["rotary_batch", ones.name], [shape], shape, axis=0),
                ]
            for slot in (1, 2):
                table = node.input[slot]
                made = producers.get(table)
                key = (
                    (made.op_type, *made.input)
                    if made is not None and not made.attribute
                    else table
                )
                if key not in expanded:
                    expanded[key] = f"{table}_full_batch"
                    nodes.append(
                        helper.make_node("Expand", [table, shape], [expanded[key]], expanded[key])
                    )
                node.input[slot] = expanded[key]
            repaired += 1
        nodes.append(node)
    used = {name for node in nodes for name in node.input} | {
        value.name for value in model.graph.output
    }
    repeated = {key[0] for key in expanded if isinstance(key, tuple)}
    nodes = [
        node
        for node in nodes
        if node.op_type not in repeated or any(name in used for name in node.output)
    ]
    if repaired:
        kept = [copy.deepcopy(node) for node in nodes]
        del model.graph.node[:]
        model.graph.node.extend(kept)
    return repaired


def refuse_illegal_types(model: onnx.ModelProto) -> None:
    """Raise `NmsparseError` for a weight type that the operator has only in a later opset (a bf16
    Conv before 22)."""
    import onnx

    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.domain or not onnx.defs.has(node.op_type):
            continue
        formal = onnx.defs.get_schema(node.op_type, opset).inputs
        for name, slot in zip(node.input, formal):
            kind = onnx.TensorProto.DataType.Name(kinds[name]).lower() if name in kinds else ""
            if kind and f"tensor({kind})" not in slot.types:
                raise NmsparseError(
                    f"ONNX opset {opset} has no {node.op_type} for {kind}, which '{node.name}' needs.",
                    "export with a later opset (--opset 23) or another precision",
                )


def tensor_specs(values: Iterable[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    import onnx

    specs = []
    for value in values:
        tensor = value.type.tensor_type
        dtype = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
        shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
        specs.append(TensorSpec(value.name, dtype, shape))
    return tuple(specs)


def fixed_axes(specs: Iterable[TensorSpec], asked: Mapping[str, Collection[int]]) -> list[str]:
    """Return sentences about axes that were asked to vary and came out as a number, and inputs that
    are gone: both happen without a word from the tracer."""
    by_name = {spec.name: spec for spec in specs}
    gone = [
        f"The graph has no input '{name}': the model ignores it."
        for name in asked
        if name not in by_name
    ]
    fixed = [
        (name, axis, spec.shape[axis])
        for name, spec in by_name.items()
        for axis in asked.get(name, ())
    ]
    return gone + [
        f"Axis {axis} of the input '{name}' cannot vary: tracing fixed it to {length}."
        for name, axis, length in fixed
        if isinstance(length, int)
    ]


def dynamic_dims(*specs: Iterable[TensorSpec]) -> tuple[str, ...]:
    """Return names of the axes that may vary, in order of appearance."""
    names = [
        axis for group in specs for spec in group for axis in spec.shape if isinstance(axis, str)
    ]
    return tuple(dict.fromkeys(names))
