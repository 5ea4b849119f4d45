"""One pass over a tensor's bytes in constant memory: pattern, minus zeros, non-finite values, mask, hash."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from nmsparse_deploy.errors import NmsparseError, from_os_error
from nmsparse_deploy.pattern import NMPattern, Pattern
from nmsparse_deploy.prove.group_counter import ElementType, GroupCount, GroupCounter
from nmsparse_deploy.prove.report import judge

CHUNK = 1 << 20
"""Fits the processor's second-level cache, which is what makes the pass run at memory speed."""
LARGEST_STRETCH = 16 << 20
"""A stretch must hold whole groups; a group axis far from the last one makes groups that span many bytes."""


class Source(Protocol):
    """Where a tensor's bytes come from."""

    @property
    def nbytes(self) -> int: ...

    def stretches(self, step: int) -> Iterator[np.ndarray]:
        """The bytes (uint8, 1-D) in order, `step` at a time. A stretch is valid until the next one is asked for."""
        ...


@dataclass(frozen=True)
class MemoryBytes:
    raw: np.ndarray
    """uint8, 1-D."""

    @property
    def nbytes(self) -> int:
        return self.raw.size

    def stretches(self, step: int) -> Iterator[np.ndarray]:
        for start in range(0, self.raw.size, step):
            yield self.raw[start : start + step]


@dataclass(frozen=True)
class FileBytes:
    """A range of a file, read into one buffer. Never mapped: mapped pages would count as this process's memory."""

    path: Path
    start: int
    nbytes: int

    def stretches(self, step: int) -> Iterator[np.ndarray]:
        buffer = np.empty(min(step, self.nbytes), np.uint8)
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.start)
                for done in range(0, self.nbytes, step):
                    part = buffer[: min(step, self.nbytes - done)]
                    view, got = memoryview(part), 0
                    while got < part.size:
                        more = file.readinto(view[got:])
                        if not more:
                            raise NmsparseError(f"'{self.path}' ended while it was being read.")
                        got += more
                    yield part
        except OSError as error:
            raise from_os_error(error) from error


@dataclass(frozen=True)
class Nibbles:
    """Packed 4-bit integers, lowest half first, widened to one byte each."""

    packed: Source
    nbytes: int
    signed: bool

    def stretches(self, step: int) -> Iterator[np.ndarray]:
        left = self.nbytes
        for part in self.packed.stretches(step // 2):
            wide = np.empty((part.size, 2), np.uint8)
            wide[:, 0], wide[:, 1] = part << 4, part & 0xF0
            if self.signed:
                wide.view(np.int8)[...] >>= 4
            else:
                wide >>= 4
            yield wide.reshape(-1)[: min(left, step)]
            left -= step


@dataclass(frozen=True)
class Scanned:
    counts: dict[int, GroupCount]
    """Per axis. The first axis that was asked for is always here."""
    mask_mismatch: int | None
    sha256: str | None


class Scanner:
    """Keeps the counters and their buffers from tensor to tensor."""

    def __init__(self) -> None:
        self._counters: dict[tuple[Pattern, ElementType, int], GroupCounter] = {}
        self.bytes_read = 0
        # glibc hands freed blocks below the largest one ever freed back to the program and not to the system; without
        # this the counter's temporary arrays cost page faults on every stretch (measured: 5 times slower).
        np.empty(8 * CHUNK, np.uint8)

    def scan(self, source: Source, element: ElementType, shape: tuple[int, ...], axes: Sequence[int],
             pattern: Pattern, mask: np.ndarray | None = None, digest: bool = False) -> Scanned:
        """Count along every axis of `axes` (each must pass `countable`).

        When the first stretch is in the pattern along the first axis, the other axes are dropped: they are guesses
        about the layout, and the guess is settled. `mask` holds packed bits, lowest first, in the stored order.
        """
        self.bytes_read += source.nbytes
        counters = {axis: self._counter(pattern, element, shape, axis) for axis in axes}
        totals = dict.fromkeys(axes, GroupCount())
        step = _step(element, shape, axes, pattern)
        mismatch = 0 if mask is not None else None
        sha = hashlib.sha256() if digest else None
        done = 0
        for raw in source.stretches(step):
            for axis, counter in counters.items():
                totals[axis] += counter.count(raw)
            if mask is not None and mismatch is not None:
                mismatch += _outside(raw, element, mask[done * 8 // element.bits // 8 :])
            if sha:
                sha.update(raw)
            settled = not done and len(axes) > 1 and isinstance(pattern, NMPattern) and (
                judge(totals[axes[0]], pattern) == "sparse")
            if settled:
                counters = {axes[0]: counters[axes[0]]}
                totals = {axes[0]: totals[axes[0]]}
            done += raw.size
        return Scanned(totals, mismatch, sha.hexdigest() if sha else None)

    def _counter(self, pattern: Pattern, element: ElementType, shape: tuple[int, ...], axis: int) -> GroupCounter:
        key = (pattern, element, math.prod(shape[axis + 1 :]))
        if key not in self._counters:
            if len(self._counters) > 16:
                self._counters.clear()
            self._counters[key] = GroupCounter(*key)
        return self._counters[key]


def countable(shape: tuple[int, ...], axis: int, element: ElementType, pattern: Pattern) -> bool:
    """Is the axis made of whole groups, which are close enough together to be read in constant memory?"""
    return shape[axis] % pattern.alignment == 0 and _step(element, shape, [axis], pattern) <= LARGEST_STRETCH


def _step(element: ElementType, shape: tuple[int, ...], axes: Sequence[int], pattern: Pattern) -> int:
    """Bytes per stretch: whole groups along every axis, and whole bytes of packed mask."""
    unit = math.lcm(8, *(pattern.alignment * max(1, math.prod(shape[axis + 1 :])) for axis in axes)) * element.bits // 8
    return max(unit, CHUNK // unit * unit)


def _outside(raw: np.ndarray, element: ElementType, mask: np.ndarray) -> int:
    """Non-zeros (minus zero is a zero) where the packed mask says pruned."""
    values = raw.view(f"u{element.bits // 8}")
    if element.sign:
        values = values & values.dtype.type(element.sign - 1)
    bits = np.packbits(values != 0, bitorder="little")
    wrong = bits & ~mask[: bits.size]
    return int(np.bitwise_count(wrong).sum(dtype=np.int64)) if wrong.any() else 0
