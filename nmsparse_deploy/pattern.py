"""Patterns: N:M and its unstructured sibling, one projection (scores -> mask), one check (values ->
violations).

`keep:group` means that every run of `group` consecutive values along the group axis holds at most
`keep` non-zeros; 2:4 keeps two of four. The group axis is always the reduction axis of the matrix
product. Some papers count zeros instead; here N is what is kept, so 1:4 keeps one value.
`unstructured:ratio` asks for a share of zeros and nothing else; values alone cannot show it, so it
is always checked against the stored mask.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from nmsparse_deploy.errors import UsageError


@dataclass(frozen=True, order=True)
class NMPattern:
    """`keep` non-zeros in every aligned run of `group` values."""

    keep: int
    group: int

    def __post_init__(self) -> None:
        if not 1 <= self.keep < self.group:
            raise UsageError(
                f"'{self.keep}:{self.group}' is not a pattern; keep:group needs 1 <= keep < group."
            )

    @classmethod
    def parse(cls, text: str) -> NMPattern:
        """Return `NMPattern(2, 4)` for `"2:4"`. Raises `UsageError` for anything else."""
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
        """The number that the length of the group axis must be a multiple of."""
        return self.group

    @property
    def block_size(self) -> int:
        """Columns that a sweep prunes at a time."""
        return self.group

    def implies(self, other: NMPattern) -> bool:
        """Return whether every tensor with this pattern also has `other` (2:8 implies 2:4; 4:8 does
        not)."""
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

BLOCK_SIZE = 128
"""Columns that SparseGPT prunes with one threshold when the mask is unstructured."""

Scope = Literal["layer", "row", "columns"]
"""Which values compete for the places of an unstructured mask: all of the matrix, those of one row
(along the reduction axis), or those of `BLOCK_SIZE` consecutive columns over all rows. N:M has its
groups and needs no scope."""


@dataclass(frozen=True)
class Unstructured:
    """A share `ratio` of zeros, wherever they fall. No sparse tensor core runs it."""

    ratio: float

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise UsageError(
                f"'{self.ratio}' is no share of zeros; unstructured:RATIO needs 0 < RATIO < 1."
            )

    def __str__(self) -> str:
        return f"unstructured:{self.ratio}"

    @property
    def density(self) -> float:
        return 1 - self.ratio

    @property
    def alignment(self) -> int:
        return 1

    @property
    def block_size(self) -> int:
        return BLOCK_SIZE

    def implies(self, other: NMPattern) -> bool:
        """Return False: a share of zeros promises nothing about any group."""
        return False

    def kept(self, count: int) -> int:
        """Return how many of `count` competing values stay."""
        return round(self.density * count)

    def allows(self, kept: int, lines: int, length: int) -> bool:
        """Return whether a mask over `lines` x `length` values can keep `kept` of them, whatever
        its scope.

        Every contest rounds by half a value at most, and no scope has more contests than the matrix
        has rows and columns together.
        """
        return abs(kept - self.density * lines * length) <= (lines + length) / 2


Pattern = NMPattern | Unstructured


def parse_pattern(text: str) -> Pattern:
    """Read `"2:4"` or `"unstructured:0.5"` (the share of zeros). Raises `UsageError` for anything
    else."""
    if not text.strip().startswith("unstructured"):
        return NMPattern.parse(text)
    match = re.fullmatch(r"\s*unstructured\s*:\s*(\d*\.?\d+(?:e-?\d+)?)\s*", text)
    if match is None:
        raise UsageError(
            f"'{text}' is not a pattern; write unstructured:RATIO, for example unstructured:0.5."
        )
    return Unstructured(float(match[1]))
