"""Count violations of a pattern in raw values, many values per machine word."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np
import torch

from nmsparse_deploy.pattern import Pattern, Unstructured
from nmsparse_deploy.prove.output_counter import OutputCounter


@dataclass(frozen=True)
class ElementType:
    """The look of a stored value in memory: enough to tell zero, minus zero and non-finite without
    converting it.

    `sign` is the sign bit (0 for integers, which have no minus zero); `inf` is the smallest
    magnitude that is not finite (0 when every magnitude is).
    """

    name: str
    bits: int
    sign: int = 0
    inf: int = 0


ELEMENT_TYPES = {
    t.name: t
    for t in (
        ElementType("F64", 64, 1 << 63, 0x7FF0 << 48),
        ElementType("F32", 32, 1 << 31, 0x7F80 << 16),
        ElementType("F16", 16, 1 << 15, 0x7C00),
        ElementType("BF16", 16, 1 << 15, 0x7F80),
        ElementType("F8_E4M3", 8, 1 << 7, 0x7F),
        ElementType("F8_E5M2", 8, 1 << 7, 0x7C),
        ElementType("I8", 8),
        ElementType("U8", 8),
        ElementType("I16", 16),
        ElementType("I32", 32),
        ElementType("I64", 64),
    )
}
"""By the names that safetensors uses."""


@dataclass(frozen=True)
class GroupCount:
    """The counts of a chunk of values under a pattern, without groups when that is unstructured;
    chunks add up."""

    groups: int = 0
    bad: int = 0
    """Groups with more than `keep` non-zeros."""
    sparser: int = 0
    """Groups with fewer than `keep` non-zeros."""
    nonzeros: int = 0
    negative_zeros: int = 0
    nonfinite: int = 0
    first_bad: int | None = None
    """Number of the first bad group, in memory order (`group_origin` turns it into coordinates)."""

    def __add__(self, other: GroupCount) -> GroupCount:
        first = self.first_bad
        if first is None and other.first_bad is not None:
            first = self.groups + other.first_bad
        return GroupCount(
            self.groups + other.groups,
            self.bad + other.bad,
            self.sparser + other.sparser,
            self.nonzeros + other.nonzeros,
            self.negative_zeros + other.negative_zeros,
            self.nonfinite + other.nonfinite,
            first,
        )


class GroupCounter:
    """A counter of violations in a stream of raw values, many values per machine word.

    A 64-bit word holds several lanes. Adding `2**(bits-1) - 1` to a lane's magnitude sets its top
    bit exactly when the magnitude is not zero, and cannot carry into the next lane, so one addition
    tests all lanes. Buffers are reused from call to call.

    `inner` is the distance, in values, between neighbours of a group: 1 when the group axis is the
    last one, otherwise the product of the axes behind it.
    """

    def __init__(self, pattern: Pattern, element: ElementType, inner: int = 1) -> None:
        self.pattern = pattern
        self.element = element
        self.inner = inner
        group_bits = pattern.alignment * element.bits
        lanes_fit = inner == 1 and (group_bits % 64 == 0 or group_bits in (16, 32))
        self._word_bits = min(64, group_bits) if lanes_fit else 0
        self._buffers: dict[str, np.ndarray] = {}

    @property
    def chunk_bytes(self) -> int:
        """Bytes of whole groups that fit the processor's cache."""
        unit = self.pattern.alignment * self.inner * self.element.bits // 8
        return max(unit, (1 << 20) // unit * unit)

    @cached_property
    def _words(self) -> dict[str, np.generic]:
        """The element's constants repeated in every lane of a word."""
        bits, word = self.element.bits, np.dtype(f"u{self._word_bits // 8}").type
        repeat = sum(1 << shift for shift in range(0, self._word_bits, bits))
        top = 1 << (bits - 1)
        inf = self.element.inf or top
        return {
            "top": word(top * repeat),
            "low": word((top - 1) * repeat),
            "inf": word((top - inf) * repeat),
        }

    def count(self, values: np.ndarray, outputs: OutputCounter | None = None) -> GroupCount:
        """Count one contiguous chunk of whole groups, given as its raw bytes (uint8, 1-D), and hand
        the non-zeros of each group to `outputs`."""
        if values.nbytes * 8 % (self.pattern.alignment * self.inner * self.element.bits):
            raise ValueError("a chunk must hold whole groups")
        count = self._count_lanes if self._word_bits else self._count_any
        counts, negative_zeros, nonfinite = count(values)
        if outputs is not None:
            outputs.add(counts)
        return self._summary(counts, negative_zeros, nonfinite)

    def _buffer(self, name: str, like: np.ndarray, dtype: type | None = None) -> np.ndarray:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < like.size:
            buffer = self._buffers[name] = np.empty(like.size, dtype or like.dtype)
        return buffer[: like.size]

    def _count_lanes(self, raw: np.ndarray) -> tuple[np.ndarray, int, int]:
        """Return the non-zeros of each group, and how many minus zeros and non-finite values there
        are."""
        x = raw.view(f"u{self._word_bits // 8}")
        w = self._words
        flags, scratch = self._buffer("flags", x), self._buffer("scratch", x)
        if self.element.sign:
            np.bitwise_and(x, w["low"], out=scratch)
            np.add(scratch, w["low"], out=flags)
        else:  # an integer's top bit is part of its magnitude
            np.bitwise_and(x, w["low"], out=flags)
            np.add(flags, w["low"], out=flags)
            np.bitwise_or(flags, x, out=flags)
        np.bitwise_and(flags, w["top"], out=flags)
        nonfinite = negative_zeros = 0
        if self.element.inf:
            np.add(scratch, w["inf"], out=scratch)
            if np.bitwise_or.reduce(scratch) & w["top"]:
                nonfinite = int(np.bitwise_count(scratch & w["top"]).sum(dtype=np.int64))
        if self.element.sign:  # a set sign bit over a zero magnitude
            np.bitwise_or(x, flags, out=scratch)
            np.bitwise_xor(scratch, flags, out=scratch)
            if np.bitwise_or.reduce(scratch) & w["top"]:
                negative_zeros = int(np.bitwise_count(scratch & w["top"]).sum(dtype=np.int64))
        counts = np.bitwise_count(flags, out=self._buffer("counts", x, np.uint8))
        words_per_group = self.pattern.alignment * self.element.bits // self._word_bits
        if words_per_group > 1:
            strided = [counts[i::words_per_group] for i in range(words_per_group)]
            counts = reduce(np.add, strided[1:], strided[0].astype(np.uint16))
        return counts, negative_zeros, nonfinite

    def _count_any(self, raw: np.ndarray) -> tuple[np.ndarray, int, int]:
        """Return the same for any group size along any axis, by one comparison per value."""
        x = raw.view(f"u{self.element.bits // 8}")
        magnitude = x & x.dtype.type(~self.element.sign & ((1 << self.element.bits) - 1))
        nonzero = magnitude != 0
        negative_zeros = int(np.count_nonzero((x != 0) & ~nonzero))
        nonfinite = int(np.count_nonzero(magnitude >= self.element.inf)) if self.element.inf else 0
        counts = (
            nonzero.reshape(-1, self.pattern.alignment, self.inner)
            .sum(axis=1, dtype=np.uint16)
            .reshape(-1)
        )
        return counts, negative_zeros, nonfinite

    def _summary(self, counts: np.ndarray, negative_zeros: int, nonfinite: int) -> GroupCount:
        nonzeros = int(counts.sum(dtype=np.int64))
        if isinstance(self.pattern, Unstructured):
            return GroupCount(nonzeros=nonzeros, negative_zeros=negative_zeros, nonfinite=nonfinite)
        keep = self.pattern.keep
        over = counts > keep
        bad = int(np.count_nonzero(over))
        return GroupCount(
            counts.size,
            bad,
            int(np.count_nonzero(counts < keep)),
            nonzeros,
            negative_zeros,
            nonfinite,
            int(over.argmax()) if bad else None,
        )


def check(values: torch.Tensor | np.ndarray, pattern: Pattern, axis: int = -1) -> GroupCount:
    """Check a tensor in memory along `axis`. Raises `ValueError` when the axis is not divisible by
    the group."""
    if isinstance(values, torch.Tensor):
        name = TORCH_ELEMENTS[values.dtype]
        raw = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    else:
        name = _NUMPY_NAMES[values.dtype.str[1:]]
        raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    axis %= values.ndim
    if values.shape[axis] % pattern.alignment:
        raise ValueError(
            f"axis {axis} of shape {tuple(values.shape)} is not divisible by {pattern.alignment}"
        )
    counter = GroupCounter(pattern, ELEMENT_TYPES[name], math.prod(values.shape[axis + 1 :]))
    step = counter.chunk_bytes
    return sum((counter.count(raw[i : i + step]) for i in range(0, raw.size, step)), GroupCount())


def group_origin(
    number: int, shape: tuple[int, ...], axis: int, pattern: Pattern
) -> tuple[int, ...]:
    """Return the coordinates of the first value of group `number` (as `GroupCount.first_bad`
    numbers them)."""
    axis %= len(shape)
    grid = (*shape[:axis], shape[axis] // pattern.alignment, *shape[axis + 1 :])
    index = [int(i) for i in np.unravel_index(number, grid)]
    index[axis] *= pattern.alignment
    return tuple(index)


TORCH_ELEMENTS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
}


_NUMPY_NAMES = {
    "f8": "F64",
    "f4": "F32",
    "f2": "F16",
    "i1": "I8",
    "u1": "U8",
    "i2": "I16",
    "i4": "I32",
    "i8": "I64",
}
