"""Patterns: N:M and its unstructured sibling, one projection (scores -> mask), one check (values -> violations).

`keep:group` means that every run of `group` consecutive values along the group axis holds at most `keep` non-zeros;
2:4 keeps two of four. The group axis is always the reduction axis of the matrix product. Some papers count zeros
instead; here N is what is kept, so 1:4 keeps one value. `unstructured:ratio` asks for a share of zeros and nothing
else; values alone cannot show it, so it is always checked against the stored mask.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Literal

import numpy as np
import torch

from nmsparse_deploy.errors import UsageError


@dataclass(frozen=True, order=True)
class NMPattern:
    """`keep` non-zeros in every aligned run of `group` values."""

    keep: int
    group: int

    def __post_init__(self) -> None:
        if not 1 <= self.keep < self.group:
            raise UsageError(f"'{self.keep}:{self.group}' is not a pattern; keep:group needs 1 <= keep < group.")

    @classmethod
    def parse(cls, text: str) -> NMPattern:
        """`"2:4"` -> `NMPattern(2, 4)`. Raises `UsageError` on anything else."""
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
        if match is None:
            raise UsageError(f"'{text}' is not a pattern; write keep:group, for example 2:4.")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}"

    @property
    def zeros(self) -> int:
        return self.group - self.keep

    @property
    def density(self) -> float:
        return self.keep / self.group

    @property
    def alignment(self) -> int:
        """What the length of the group axis must be a multiple of."""
        return self.group

    @property
    def stretch(self) -> int:
        """Columns that a sweep prunes at a time."""
        return self.group

    def implies(self, other: NMPattern) -> bool:
        """Does every tensor with this pattern also have `other`? (2:8 implies 2:4; 4:8 does not.)"""
        period = math.lcm(self.group, other.group)
        for start in range(0, period, other.group):
            stop = start + other.group
            most = 0
            for first in range(start - start % self.group, stop, self.group):
                overlap = min(stop, first + self.group) - max(start, first)
                most += min(self.keep, overlap)
            if most > other.keep:
                return False
        return True


TWO_FOUR = NMPattern(2, 4)
"""The only pattern that sparse tensor cores execute."""

STRETCH = 128
"""Columns that SparseGPT prunes with one threshold when the mask is unstructured."""

Scope = Literal["layer", "row", "stretch"]
"""Which values compete for the places of an unstructured mask: all of the matrix, those of one row (along the reduction
axis), or those of `STRETCH` consecutive columns over all rows. N:M has its groups and needs no scope."""


@dataclass(frozen=True)
class Unstructured:
    """A share `ratio` of zeros, wherever they fall. No sparse tensor core runs it."""

    ratio: float

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise UsageError(f"'{self.ratio}' is no share of zeros; unstructured:RATIO needs 0 < RATIO < 1.")

    def __str__(self) -> str:
        return f"unstructured:{self.ratio}"

    @property
    def density(self) -> float:
        return 1 - self.ratio

    @property
    def alignment(self) -> int:
        return 1

    @property
    def stretch(self) -> int:
        return STRETCH

    def implies(self, other: NMPattern) -> bool:
        """A share of zeros promises nothing about any group."""
        return False

    def kept(self, count: int) -> int:
        """How many of `count` competing values stay."""
        return round(self.density * count)

    def allows(self, kept: int, lines: int, length: int) -> bool:
        """Can a mask over `lines` x `length` values keep `kept` of them, whatever its scope?

        Every contest rounds by half a value at most, and no scope has more contests than the matrix has rows and
        columns together.
        """
        return abs(kept - self.density * lines * length) <= (lines + length) / 2


Pattern = NMPattern | Unstructured


def parse_pattern(text: str) -> Pattern:
    """`"2:4"` or `"unstructured:0.5"` (the share of zeros). Raises `UsageError` on anything else."""
    if not text.strip().startswith("unstructured"):
        return NMPattern.parse(text)
    match = re.fullmatch(r"\s*unstructured\s*:\s*(\d*\.?\d+(?:e-?\d+)?)\s*", text)
    if match is None:
        raise UsageError(f"'{text}' is not a pattern; write unstructured:RATIO, for example unstructured:0.5.")
    return Unstructured(float(match[1]))


def project(scores: torch.Tensor, pattern: Pattern, axis: int = -1, scope: Scope = "layer") -> torch.Tensor:
    """Keep the `keep` highest scores of every group along `axis`; equal scores keep the lowest index.

    An unstructured pattern keeps exactly `round(density * count)` of the values that compete in `scope`; there an index
    counts along the rows, row after row. Returns a bool mask of the shape of `scores`, True = keep. Raises `ValueError`
    when the axis is not divisible by the group or a score is NaN.
    """
    if scores.shape[axis] % pattern.alignment:
        raise ValueError(f"axis {axis} of shape {tuple(scores.shape)} is not divisible by {pattern.alignment}")
    if torch.isnan(scores).any():
        raise ValueError("scores contain NaN")
    lines = scores.movedim(axis, -1)
    if isinstance(pattern, Unstructured):
        kept = [_highest(contest, pattern.kept(contest.shape[-1])).view(part.shape)
                for part, contest in _contests(lines, scope)]
        return torch.cat(kept, -1).movedim(-1, axis)
    groups = lines.unflatten(-1, (-1, pattern.group))
    order = groups.argsort(dim=-1, descending=True, stable=True)[..., : pattern.keep]
    mask = torch.zeros(groups.shape, dtype=torch.bool, device=scores.device).scatter_(-1, order, True)
    return mask.flatten(-2).movedim(-1, axis)


def _contests(lines: torch.Tensor, scope: Scope) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The parts of `lines` side by side, each with its values as `[contests, competitors]`."""
    if scope == "row":
        return [(lines, lines.reshape(-1, lines.shape[-1]))]
    parts = lines.split(STRETCH, -1) if scope == "stretch" else (lines,)
    return [(part, part.reshape(1, -1)) for part in parts]


