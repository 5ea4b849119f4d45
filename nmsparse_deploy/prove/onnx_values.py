"""What is known of the values in an ONNX graph: how each is made from stored constants, and how
attributes of a node are read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from nmsparse_deploy.errors import UsageError

if TYPE_CHECKING:
    from onnx import AttributeProto, NodeProto, TensorProto

STANDARD = ("", "ai.onnx")
MICROSOFT = "com.microsoft"
MAX_SOURCES = 32
MAX_PATH, MAX_PARTS, MAX_NESTED = 64, 256, 16
"""Operators that a value passes through, and parts that it is made of, before it is given up."""
MAX_AXIS = 1 << 24
"""Longest axis that is cut by index."""


@dataclass(frozen=True)
class ZeroPoint:
    """The stored integers that mean zero. `values` broadcasts against the stored tensor, or what
    was picked of it, in the order of the stored axes."""

    name: str
    values: np.ndarray

    def moved(self) -> str:
        """Say what is wrong with it."""
        return f"the zero point '{self.name}' is not zero"


@dataclass(frozen=True, eq=False)
class Stored:
    """A value whose zeros are those of one stored tensor. `origin` gives the stored axis behind
    every axis of it."""

    tensor: str
    shape: tuple[int, ...]
    origin: tuple[int | None, ...]
    picks: tuple[np.ndarray | None, ...]
    """By stored axis: the places that are used, where these are not all."""
    path: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    """Why the stored values do not prove what is multiplied."""
    doubts: tuple[str, ...] = ()
    """The same, for a weight that looks sparse; a dense one may have them."""
    zero: ZeroPoint | None = None
    blind: str = ""
    """Why it is not known which stored values mean zero."""
    selected: bool = False
    """Something that is computed at run time chooses it or scales it: it may be an activation."""
    in_order: bool = True
    """The values lie in the order of the stored tensor."""

    def then(self, op: str, *problems: str) -> Stored:
        """Return the value behind one more operator."""
        return replace(self, path=(*self.path, op), problems=(*self.problems, *problems))


@dataclass(frozen=True)
class Opaque:
    """Constants that could not be followed, the largest first. `reason` continues a sentence that
    begins with a tensor's name."""

    tensors: tuple[str, ...]
    reason: str
    selected: bool = False
    weak: bool = False
    """More likely an activation that a constant scales or shifts, unless it stands in the place of a
    kernel."""

    @property
    def tensor(self) -> str:
        """The largest one."""
        return self.tensors[0]


@dataclass(frozen=True, eq=False)
class Several:
    """Constants that are joined along `axis` (counted from the last), or of which one is chosen
    (None)."""

    parts: tuple[Stored | Opaque | Several, ...]
    axis: int | None
    selected: bool = False

    @property
    def depth(self) -> int:
        """How deep its parts are nested."""
        return 1 + max((p.depth for p in self.parts if isinstance(p, Several)), default=0)

    @property
    def count(self) -> int:
        """How many parts it has, those of its parts counted."""
        return sum(p.count if isinstance(p, Several) else 1 for p in self.parts)


Value = Stored | Opaque | Several


