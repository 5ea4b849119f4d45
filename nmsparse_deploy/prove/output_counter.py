"""Count the outputs of a weight that hold wholly, and tell whether chance explains how many do.

A GEMM has one row of groups per output. In a tensor whose zeros lie anywhere, a row with z non-zeros
among its g * G places holds with the probability

    C(z) / binomial(g * G, z),    C(z) = [t^z] f(t)^G,    f(t) = sum over j <= keep of binomial(g, j) t^j

given z, whatever z the row has: rows may differ in their sparsity, and one without non-zeros holds
for certain and tells nothing. For any t > 0, f(t)^G / t^z bounds C(z) from above (and is C(z) for a
row that is full up to the pattern), so no polynomial has to be multiplied out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from nmsparse_deploy.pattern import NMPattern

MAX_VALUES = 1 << 20
"""Rows of more values than this are not counted; the histogram has a place for every number of
non-zeros."""
FALSE_ALARM = 5e-5
"""How often a tensor without the pattern may have as many whole rows as one that is called a near
miss."""
TELLING = (0.5, 1e-2, 1e-4, 1e-6)
"""Rows that hold by chance more often than this are left out, for each of these in turn."""


@dataclass(frozen=True)
class OutputCount:
    """The rows of a tensor along one axis."""

    outputs: int
    broken: int
    """Rows with a group outside the pattern."""
    first_broken: int | None
    groups: int
    """Groups per row."""
    rows: np.ndarray
    """[values per row + 1]: how many rows have that many non-zeros."""
    whole: np.ndarray
    """[values per row + 1]: how many of these hold."""

    def beyond_chance(self, pattern: NMPattern) -> bool:
        """Tell whether more rows hold wholly than zeros strewn at random explain."""
        most = pattern.keep * self.groups
        nonzeros = np.flatnonzero(self.rows[: most + 1])
        nonzeros = nonzeros[nonzeros > 0]
        if not self.whole[nonzeros].any():
            return False
        log_chance = _log_chance(nonzeros, self.groups, pattern)
        return any(
            _tail(self.rows[nonzeros][telling], self.whole[nonzeros][telling], log_chance[telling])
            < math.log(FALSE_ALARM / len(TELLING))
            for telling in (log_chance < math.log(share) for share in TELLING)
        )


class OutputCounter:
    """A counter of whole rows in a stream of groups; its memory is that of one row of outputs."""

    def __init__(self, shape: tuple[int, ...], axis: int, pattern: NMPattern) -> None:
        self.keep = pattern.keep
        self.length, self.inner, self.fold = shape[axis] // pattern.group, 1, 1
        behind = math.prod(shape[axis + 1 :])
        if len(shape) > 3 and axis == 1:  # an output of a convolution: all of its kernel
            self.length *= behind
        else:
            self.inner = behind
        if len(shape) > 3 and axis == 0:  # the same, transposed
            self.fold = math.prod(shape[2:])
        self.values = self.length * self.fold * pattern.group
        self.rows = np.zeros(self.values + 1, np.int64)
        self.whole = np.zeros(self.values + 1, np.int64)
        self.outputs = self.broken = 0
        self.first_broken: int | None = None
        self._lines = 0
        self._nonzeros = np.zeros(self.inner, np.int64)
        self._fullest = np.zeros(self.inner, np.int64)

    def add(self, counts: np.ndarray) -> None:
        """Take the non-zeros of the next groups, in memory order, whole lines of them."""
        lines = counts.reshape(-1, self.inner)
        while len(lines):
            whole = 0 if self._lines else len(lines) // self.length
            if whole:
                block = lines[: whole * self.length].reshape(whole, self.length, self.inner)
                self._finish(block.sum(1, dtype=np.uint32), block.max(1))
                lines = lines[whole * self.length :]
                continue
            part = lines[: self.length - self._lines]
            self._nonzeros += part.sum(0, dtype=np.uint32)
            np.maximum(self._fullest, part.max(0), out=self._fullest)
            self._lines += len(part)
            if self._lines == self.length:
                self._finish(self._nonzeros, self._fullest)
                self._nonzeros[:] = self._fullest[:] = self._lines = 0
            lines = lines[len(part) :]

    def _finish(self, nonzeros: np.ndarray, fullest: np.ndarray) -> None:
        """Take finished rows: the non-zeros of each, and those of its fullest group."""
        nonzeros = nonzeros.reshape(-1, self.fold).sum(1, dtype=np.int64)
        broken = fullest.reshape(-1, self.fold).max(1) > self.keep
        self.rows += np.bincount(nonzeros, minlength=self.values + 1)
        self.whole += np.bincount(nonzeros[~broken], minlength=self.values + 1)
        if self.first_broken is None and broken.any():
            self.first_broken = self.outputs + int(broken.argmax())
        self.outputs += broken.size
        self.broken += int(np.count_nonzero(broken))

    def result(self) -> OutputCount:
        """Return the counts of what was added."""
        return OutputCount(
            self.outputs,
            self.broken,
            self.first_broken,
            self.length * self.fold,
            self.rows,
            self.whole,
        )


def has_rows(shape: tuple[int, ...], axis: int) -> bool:
    """Tell whether a tensor has several outputs that are short enough to be counted one by one."""
    values = math.prod(shape[axis:]) if len(shape) > 3 and axis == 1 else shape[axis]
    if len(shape) > 3 and axis == 0:
        values *= math.prod(shape[2:])
    return 0 < values <= MAX_VALUES and math.prod(shape) >= 2 * values


def _log_chance(nonzeros: np.ndarray, groups: int, pattern: NMPattern) -> np.ndarray:
    """Return the logarithm of how often a row with so many non-zeros holds by chance, from
    above."""
    size, keep = pattern.group, pattern.keep
    ways = np.array([math.comb(size, j) for j in range(keep + 1)], np.float64)
    powers = np.arange(keep + 1)
    low, high = np.full(nonzeros.size, -40.0), np.full(nonzeros.size, 40.0)
    for _ in range(60):  # the bound is tightest where f's mean power is that of the row
        log_t = (low + high) / 2
        terms = ways * np.exp((powers - keep) * log_t[:, None])  # f(t) / t^keep, which is finite
        above = (terms * powers).sum(1) / terms.sum(1) * groups > nonzeros
        low, high = np.where(above, low, log_t), np.where(above, log_t, high)
    held = groups * (np.log(terms.sum(1)) + keep * log_t) - nonzeros * log_t
    held = np.where(nonzeros == keep * groups, groups * math.log(ways[-1]), held)
    places = size * groups
    everywhere = np.array(
        [
            math.lgamma(places + 1) - math.lgamma(z + 1) - math.lgamma(places - z + 1)
            for z in nonzeros.tolist()
        ]
    )
    log_chance: np.ndarray = np.minimum(held - everywhere, 0.0)
    return log_chance


def _tail(rows: np.ndarray, whole: np.ndarray, log_chance: np.ndarray) -> float:
    """Bound the logarithm of the probability that so many rows hold or more (Hoeffding 1963,
    theorem 1, which allows each row its own chance)."""
    n, k = int(rows.sum()), int(whole.sum())
    if not k:
        return 0.0
    peak = float(log_chance.max())
    log_mean = peak + math.log(float((rows * np.exp(log_chance - peak)).sum()) / n)
    share = k / n
    if math.log(share) <= log_mean:
        return 0.0
    rest = (1 - share) * math.log((1 - share) / -math.expm1(log_mean)) if k < n else 0.0
    return -n * (share * (math.log(share) - log_mean) + rest)
