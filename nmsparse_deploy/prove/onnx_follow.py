"""Operators that a stored tensor may pass through on its way to a multiplication, and what they do
to its axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from nmsparse_deploy.prove.onnx_axes import LAYOUT, Follow, Inputs, Result, broadcast, moved_axis
from nmsparse_deploy.prove.onnx_tensor import dtype_name
from nmsparse_deploy.prove.onnx_values import (
    MICROSOFT,
    STANDARD,
    Opaque,
    Scope,
    Several,
    Stored,
    Value,
    along,
    has_matrix,
    is_matrix,
    is_selected,
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
    place = 1 if is_selected(a) and not is_selected(b) else 0 if a is not None else 1
    value, other = inputs[place], node.input[1 - place]
    if value is None or (node.op_type == "Div" and place):
        return None
    factor = scope.constant(other)
    if factor is None and is_selected(inputs[1 - place]):
        return _scaled(node, value, node.input[place], other, scope)
    if factor is None or not isinstance(value, Stored):
        return None
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


def _scaled(node: NodeProto, value: Value, name: str, factor: str, scope: Scope) -> Result:
    """Follow a weight through a factor that is computed at run time. One with more axes is an
    activation that the constant scales."""
    ours = value.shape if isinstance(value, Stored) else scope.shape(name)
    theirs = scope.shape(factor)
    if not has_matrix(value, scope) or (isinstance(value, Stored) and not is_matrix(value.shape)):
        return None
    if ours is None or theirs is None:
        return lost([value], scope, f"is scaled by '{factor}', whose shape is not known", True)
    rank = max(len(ours), len(theirs))
    ours, theirs = (1,) * (rank - len(ours)) + ours, (1,) * (rank - len(theirs)) + theirs
    enlarged = any(mine == 1 != their for mine, their in zip(ours, theirs))
    if enlarged or not isinstance(value, Stored):
        return lost([value], scope, f"is scaled by '{factor}'", True, weak=enlarged)
    shape = (1,) * (rank - len(value.shape)) + value.shape
    return replace(broadcast(value, shape), selected=True).then(node.op_type)


def _mixed(node: NodeProto, inputs: Inputs, scope: Scope) -> Result:
    """Say that a matrix is changed at run time; an activation that a constant is added to has more
    axes."""
    matrices = [value for value in inputs if value is not None and has_matrix(value, scope)]
    computed = [
        name
        for value, name in zip(inputs, node.input)
        if name and is_selected(value) and scope.constant(name) is None
    ]
    if not computed or not matrices:
        return None
    shapes = [scope.shape(name) for name in computed]
    shapes += [value.shape for value in matrices if isinstance(value, Stored)]
    weak = any(shape is None or len(shape) > 2 for shape in shapes)
    reason = f"passes through {node.op_type} with what is computed at run time"
    fixed = [value for value in matrices if not value.selected]
    return lost(fixed or matrices, scope, reason, selected=True, weak=weak)


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


def carried(node: NodeProto, inputs: Inputs, scope: Scope) -> Opaque | None:
    """Return what is left of a constant that run-time values choose from or lay out; None for an
    activation."""
    domain = "" if node.domain in STANDARD else node.domain
    if (domain, node.op_type) in CARRYING:
        values = list(inputs[:1])
    elif domain == "" and node.op_type in ("Mul", "Div") and None not in inputs:
        values = list(inputs)
    else:
        return None
    known = [value for value in values if value is not None and has_matrix(value, scope)]
    return lost(known, scope, f"passes through {node.op_type}", True) if known else None


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
    **{("", op): _mixed for op in ("Add", "Sum", "Mean", "Max", "Min", "Clip", "Pow")},
    **{("", op): _mixed for op in ("ScatterND", "ScatterElements")},
    ("", "Where"): _where,
    **{("", op): _made for op in ("Shape", "Size", "ConstantOfShape", "Range")},
    **{("", op): _picked for op in ("GatherElements", "Tile", "Pad", "Compress")},
}
"""Domain and operator -> its rule."""
CARRYING = frozenset(
    key for key, rule in FOLLOW.items() if rule in (_same, _quantize, _picked, *LAYOUT.values())
)
"""Operators that take one value and give it, or parts of it, in another layout."""
