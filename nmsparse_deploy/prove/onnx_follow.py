"""Operators that a stored tensor may pass through on its way to a multiplication, and what they do
to its axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from nmsparse_deploy.prove.onnx_axes import (
    LAYOUT,
    RUN_TIME,
    Follow,
    Inputs,
    Result,
    broadcast,
    moved_axis,
)
from nmsparse_deploy.prove.onnx_tensor import dtype_name
from nmsparse_deploy.prove.onnx_values import (
    MICROSOFT,
    STANDARD,
    Opaque,
    Scope,
    Several,
    Stored,
    along,
    is_matrix,
    label_of,
    lost,
    number,
    rank_of,
    squeezed,
    with_zero,
)

if TYPE_CHECKING:
    from onnx import NodeProto


def follow(node: NodeProto, inputs: Inputs, scope: Scope) -> Result:
    """Return what a node makes of constants; None when it makes nothing that is followed."""
    rule = FOLLOW.get((node.domain if node.domain not in STANDARD else "", node.op_type))
    if rule is None or not inputs:
        return None
    joined = [i for i, value in enumerate(inputs) if isinstance(value, Several)]
    whole = node.op_type in ("Concat", "SequenceConstruct", "SequenceAt")
    if not joined or whole or (joined[0] and rule is not _multiply):
        return rule(node, inputs, scope)
    several = inputs[joined[0]]
    if not isinstance(several, Several):
        return None
    return _partwise(node, inputs, scope, rule, joined[0], several)


def _partwise(
    node: NodeProto, inputs: Inputs, scope: Scope, rule: Follow, place: int, several: Several
) -> Result:
    """Follow every part of a value on its own, where the operator leaves the joint axis alone."""
    axis = several.axis
    if axis is not None and rule not in (_same, _quantize, _multiply):
        axis = moved_axis(node, scope, axis, rank_of(several))
        if axis is None:
            return None
    parts: list[Stored | Opaque | Several] = []
    for part in several.parts:
        result = follow(node, [*inputs[:place], part, *inputs[place + 1 :]], scope)
        if isinstance(part, Opaque):
            parts.append(part)
        elif isinstance(result, Stored | Opaque | Several):
            parts.append(result)
        else:
            return None
    return Several(tuple(parts), axis, several.selected)


def _same(node: NodeProto, inputs: Inputs, scope: Scope) -> Result:
    value = inputs[0]
    return value.then(node.op_type) if isinstance(value, Stored) else None


def _quantize(node: NodeProto, inputs: Inputs, scope: Scope) -> Result:
    """Follow a weight through a scale, which keeps zeros, and a zero point, which moves them."""
    value = inputs[0]
    if not isinstance(value, Stored):
        return None
    if len(inputs) < 3 or not node.input[2]:
        return value.then(node.op_type)
    return zero_pointed(
        value, node.input[2], (number(node, "axis", 1),), scope, node.op_type == "QuantizeLinear"
    ).then(node.op_type)


def zero_pointed(
    value: Stored, name: str, axes: Sequence[int], scope: Scope, quantizes: bool = False
) -> Stored:
    """Return a value whose zero is what the constant `name` says, the axes of which lie along
    `axes`."""
    zero = scope.constant(name)
    if zero is None:
        return replace(value, blind=f"the zero point '{name}' is not a stored constant")
    if quantizes:
        value = replace(value, path=(*value.path, "QuantizeLinear"))
    laid = with_zero(value, along(zero, axes, value.shape), name)
    return replace(laid, path=value.path[:-1]) if quantizes else laid


def _subtract(node: NodeProto, inputs: Inputs, scope: Scope) -> Result:
    """Follow `code - zero point` as it is written out, before any scale."""
    value = inputs[0]
    if len(inputs) != 2 or not isinstance(value, Stored):
        return None
    zero = scope.constant(node.input[1])
    if zero is None or not is_matrix(value.shape):
        return None
    scaled = {"Mul", "Div", "DequantizeLinear", "QuantizeLinear"} & set(value.path)
    if (
        dtype_name(scope.tensors[value.tensor])[0] not in "IU"
        or scaled
        or zero.ndim > len(value.shape)
    ):
        return None
    return with_zero(value, zero, node.input[1]).then("Sub")


def _multiply(node: NodeProto, inputs: Inputs, scope: Scope) -> Result:
    """Follow a product: a vector keeps zeros, something as large as the weight makes zeros that are
    not stored."""
    if len(inputs) != 2:
        return None
    a, b = inputs
    if isinstance(a, Stored) and isinstance(b, Stored) and not (a.selected or b.selected):
        return _product(node, a, b, scope)
    place = 0 if isinstance(a, Stored) else 1
    value = inputs[place]
    if not isinstance(value, Stored) or (node.op_type == "Div" and place):
        return None
    other = node.input[1 - place]
    factor = scope.constant(other)
    if factor is None:
        known = inputs[1 - place]
        return (
            None if known is not None and not known.selected else _scaled(node, value, other, scope)
        )
    try:
        shape = np.broadcast_shapes(value.shape, factor.shape)
    except ValueError:
        return lost([value], scope, f"passes through a {node.op_type} of shapes that do not fit")
    if math.prod(shape) != math.prod(value.shape):
        return lost([value], scope, f"passes through a {node.op_type} that enlarges it")
    result = broadcast(value, shape).then(node.op_type)
    if squeezed(factor).size == math.prod(shape) and is_matrix(shape):
        return replace(result, problems=(*result.problems, unbaked(value, other, node)))
    return result


def _product(node: NodeProto, a: Stored, b: Stored, scope: Scope) -> Result:
    try:
        shape = np.broadcast_shapes(a.shape, b.shape)
    except ValueError:
        return lost([a, b], scope, f"passes through a {node.op_type} of shapes that do not fit")
    whole, big, small = math.prod(shape), a, b
    if _extent(b, scope) > _extent(a, scope):
        big, small = b, a
    if math.prod(big.shape) != whole:
        big, small = small, big
    if math.prod(big.shape) != whole:
        return lost([a, b], scope, f"passes through a {node.op_type} that enlarges it")
    if _extent(small, scope) == whole and is_matrix(shape):
        weight, mask = (b, a) if _is_bool(a, scope) else (a, b)
        return broadcast(weight, shape).then(node.op_type, unbaked(weight, mask.tensor, node))
    if node.op_type == "Div" and big is b:
        return None
    return broadcast(big, shape).then(node.op_type)


def _extent(value: Stored, scope: Scope) -> int:
    """Return how many values a value has, without those that a broadcast repeats."""
    sizes = scope.tensors[value.tensor].dims
    used = (size if at is None else at.size for size, at in zip(sizes, value.picks))
    return min(math.prod(value.shape), math.prod(used))


def _scaled(node: NodeProto, value: Stored, factor: str, scope: Scope) -> Result:
    """Follow a weight through a factor that is computed at run time. One with more axes is an
    activation that the constant scales."""
    if not is_matrix(value.shape):
        return None
    shape = scope.shape(factor)
    if shape is None:
        return lost([value], scope, f"is scaled by '{factor}', whose shape is not known", True)
    lead = len(shape) - len(value.shape)
    ours = (1,) * lead + value.shape
    theirs = (1,) * -lead + shape
    if any(mine == 1 != their for mine, their in zip(ours, theirs)):
        return None
    return replace(broadcast(value, ours), selected=True).then(node.op_type)


def _mixed(node: NodeProto, inputs: Inputs, scope: Scope) -> Result:
    """Say that a matrix is changed at run time; an activation that a constant is added to has more
    axes."""
    matrices = [v for v in inputs if isinstance(v, Stored) and is_matrix(v.shape)]
    computed = [
        name
        for value, name in zip(inputs, node.input)
        if name and (value is None or value.selected) and scope.constant(name) is None
    ]
    if not computed or not matrices:
        return None
    ranks = [scope.shape(name) for name in computed]
    if any(shape is None or len(shape) > 2 for shape in ranks) or any(
        len(value.shape) > 2 for value in matrices
    ):
        return None
    return lost(matrices, scope, f"passes through {node.op_type} with values {RUN_TIME}", True)


def _where(node: NodeProto, inputs: Inputs, scope: Scope) -> Result:
    """Follow a choice between a weight and something smaller, which is a mask that was not
    baked."""
    if len(inputs) != 3 or not all(isinstance(value, Stored) for value in inputs):
        return _mixed(node, inputs, scope)
    condition, yes, no = (value for value in inputs if isinstance(value, Stored))
    weight = max((yes, no), key=lambda value: math.prod(value.shape))
    if math.prod(condition.shape) != math.prod(weight.shape):
        return None
    return weight.then("Where", unbaked(weight, condition.tensor, node))


def unbaked(weight: Stored, mask: str, node: NodeProto) -> str:
    """Say that a node applies a mask that should be in the weight."""
    return (
        f"mask was not baked: node '{label_of(node)}' applies '{mask}' to the stored "
        f"'{weight.tensor}' ({node.op_type})"
    )


def _is_bool(value: Stored, scope: Scope) -> bool:
    return dtype_name(scope.tensors[value.tensor]) == "BOOL"


def _sub(node: NodeProto, inputs: Inputs, scope: Scope) -> Result:
    followed = _subtract(node, inputs, scope)
    return _mixed(node, inputs, scope) if followed is None else followed


def _picked(node: NodeProto, inputs: Inputs, scope: Scope) -> Result:
    """Say that something computed at run time chooses from a constant, in a way that is not
    followed."""
    value = inputs[0]
    if not isinstance(value, Stored | Opaque) or all(v is not None for v in inputs[1:]):
        return None
    if isinstance(value, Stored) and not is_matrix(value.shape):
        return None
    return lost([value], scope, f"is picked from by {node.op_type}", selected=True)


def _made(node: NodeProto, inputs: Inputs, scope: Scope) -> Result:
    """Name what is made from sizes by its own name."""
    if any(value is None or value.selected for value in inputs):
        return None
    return Opaque((node.output[0],), f"is made by {node.op_type}") if node.output else None


FOLLOW: dict[tuple[str, str], Follow] = {
    **{("", op): rule for op, rule in LAYOUT.items()},
    **{("", op): _same for op in ("Identity", "Cast", "CastLike", "Neg", "Dropout")},
    **{("", op): _same for op in ("Optional", "OptionalGetElement")},
    ("", "QuantizeLinear"): _quantize,
    ("", "DequantizeLinear"): _quantize,
    (MICROSOFT, "QuantizeLinear"): _quantize,
    (MICROSOFT, "DequantizeLinear"): _quantize,
    ("", "Mul"): _multiply,
    ("", "Div"): _multiply,
    ("", "Sub"): _sub,
    ("", "Add"): _mixed,
    ("", "Where"): _where,
    **{("", op): _made for op in ("Shape", "Size", "ConstantOfShape", "Range")},
    **{("", op): _picked for op in ("GatherElements", "Tile", "Pad", "Compress")},
}