def _highest(contests: torch.Tensor, keep: int) -> torch.Tensor:
    """Which `keep` values of every row are the highest, by one threshold a row; sorting a whole layer is far slower."""
    if not keep:
        return torch.zeros_like(contests, dtype=torch.bool)
    threshold = contests.kthvalue(contests.shape[-1] - keep + 1, dim=-1, keepdim=True).values
    above, level = contests > threshold, contests == threshold
    places = keep - above.sum(-1, keepdim=True)
    return above | (level & (level.cumsum(-1, dtype=torch.int32) <= places))


def mask_follows(mask: torch.Tensor, pattern: Pattern, axis: int = -1, scope: Scope | None = None) -> bool:
    """Does a bool mask keep exactly `keep` of every group along `axis`?

    An unstructured one has to keep the exact count in every contest of `scope`; where the scope is not known, a count
    in all that the rounding of some scope allows.
    """
    lines = mask.movedim(axis, -1)
    if isinstance(pattern, NMPattern):
        return bool((lines.unflatten(-1, (-1, pattern.group)).sum(-1) == pattern.keep).all())
    if scope is None:
        return pattern.allows(int(mask.sum()), lines[..., 0].numel(), lines.shape[-1])
    return all(bool((contest.sum(-1) == pattern.kept(contest.shape[-1])).all())
               for _, contest in _contests(lines, scope))