class Scope(Protocol):
    """What a node can ask about its inputs."""

    def constant(self, name: str) -> np.ndarray | None:
        """Return a small value that does not depend on the inputs of the model."""
        ...

    def shape(self, name: str) -> tuple[int | None, ...] | None:
        """Return the shape of a value that is computed at run time, as far as it is known."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorProto]:
        """Everything that is stored."""
        ...


def dims(scope: Scope, tensor: str) -> tuple[int, ...]:
    """Return the shape of a stored tensor; none for a constant that is no tensor."""
    return tuple(scope.tensors[tensor].dims) if tensor in scope.tensors else ()


def sources(values: Iterable[Value | None]) -> Iterable[str]:
    """Yield the stored tensors behind values."""
    for value in values:
        if isinstance(value, Stored):
            yield value.tensor
        elif isinstance(value, Opaque):
            yield from value.tensors
        elif value is not None:
            yield from sources(value.parts)


def lost(
    values: Sequence[Value | None],
    scope: Scope,
    reason: str,
    selected: bool = False,
    weak: bool = False,
) -> Opaque:
    """Return what is left of constants that cannot be followed any further; what was lost before
    keeps its reason."""
    names = list(dict.fromkeys(sources(values)))
    names.sort(key=lambda name: math.prod(dims(scope, name)), reverse=True)
    before = [value for value in values if isinstance(value, Opaque)]
    first = next((value.reason for value in before if value.tensor == names[0]), reason)
    weak = weak or any(value.weak for value in before)
    return Opaque(tuple(names[:MAX_SOURCES]), first, selected, weak)


def rank_of(value: Value) -> int | None:
    """Return how many axes a value has, None where that is not known."""
    if isinstance(value, Stored):
        return len(value.shape)
    ranks = (rank_of(part) for part in value.parts) if isinstance(value, Several) else ()
    return next((rank for rank in ranks if rank is not None), None)


def length_of(value: Value, axis: int) -> int:
    """Return the length of an axis, counted from the last one; 0 where it is not known."""
    if isinstance(value, Stored):
        return value.shape[axis] if -len(value.shape) <= axis < 0 else 0
    if isinstance(value, Opaque):
        return 0
    lengths = [length_of(part, axis) for part in value.parts]
    return sum(lengths) if axis == value.axis else max(lengths, default=0)


def is_selected(value: Value | None) -> bool:
    """Tell whether run-time values have a part in it, so that it may be an activation."""
    return value is None or value.selected


def has_matrix(value: Value, scope: Scope) -> bool:
    """Tell whether any stored tensor behind a value is a matrix."""
    return any(is_matrix(dims(scope, name)) for name in sources([value]))


def is_matrix(shape: Iterable[int]) -> bool:
    """Tell whether two axes or more hold more than one value."""
    return sum(size > 1 for size in shape) > 1


def squeezed(array: np.ndarray) -> np.ndarray:
    """Return the array without its repetitions: an axis that repeats one value has length one."""
    for axis, stride in enumerate(array.strides):
        if stride == 0 and array.shape[axis] > 1:
            array = array[(slice(None),) * axis + (slice(0, 1),)]
    return array


def with_zero(value: Stored, zero: np.ndarray, name: str) -> Stored:
    """Return a value from which `zero`, which broadcasts against it, is subtracted."""
    zero = squeezed(zero)
    if not zero.any():
        return value
    point = ZeroPoint(name, zero)
    if "QuantizeLinear" in value.path:  # what is stored are real values; the integers come later
        return replace(value, doubts=(*value.doubts, point.moved()))
    lead = zero.ndim - len(value.shape)
    if lead > 0:
        zero = zero.reshape(zero.shape[lead:]) if set(zero.shape[:lead]) == {1} else zero
    zero = zero.reshape((1,) * (len(value.shape) - zero.ndim) + zero.shape)
    if value.zero is not None or zero.ndim != len(value.shape):
        return replace(value, blind=f"has a zero point '{name}' that cannot be followed")
    sizes = [1] * len(value.picks)
    kept = [axis for axis, size in enumerate(zero.shape) if size > 1]
    for axis in kept:
        origin = value.origin[axis]
        if origin is None or zero.shape[axis] != value.shape[axis]:
            return replace(value, blind=f"has a zero point '{name}' that does not fit its axes")
        sizes[origin] = zero.shape[axis]
    order = sorted(kept, key=lambda axis: value.origin[axis] or 0)
    rest = [axis for axis in range(zero.ndim) if axis not in kept]
    stored = zero.transpose([*order, *rest]).reshape(sizes)
    return replace(value, zero=ZeroPoint(name, stored.astype(np.float64)))


def along(zero: np.ndarray, axes: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """Lay a zero point out against a weight: its own axes along `axes`, blocks repeated; anything
    else as it is."""
    zero = squeezed(zero)
    if zero.size == 1:
        return zero.reshape(())
    places = axes[: zero.ndim]
    if zero.ndim == len(places) and all(-len(shape) <= axis < len(shape) for axis in places):
        sizes = [1] * len(shape)
        for axis, size in zip(places, zero.shape):
            sizes[axis] = size
        return zero.reshape(sizes)
    if zero.ndim == len(shape):
        for i, (size, whole) in enumerate(zip(zero.shape, shape)):
            if 1 < size < whole and math.prod(shape) <= 1 << 28:
                zero = zero.repeat(-(-whole // size), axis=i).take(range(whole), axis=i)
    return zero


# --- attributes ---


def entry_of(node: NodeProto, name: str) -> AttributeProto | None:
    """Return an attribute; None when it is absent."""
    return next((entry for entry in node.attribute if entry.name == name), None)


def number(node: NodeProto, name: str, default: int = 0) -> int:
    """Return an attribute that is one number."""
    entry = entry_of(node, name)
    if entry is None:
        return default
    if not entry.HasField("i"):
        raise damaged(node, name, "number")
    return int(entry.i)


def numbers(node: NodeProto, name: str) -> list[int] | None:
    """Return an attribute that is a list of numbers; None when it is absent."""
    entry = entry_of(node, name)
    if entry is None:
        return None
    if entry.type not in (entry.UNDEFINED, entry.INTS) or (not entry.ints and entry.HasField("i")):
        raise damaged(node, name, "list of numbers")
    return list(entry.ints)


def text(node: NodeProto, name: str) -> str:
    """Return an attribute that is a text; empty when it is absent."""
    entry = entry_of(node, name)
    if entry is None:
        return ""
    if not entry.HasField("s"):
        raise damaged(node, name, "text")
    return entry.s.decode("utf-8", "replace")


def damaged(node: NodeProto, name: str, kind: str) -> UsageError:
    """Return the refusal of an attribute that is not what its operator says."""
    return UsageError(
        f"The ONNX model is damaged: '{name}' of the {node.op_type} "
        f"'{label_of(node)}' is no {kind}."
    )


def label_of(node: NodeProto) -> str:
    """Return the name of a node; of one without, its first output."""
    return node.name or next(iter(node.output), "")


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
