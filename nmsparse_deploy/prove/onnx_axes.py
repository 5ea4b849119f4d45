"""Operators that lay out, cut or join the axes of a stored tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from nmsparse_deploy.prove.onnx_values import (
    MAX_AXIS,
    Opaque,
    Scope,
    Several,
    Stored,
    Value,
    is_matrix,
    lost,
    number,
    numbers,
    rank_of,
)

if TYPE_CHECKING:
    from onnx import NodeProto

Inputs = Sequence[Value | None]
Result = Value | list[Stored | Opaque] | None
"""The first output, all outputs, or nothing that is constant."""
Follow = Callable[["NodeProto", Inputs, Scope], Result]
RUN_TIME = "that is computed at run time"


def _transpose(node: NodeProto, inputs: Inputs, scope: Scope) -> Result:
    value = inputs[0]
    if not isinstance(value, Stored):
        return None
    perm = numbers(node, "perm") or list(reversed(range(len(value.shape))))
    if sorted(perm) != list(range(len(value.shape))):
        return lost([value], scope, f"passes through a Transpose with a bad perm {perm[:16]}")
    moved = replace(
        value,
        shape=tuple(value.shape[p] for p in perm),
        origin=tuple(value.origin[p] for p in perm),
        in_order=value.in_order and perm == sorted(perm),
    )
    return moved.then("Transpose")


def _reshape(node: NodeProto, inputs: Inputs, scope: Scope) -> Result:
    value = inputs[0]
    if not isinstance(value, Stored):
        return None
    if len(node.input) > 1:
        target = scope.constant(node.input[1])
    else:
        target = np.array(numbers(node, "shape") or [0], np.int64)
    if target is None:
        return lost([value], scope, f"is reshaped to a shape {RUN_TIME}", selected=True)
    shape = _target(value.shape, target, bool(number(node, "allowzero")))
    if shape is None:
        return lost([value], scope, "passes through a Reshape with a bad shape")
    return _reshaped(value, shape, scope).then("Reshape")


def _reshaped(value: Stored, shape: tuple[int, ...], scope: Scope) -> Stored:
    """Give a value another shape. An axis survives when as many values lie before it, and in it, as
    before."""
    starts: dict[tuple[int, int], int] = {}
    if value.in_order:  # what was split on the way may come together again
        stored, before = scope.tensors[value.tensor].dims, 1
        for stored_axis, (size, picks) in enumerate(zip(stored, value.picks)):
            length = int(size) if picks is None else picks.size
            starts[before, length] = stored_axis
            before *= length
    for i, (size, kept) in enumerate(zip(value.shape, value.origin)):
        if kept is not None:
            starts[math.prod(value.shape[:i]), size] = kept
    behind: list[int | None] = []
    for i, size in enumerate(shape):
        place = starts.get((math.prod(shape[:i]), size))
        behind.append(None if place in behind else place)
    return replace(value, shape=shape, origin=tuple(behind))


def _target(shape: tuple[int, ...], target: np.ndarray, allowzero: bool) -> tuple[int, ...] | None:
    if target.dtype.kind not in "iu" or target.size > 64:
        return None
    sizes = [int(size) for size in target.reshape(-1)]
    if not allowzero:
        sizes = [shape[i] if size == 0 and i < len(shape) else size for i, size in enumerate(sizes)]
    if sizes.count(-1) == 1:
        rest = math.prod(size for size in sizes if size != -1)
        sizes = [math.prod(shape) // rest if size == -1 and rest else size for size in sizes]
    fits = min(sizes, default=0) >= 0 and math.prod(sizes) == math.prod(shape)
    return tuple(sizes) if fits else None


def _flatten(node: NodeProto, inputs: Inputs, scope: Scope) -> Result:
    value = inputs[0]
    if not isinstance(value, Stored):
        return None
    axis, rank = number(node, "axis", 1), len(value.shape)
    axis += rank if axis < 0 else 0
    if not 0 <= axis <= rank:
        return lost([value], scope, "passes through a Flatten with a bad axis")
    shape = (math.prod(value.shape[:axis]), math.prod(value.shape[axis:]))
    return _reshaped(value, shape, scope).then("Flatten")


def _axes(node: NodeProto, scope: Scope, rank: int) -> list[int] | str | None:
    """Return the axes of a Squeeze or an Unsqueeze, None when none are given, or why not."""
    if len(node.input) > 1 and node.input[1]:
        array = scope.constant(node.input[1])
        if array is None:
            return RUN_TIME
        if array.dtype.kind not in "iu" or array.size > 64:
            return "bad"
        axes = [int(axis) for axis in array.reshape(-1)]
    else:
        given = numbers(node, "axes")
        if given is None:
            return None
        axes = given
    axes = [axis + rank if axis < 0 else axis for axis in axes]
    good = len(set(axes)) == len(axes) and all(0 <= axis < rank for axis in axes)
    return axes if good else "bad"


def _squeeze(node: NodeProto, inputs: Inputs, scope: Scope) -> Result:
    value = inputs[0]
    if not isinstance(value, Stored):
        return None
    axes = _axes(node, scope, len(value.shape))
    if axes is None:
        axes = [axis for axis, size in enumerate(value.shape) if size == 1]
    if axes == RUN_TIME:
        return lost([value], scope, f"passes through a Squeeze of axes {RUN_TIME}", True)
    if isinstance(axes, str) or any(value.shape[axis] != 1 for axis in axes):
        return lost([value], scope, "passes through a Squeeze with bad axes")
    kept = [axis for axis in range(len(value.shape)) if axis not in axes]
    return replace(
        value,
        shape=tuple(value.shape[axis] for axis in kept),
        origin=tuple(value.origin[axis] for axis in kept),
    ).then("Squeeze")


def _unsqueeze(node: NodeProto, inputs: Inputs, scope: Scope) -> Result:
    value = inputs[0]
    if not isinstance(value, Stored):
        return None
    given = scope.constant(node.input[1]) if len(node.input) > 1 else numbers(node, "axes") or ()
    rank = len(value.shape) + (0 if given is None else np.size(given))
    axes = _axes(node, scope, rank)
    if axes == RUN_TIME:
        return lost([value], scope, f"passes through an Unsqueeze of axes {RUN_TIME}", True)
    if not isinstance(axes, list):
        return lost([value], scope, "passes through an Unsqueeze with bad axes")
    shape, origin = list(value.shape), list(value.origin)
    for axis in sorted(axes):
        shape.insert(axis, 1)
        origin.insert(axis, None)
    return replace(value, shape=tuple(shape), origin=tuple(origin)).then("Unsqueeze")


def _expand(node: NodeProto, inputs: Inputs, scope: Scope) -> Result:
    value = inputs[0]
    if not isinstance(value, Stored):
        return None
    target = scope.constant(node.input[1]) if len(node.input) > 1 else None
    if target is None:
        reason = f"is expanded to a shape {RUN_TIME}"
        return lost([value], scope, reason, True) if is_matrix(value.shape) else None
    sizes = [int(size) for size in target.reshape(-1)[:64]] if target.dtype.kind in "iu" else [-1]
    try:
        shape = np.broadcast_shapes(value.shape, tuple(sizes)) if min(sizes, default=1) > 0 else ()
    except ValueError:
        shape = ()
    if len(shape) < len(value.shape):
        return lost([value], scope, "passes through an Expand with a bad shape")
    return broadcast(value, shape).then("Expand")


def broadcast(value: Stored, shape: tuple[int, ...]) -> Stored:
    """Repeat a value along new axes and axes of length one."""
    lead = len(shape) - len(value.shape)
    origin = (*[None] * lead, *value.origin)
    before = (*[1] * lead, *value.shape)
    kept = tuple(place if old == new else None for place, old, new in zip(origin, before, shape))
    same = math.prod(shape) == math.prod(value.shape)
    return replace(value, shape=shape, origin=kept, in_order=value.in_order and same)


# --- parts ---


def _taken(value: Stored, axis: int, places: np.ndarray, op: str, scope: Scope) -> Stored | Opaque:
    """Return some places along one axis."""
    size, origin = value.shape[axis], value.origin[axis]
    if places.size == size and np.array_equal(places, np.arange(size)):
        return value.then(op)
    if origin is None:
        return lost([value], scope, f"is cut by {op} along an axis that is mixed with another")
    if places.size > size:
        return lost([value], scope, f"is enlarged by {op}")
    picks, before = list(value.picks), value.picks[origin]
    picks[origin] = places if before is None else before[places]
    zero = value.zero
    if zero is not None and zero.values.shape[origin] > 1:
        zero = replace(zero, values=zero.values.take(places, axis=origin))
    shape = (*value.shape[:axis], places.size, *value.shape[axis + 1 :])
    return replace(value, shape=shape, picks=tuple(picks), zero=zero).then(op)


def _slice(node: NodeProto, inputs: Inputs, scope: Scope) -> Result:
    value = inputs[0]
    if not isinstance(value, Stored):
        return None
    bounds: list[list[int] | None] = []
    for place, name in enumerate(("starts", "ends", "axes", "steps"), 1):
        if place < len(node.input) and node.input[place]:
            array = scope.constant(node.input[place])
            if array is None:
                return lost([value], scope, f"is sliced by bounds {RUN_TIME}", selected=True)
            bounds.append(
                [int(i) for i in array.reshape(-1)[:64]] if array.dtype.kind == "i" else []
            )
        else:
            bounds.append(numbers(node, name))
    starts, ends = bounds[0] or [], bounds[1] or []
    axes = list(range(len(starts))) if bounds[2] is None else bounds[2]
    steps = [1] * len(starts) if bounds[3] is None else bounds[3]
    bad = lost([value], scope, "passes through a Slice with bad bounds")
    if not starts or len({len(starts), len(ends), len(axes), len(steps)}) > 1 or 0 in steps:
        return bad
    result: Stored | Opaque = value
    for axis, start, end, step in zip(axes, starts, ends, steps):
        if not isinstance(result, Stored):
            return result
        if not -len(value.shape) <= axis < len(value.shape) or value.shape[axis] > MAX_AXIS:
            return bad
        axis %= len(value.shape)
        places = np.arange(*slice(start, end, step).indices(result.shape[axis]))
        result = _taken(result, axis, places, "Slice", scope)
    return result


def _split(node: NodeProto, inputs: Inputs, scope: Scope) -> Result:
    value = inputs[0]
    if not isinstance(value, Stored):
        return None
    axis, rank, parts = number(node, "axis"), len(value.shape), len(node.output)
    sizes = numbers(node, "split")
    if len(node.input) > 1 and node.input[1]:
        array = scope.constant(node.input[1])
        if array is None:
            return lost([value], scope, f"is split into sizes {RUN_TIME}", selected=True)
        sizes = [int(i) for i in array.reshape(-1)] if array.dtype.kind == "i" else []
    if not -rank <= axis < rank or not parts or value.shape[axis] > MAX_AXIS:
        return lost([value], scope, "passes through a Split with a bad axis")
    whole = value.shape[axis]
    if sizes is None:
        each = -(-whole // parts)
        sizes = [min(each, max(0, whole - i * each)) for i in range(parts)]
    if len(sizes) != parts or min(sizes) < 0 or sum(sizes) != whole:
        return lost([value], scope, "passes through a Split with bad sizes")
    ends = np.cumsum(sizes)
    return [
        _taken(value, axis % rank, np.arange(end - size, end), "Split", scope)
        for size, end in zip(sizes, ends)
    ]


def _gather(node: NodeProto, inputs: Inputs, scope: Scope) -> Result:
    value = inputs[0]
    if not isinstance(value, Stored) or len(node.input) < 2:
        return None
    axis, rank = number(node, "axis"), len(value.shape)
    if not -rank <= axis < rank or value.shape[axis] > MAX_AXIS:
        return lost([value], scope, "passes through a Gather with a bad axis")
    axis %= rank
    index = scope.constant(node.input[1])
    if index is None:
        return _chosen(node, value, axis, scope)
    if index.dtype.kind not in "iu" or sum(size != 1 for size in index.shape) > 1:
        return lost([value], scope, "is laid out anew by a Gather")
    places = np.array(index, np.int64).reshape(-1)
    places = np.where(places < 0, places + value.shape[axis], places)
    if places.size and not 0 <= places.min() <= places.max() < value.shape[axis]:
        return lost([value], scope, "passes through a Gather with bad indices")
    taken = _taken(value, axis, places, "Gather", scope)
    if not isinstance(taken, Stored):
        return taken
    origin = taken.origin[axis]
    shape = (*value.shape[:axis], *index.shape, *value.shape[axis + 1 :])
    inner = tuple(None if size == 1 else origin for size in index.shape)
    return replace(
        taken, shape=shape, origin=(*value.origin[:axis], *inner, *value.origin[axis + 1 :])
    )


def _chosen(node: NodeProto, value: Stored, axis: int, scope: Scope) -> Result:
    """Follow a Gather by a computed index: whatever it picks, the other axes stay as they are."""
    if not is_matrix(value.shape):
        return None
    index = scope.shape(node.input[1])
    sizes = [size for size in index or () if size is not None]
    if index is None or len(sizes) < len(index):
        return lost([value], scope, "is picked from by a Gather with a computed index", True)
    shape = (*value.shape[:axis], *sizes, *value.shape[axis + 1 :])
    origin = (*value.origin[:axis], *[None] * len(sizes), *value.origin[axis + 1 :])
    return replace(value, shape=shape, origin=origin, selected=True, in_order=False).then("Gather")


def _gather_nd(node: NodeProto, inputs: Inputs, scope: Scope) -> Result:
    """Follow a GatherND that picks by computed indices from the first axes."""
    value = inputs[0]
    if not isinstance(value, Stored) or len(node.input) < 2 or not is_matrix(value.shape):
        return None
    index = scope.shape(node.input[1])
    *sizes, picked = [size for size in index or () if size is not None] or [0]
    reason = "is picked from by a GatherND"
    if scope.constant(node.input[1]) is not None or number(node, "batch_dims"):
        return lost([value], scope, reason)
    if index is None or None in index or not 0 < picked <= len(value.shape):
        return lost([value], scope, f"{reason} with a computed index", True)
    shape = (*sizes, *value.shape[picked:])
    origin = (*[None] * len(sizes), *value.origin[picked:])
    return replace(value, shape=shape, origin=origin, selected=True, in_order=False).then(
        "GatherND"
    )


def _concat(node: NodeProto, inputs: Inputs, scope: Scope) -> Result:
    parts = [value for value in inputs if value is not None]
    ranks = {rank for rank in map(rank_of, parts) if rank is not None}
    if len(parts) < len(inputs) or len(ranks) != 1:
        return None
    axis, (rank,) = number(node, "axis", -1), ranks
    if not -rank <= axis < rank:
        return None
    axis = axis % rank - rank
    followed: list[Stored | Opaque | Several] = []
    for part in parts:
        if isinstance(part, Several) and part.axis == axis:
            followed += part.parts
        else:
            followed.append(part.then("Concat") if isinstance(part, Stored) else part)
    return Several(tuple(followed), axis, any(part.selected for part in parts))


def _sequence(node: NodeProto, inputs: Inputs, scope: Scope) -> Result:
    parts = tuple(value for value in inputs if value is not None)
    return Several(parts, None) if len(parts) == len(inputs) else None


def _from_sequence(node: NodeProto, inputs: Inputs, scope: Scope) -> Result:
    value = inputs[0]
    return replace(value, selected=True) if isinstance(value, Several) else None


def moved_axis(node: NodeProto, scope: Scope, axis: int, rank: int | None) -> int | None:
    """Return where the joint axis of several values lies behind an operator, counted from the last;
    None when it does not stay whole."""
    if rank is None:
        return None
    if node.op_type == "Transpose":
        perm = numbers(node, "perm") or list(reversed(range(rank)))
        return perm.index(axis + rank) - rank if sorted(perm) == list(range(rank)) else None
    if node.op_type == "Unsqueeze":
        given = scope.constant(node.input[1]) if len(node.input) > 1 else numbers(node, "axes")
        wider = rank + (0 if given is None else np.size(given))
        axes = _axes(node, scope, wider)
        if isinstance(axes, list):
            kept = [place for place in range(wider) if place not in axes]
            return kept[axis] - wider
    if node.op_type == "Squeeze":
        axes = _axes(node, scope, rank)
        if isinstance(axes, list) and axis + rank not in axes:
            kept = [place for place in range(rank) if place not in axes]
            return kept.index(axis + rank) - len(kept)
    return None


LAYOUT: dict[str, Follow] = {
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Expand": _expand,
    "Slice": _slice,
    "Split": _split,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Concat": _concat,
    "SequenceConstruct": _sequence,
    "SequenceAt": _from_sequence,
}
"""Standard operators."""