# --- the check -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ElementType:
    """How one stored value looks in memory: enough to tell zero, minus zero and non-finite without converting it.

    `sign` is the sign bit (0 for integers, which have no minus zero); `inf` is the smallest magnitude that is not
    finite (0 when every magnitude is).
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
    """What a stretch of values looks like under a pattern, which has no groups when it is unstructured. Adds up over
    stretches."""

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
        return GroupCount(self.groups + other.groups, self.bad + other.bad, self.sparser + other.sparser,
                          self.nonzeros + other.nonzeros, self.negative_zeros + other.negative_zeros,
                          self.nonfinite + other.nonfinite, first)


class GroupCounter:
    """Counts violations in a stream of raw values, many values per machine word.

    A 64-bit word holds several lanes. Adding `2**(bits-1) - 1` to a lane's magnitude sets its top bit exactly when the
    magnitude is not zero, and cannot carry into the next lane, so one addition tests all lanes. Buffers are reused from
    call to call.

    `inner` is the distance, in values, between neighbours of a group: 1 when the group axis is the last one, otherwise
    the product of the axes behind it.
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
        """A stretch of whole groups that fits the processor's cache."""
        unit = self.pattern.alignment * self.inner * self.element.bits // 8
        return max(unit, (1 << 20) // unit * unit)

    @cached_property
    def _words(self) -> dict[str, np.generic]:
        """The element's constants repeated in every lane of a word."""
        bits, word = self.element.bits, np.dtype(f"u{self._word_bits // 8}").type
        repeat = sum(1 << shift for shift in range(0, self._word_bits, bits))
        top = 1 << (bits - 1)
        inf = self.element.inf or top
        return {"top": word(top * repeat), "low": word((top - 1) * repeat), "inf": word((top - inf) * repeat)}

    def count(self, values: np.ndarray) -> GroupCount:
        """Count one contiguous stretch of whole groups, given as its raw bytes (uint8, 1-D)."""
        if values.nbytes * 8 % (self.pattern.alignment * self.inner * self.element.bits):
            raise ValueError("a stretch must hold whole groups")
        return self._count_lanes(values) if self._word_bits else self._count_any(values)

    def _buffer(self, name: str, like: np.ndarray, dtype: type | None = None) -> np.ndarray:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < like.size:
            buffer = self._buffers[name] = np.empty(like.size, dtype or like.dtype)
        return buffer[: like.size]

    def _count_lanes(self, raw: np.ndarray) -> GroupCount:
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
        return self._summary(counts, negative_zeros, nonfinite)

    def _count_any(self, raw: np.ndarray) -> GroupCount:
        """Any group size, any axis: one comparison per value."""
        x = raw.view(f"u{self.element.bits // 8}")
        magnitude = x & x.dtype.type(~self.element.sign & ((1 << self.element.bits) - 1))
        nonzero = magnitude != 0
        negative_zeros = int(np.count_nonzero((x != 0) & ~nonzero))
        nonfinite = int(np.count_nonzero(magnitude >= self.element.inf)) if self.element.inf else 0
        counts = nonzero.reshape(-1, self.pattern.alignment, self.inner).sum(axis=1, dtype=np.uint16).reshape(-1)
        return self._summary(counts, negative_zeros, nonfinite)

    def _summary(self, counts: np.ndarray, negative_zeros: int, nonfinite: int) -> GroupCount:
        nonzeros = int(counts.sum(dtype=np.int64))
        if isinstance(self.pattern, Unstructured):
            return GroupCount(nonzeros=nonzeros, negative_zeros=negative_zeros, nonfinite=nonfinite)
        keep = self.pattern.keep
        over = counts > keep
        bad = int(np.count_nonzero(over))
        return GroupCount(counts.size, bad, int(np.count_nonzero(counts < keep)), nonzeros, negative_zeros,
                          nonfinite, int(over.argmax()) if bad else None)


def check(values: torch.Tensor | np.ndarray, pattern: Pattern, axis: int = -1) -> GroupCount:
    """Check a tensor in memory along `axis`. Raises `ValueError` when the axis is not divisible by the group."""
    if isinstance(values, torch.Tensor):
        name = TORCH_ELEMENTS[values.dtype]
        raw = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    else:
        name = _NUMPY_NAMES[values.dtype.str[1:]]
        raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    axis %= values.ndim
    if values.shape[axis] % pattern.alignment:
        raise ValueError(f"axis {axis} of shape {tuple(values.shape)} is not divisible by {pattern.alignment}")
    counter = GroupCounter(pattern, ELEMENT_TYPES[name], math.prod(values.shape[axis + 1 :]))
    step = counter.chunk_bytes
    return sum((counter.count(raw[i : i + step]) for i in range(0, raw.size, step)), GroupCount())


def group_origin(number: int, shape: tuple[int, ...], axis: int, pattern: Pattern) -> tuple[int, ...]:
    """Coordinates of the first value of group `number` (as `GroupCount.first_bad` numbers them)."""
    axis %= len(shape)
    grid = (*shape[:axis], shape[axis] // pattern.alignment, *shape[axis + 1 :])
    index = [int(i) for i in np.unravel_index(number, grid)]
    index[axis] *= pattern.alignment
    return tuple(index)


TORCH_ELEMENTS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8", torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
}
_NUMPY_NAMES = {"f8": "F64", "f4": "F32", "f2": "F16", "i1": "I8", "u1": "U8", "i2": "I16", "i4": "I32", "i8": "I64"}
