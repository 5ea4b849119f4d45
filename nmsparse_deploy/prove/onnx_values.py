"""Operators that a stored tensor may pass through on its way to a multiplication, and what they do
to its axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.prove.onnx_tensor import any_nonzero, decode, dtype_name

if TYPE_CHECKING:
    from onnx import AttributeProto, NodeProto, TensorProto


@dataclass(frozen=True)
class Stored:
    """A value whose zeros are those of one stored tensor. `origin` gives the stored axis behind
    every axis of it."""

    tensor: str
    shape: tuple[int, ...]
    origin: tuple[int | None, ...]
    path: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def then(self, op: str, *problems: str) -> Stored:
        """Return the value behind one more operator."""
        return replace(self, path=(*self.path, op), problems=(*self.problems, *problems))


@dataclass(frozen=True)
class Opaque:
    """A constant that could not be followed. `reason` continues a sentence that begins with the
    tensor's name."""

    tensor: str
    reason: str


Value = Stored | Opaque
Lookup = Callable[[Stored], "TensorProto"]
"""Gives the tensor behind a value."""


def _entry(node: NodeProto, name: str) -> AttributeProto | None:
    return next((entry for entry in node.attribute if entry.name == name), None)


def number(node: NodeProto, name: str, default: int = 0) -> int:
    """Return an attribute that is one number."""
    entry = _entry(node, name)
    if entry is None:
        return default
    if not entry.HasField("i"):
        raise _damaged(node, name, "number")
    return int(entry.i)


def numbers(node: NodeProto, name: str) -> list[int] | None:
    """Return an attribute that is a list of numbers; None when it is absent."""
    entry = _entry(node, name)
    if entry is None:
        return None
    if entry.type not in (entry.UNDEFINED, entry.INTS) or (not entry.ints and entry.HasField("i")):
        raise _damaged(node, name, "list of numbers")
    return list(entry.ints)


def _damaged(node: NodeProto, name: str, kind: str) -> UsageError:
    return UsageError(
        f"The ONNX model is damaged: '{name}' of the {node.op_type} "
        f"'{node.name or next(iter(node.output), '')}' is no {kind}."
    )


def constant_tensor(node: NodeProto) -> TensorProto | None:
    """Return the tensor of a Constant node, however it is written down."""
    from onnx import numpy_helper

    for entry in node.attribute:
        if entry.name == "value" and entry.HasField("t"):
            stored: TensorProto = entry.t
            return stored
        if entry.name in ("value_int", "value_ints"):
            return numpy_helper.from_array(
                np.array(entry.i if entry.name == "value_int" else entry.ints, np.int64)
            )
        if entry.name in ("value_float", "value_floats"):
            return numpy_helper.from_array(
                np.array(entry.f if entry.name == "value_float" else entry.floats, np.float32)
            )
    return None


def _same(
    node: NodeProto, inputs: Sequence[Value | None], tensor: Lookup, folder: Path
) -> Value | None:
    value = inputs[0]
    return value.then(node.op_type) if isinstance(value, Stored) else None


def _transpose(
    node: NodeProto, inputs: Sequence[Value | None], tensor: Lookup, folder: Path
) -> Value | None:
    value = inputs[0]
    if not isinstance(value, Stored):
        return None
    perm = numbers(node, "perm") or list(reversed(range(len(value.shape))))
    if sorted(perm) != list(range(len(value.shape))):
        return Opaque(value.tensor, f"passes through a Transpose with a bad perm {perm}")
    moved = replace(
        value,
        shape=tuple(value.shape[p] for p in perm),
        origin=tuple(value.origin[p] for p in perm),
    )
    return moved.then("Transpose")


def _quantize(
    node: NodeProto, inputs: Sequence[Value | None], tensor: Lookup, folder: Path
) -> Value | None:
    """Follow a weight through a scale, which keeps zeros, and a zero point, which moves them."""
    value = inputs[0]
    if not isinstance(value, Stored):
        return None
    if len(inputs) < 3 or not node.input[2]:
        return value.then(node.op_type)
    zero_point = inputs[2]
    if not isinstance(zero_point, Stored):
        return value.then(
            node.op_type, f"the zero point '{node.input[2]}' is not a stored constant"
        )
    if any_nonzero(tensor(zero_point), folder):
        return value.then(
            node.op_type,
            f"the zero point '{zero_point.tensor}' is not zero, so quantisation is "
            "asymmetric and destroys the pattern",
        )
    return value.then(node.op_type)


