"""What is done to the graph file after the exporter: real numbers for constant axes, no traces of this machine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckFailed
from .link import BAKE

if TYPE_CHECKING:
    import onnx

KEPT_METADATA = ("pkg.torch.onnx.name_scopes", "pkg.torch.onnx.class_hierarchy")
_CARRIERS = {"Transpose", "Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
_GEMMS = {"MatMul", "Gemm", "Conv"}


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of the graph. An axis is a number, or the name of an axis that may vary."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def tidy(path: Path) -> onnx.ModelProto:
    """Rewrite the graph file (its weights stay where they are) and return it without its weights."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    fix_numeric_dims(model)
    strip_metadata(model)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return model


def fix_numeric_dims(model: onnx.ModelProto) -> int:
    """Symbolic axes that are *named* "32" become the number 32, or a compiler takes them for dynamic ones.

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
    """Drop stack traces (paths of the exporting machine, most of the graph's size); keep each node's module path."""
    for node in model.graph.node:
        kept = [prop for prop in node.metadata_props if prop.key in KEPT_METADATA]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
        node.doc_string = ""
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""


def refuse_masked_weights(model: onnx.ModelProto) -> None:
    """Raise `CheckFailed` if a GEMM's weight is the product of two stored tensors, for then the stored one is dense.

    A factor with a single axis (a scale per channel) keeps the pattern and is allowed.
    """
    constants = _constants(model)
    producers = {out: node for node in model.graph.node for out in node.output}
    for gemm in model.graph.node:
        if gemm.op_type not in _GEMMS:
            continue
        for operand in gemm.input[:2]:
            node = producers.get(operand)
            while node is not None and node.op_type in _CARRIERS:
                node = producers.get(node.input[0])
            if node is None or node.op_type not in ("Mul", "Where"):
                continue
            if sum(_is_matrix(_behind(name, producers, constants)) for name in node.input) > 1:
                raise CheckFailed(f"The ONNX node '{node.name}' still applies a mask to the weight of '{gemm.name}', "
                                  "so the stored weight is dense.", BAKE)


def _constants(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shapes of everything stored."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            shapes |= {node.output[0]: tuple(a.t.dims) for a in node.attribute if a.name == "value"}
    return shapes


def _behind(name: str, producers: dict[str, Any], constants: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Shape of the stored tensor that a value comes from through casts and transposes; () if it is computed."""
    while name not in constants and name in producers and producers[name].op_type in _CARRIERS:
        name = producers[name].input[0]
    return constants.get(name, ())


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return sum(length > 1 for length in shape) >= 2


def tensor_specs(values: Iterable[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    import onnx

    specs = []
    for value in values:
        tensor = value.type.tensor_type
        dtype = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
        shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
        specs.append(TensorSpec(value.name, dtype, shape))
    return tuple(specs)


def dynamic_dims(*specs: Iterable[TensorSpec]) -> tuple[str, ...]:
    """Names of the axes that may vary, in order of appearance."""
    names = [axis for group in specs for spec in group for axis in spec.shape if isinstance(axis, str)]
    return tuple(dict.fromkeys(names))