def _reshape(
    node: NodeProto, inputs: Sequence[Value | None], tensor: Lookup, folder: Path
) -> Value | None:
    value, target = inputs[0], inputs[1] if len(inputs) > 1 else None
    if not isinstance(value, Stored):
        return None
    if not isinstance(target, Stored):
        return Opaque(value.tensor, "is reshaped to a shape that is computed at run time")
    shape = _target(value.shape, tensor(target), folder, bool(number(node, "allowzero")))
    if shape is None:
        return Opaque(value.tensor, "passes through a Reshape with a bad shape")
    # An axis survives when as many values lie before it, and in it, as before.
    starts = {
        (math.prod(value.shape[:i]), size): origin
        for i, (size, origin) in enumerate(zip(value.shape, value.origin))
    }
    origin = tuple(starts.get((math.prod(shape[:i]), size)) for i, size in enumerate(shape))
    return replace(value, shape=shape, origin=origin).then("Reshape")


def _target(
    shape: tuple[int, ...], target: TensorProto, folder: Path, allowzero: bool
) -> tuple[int, ...] | None:
    if dtype_name(target) != "I64" or math.prod(target.dims) > 64:
        return None
    sizes = [int(size) for size in decode(target, folder).reshape(-1)]
    if not allowzero:
        sizes = [shape[i] if size == 0 and i < len(shape) else size for i, size in enumerate(sizes)]
    if sizes.count(-1) == 1:
        rest = math.prod(size for size in sizes if size != -1)
        sizes = [math.prod(shape) // rest if size == -1 and rest else size for size in sizes]
    return (
        tuple(sizes)
        if min(sizes, default=0) >= 0 and math.prod(sizes) == math.prod(shape)
        else None
    )


def _multiply(
    node: NodeProto, inputs: Sequence[Value | None], tensor: Lookup, folder: Path
) -> Value | None:
    """Follow a product: a vector keeps zeros, something as large as the weight makes zeros that are
    not stored."""
    if len(inputs) != 2 or not all(isinstance(value, Stored) for value in inputs):
        return None
    a, b = (value for value in inputs if isinstance(value, Stored))
    try:
        shape = np.broadcast_shapes(a.shape, b.shape)
    except ValueError:
        return Opaque(a.tensor, f"passes through a {node.op_type} of shapes that do not fit")
    size = math.prod(shape)
    if size == math.prod(a.shape) == math.prod(b.shape) and sum(n > 1 for n in shape) > 1:
        weight, mask = (b, a) if _is_bool(a, tensor) else (a, b)
        return _broadcast(weight, shape).then(node.op_type, unbaked(weight, mask, node))
    if node.op_type == "Div" and size != math.prod(a.shape):
        return None
    weight = a if size == math.prod(a.shape) else b
    if size != math.prod(weight.shape):
        return Opaque(weight.tensor, f"passes through a {node.op_type} that enlarges it")
    return _broadcast(weight, shape).then(node.op_type)


def _where(
    node: NodeProto, inputs: Sequence[Value | None], tensor: Lookup, folder: Path
) -> Value | None:
    """Follow a choice between a weight and something smaller, which is a mask that was not
    baked."""
    if len(inputs) != 3 or not all(isinstance(value, Stored) for value in inputs):
        return None
    condition, yes, no = (value for value in inputs if isinstance(value, Stored))
    weight = max((yes, no), key=lambda value: math.prod(value.shape))
    if math.prod(condition.shape) != math.prod(weight.shape):
        return None
    return weight.then("Where", unbaked(weight, condition, node))


def unbaked(weight: Stored, mask: Stored, node: NodeProto) -> str:
    """Say that a node applies a mask that should be in the weight."""
    return (
        f"mask was not baked: node '{node.name or node.output[0]}' applies '{mask.tensor}' to the stored "
        f"'{weight.tensor}' ({node.op_type})"
    )


def _is_bool(value: Stored, tensor: Lookup) -> bool:
    return dtype_name(tensor(value)) == "BOOL"


def _broadcast(value: Stored, shape: tuple[int, ...]) -> Stored:
    """Put new axes of length one in front, if any."""
    extra: tuple[int | None, ...] = (None,) * (len(shape) - len(value.shape))
    return replace(value, shape=shape, origin=(*extra, *value.origin))


Follow = Callable[["NodeProto", Sequence[Value | None], Lookup, Path], Value | None]
FOLLOW: dict[str, Follow] = {
    "Identity": _same,
    "Cast": _same,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _quantize,
    "Mul": _multiply,
    "Div": _multiply,
    "Where": _where,
}
