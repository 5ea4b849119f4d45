"""One pass over a tensor's bytes in constant memory: pattern, minus zeros, non-finite values, mask,
hash."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from nmsparse_deploy.errors import NmsparseError, from_os_error
from nmsparse_deploy.pattern import NMPattern, Pattern
from nmsparse_deploy.prove.group_counter import ElementType, GroupCount, GroupCounter
from nmsparse_deploy.prove.output_counter import OutputCount, OutputCounter, has_rows
from nmsparse_deploy.prove.report import judge

CHUNK = 1 << 20
"""Fits the processor's second-level cache, which is what makes the pass run at memory speed."""
MAX_CHUNK = 16 << 20
"""A chunk must hold whole groups; a group axis far from the last one makes groups that span many
bytes."""


class ByteSource(Protocol):
    """A place where a tensor's bytes come from."""

    @property
    def nbytes(self) -> int:
        """How many bytes there are."""
        ...

    def chunks(self, size: int) -> Iterator[np.ndarray]:
        """Yield the bytes (uint8, 1-D) in order, `size` at a time. A chunk is valid until the next
        one is asked for."""
        ...


@dataclass(frozen=True)
class MemoryBytes:
    """Bytes in memory."""

    raw: np.ndarray
    """uint8, 1-D."""

    @property
    def nbytes(self) -> int:
        """How many bytes there are."""
        return self.raw.size

    def chunks(self, size: int) -> Iterator[np.ndarray]:
        """Yield slices of the bytes."""
        for start in range(0, self.raw.size, size):
            yield self.raw[start : start + size]


@dataclass(frozen=True)
class FileBytes:
    """A range of a file, read into one buffer. Never mapped: mapped pages would count as this
    process's memory."""

    path: Path
    start: int
    nbytes: int

    def chunks(self, size: int) -> Iterator[np.ndarray]:
        """Read the file a chunk at a time. Raises `NmsparseError` when it ends early or cannot be
        read."""
        buffer = np.empty(min(size, self.nbytes), np.uint8)
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.start)
                for done in range(0, self.nbytes, size):
                    chunk = buffer[: min(size, self.nbytes - done)]
                    view, filled = memoryview(chunk), 0
                    while filled < chunk.size:
                        count = file.readinto(view[filled:])
                        if not count:
                            raise NmsparseError(f"'{self.path}' ended while it was being read.")
                        filled += count
                    yield chunk
        except OSError as error:
            raise from_os_error(error) from error


@dataclass(frozen=True)
class Nibbles:
    """Packed 4-bit integers, lowest half first, widened to one byte each."""

    packed: ByteSource
    nbytes: int
    signed: bool

    def chunks(self, size: int) -> Iterator[np.ndarray]:
        """Yield the widened values."""
        left = self.nbytes
        for pairs in self.packed.chunks(size // 2):
            wide = np.empty((pairs.size, 2), np.uint8)
            wide[:, 0], wide[:, 1] = pairs << 4, pairs & 0xF0
            if self.signed:
                wide.view(np.int8)[...] >>= 4
            else:
                wide >>= 4
            yield wide.reshape(-1)[: min(left, size)]
            left -= size


def stored_digest(source: ByteSource) -> str:
    """Return the SHA-256 of the bytes as they are stored: of packed integers, packed."""
    stored, sha = source.packed if isinstance(source, Nibbles) else source, hashlib.sha256()
    for chunk in stored.chunks(CHUNK):
        sha.update(chunk)
    return sha.hexdigest()


@dataclass(frozen=True)
class Scanned:
    """The findings of one pass over a tensor."""

    counts: dict[int, GroupCount]
    """Per axis. The first axis that was asked for is always here."""
    mask_mismatch: int | None
    sha256: str | None
    outputs: dict[int, OutputCount] = field(default_factory=dict)
    """Per axis, where there was no mask and the tensor has rows to count."""


class Scanner:
    """Counters and their buffers, kept from tensor to tensor."""

    def __init__(self) -> None:
        self._counters: dict[tuple[Pattern, ElementType, int], GroupCounter] = {}
        self.bytes_read = 0
        # glibc hands freed blocks below the largest one ever freed back to the program and not to
        # the system; without this the counter's temporary arrays cost page faults on every chunk
        # (measured: 5 times slower).
        np.empty(8 * CHUNK, np.uint8)

    def scan(
        self,
        source: ByteSource,
        element: ElementType,
        shape: tuple[int, ...],
        axes: Sequence[int],
        pattern: Pattern,
        mask: np.ndarray | None = None,
        digest: bool = False,
    ) -> Scanned:
        """Count along every axis of `axes` (each must pass `countable`).

        When the first chunk is in the pattern along the first axis, the other axes are dropped:
        they are guesses about the layout, and the guess is settled. `mask` holds packed bits,
        lowest first, in the stored order.
        """
        self.bytes_read += source.nbytes
        counters = {axis: self._counter(pattern, element, shape, axis) for axis in axes}
        totals = dict.fromkeys(axes, GroupCount())
        rows = {
            axis: OutputCounter(shape, axis, pattern)
            for axis in axes
            if mask is None and isinstance(pattern, NMPattern) and has_rows(shape, axis)
        }
        size = _chunk_size(element, shape, axes, pattern)
        mismatch = 0 if mask is not None else None
        sha = hashlib.sha256() if digest and not isinstance(source, Nibbles) else None
        done = 0
        for chunk in source.chunks(size):
            for axis, counter in counters.items():
                totals[axis] += counter.count(chunk, rows.get(axis))
            if mask is not None and mismatch is not None:
                mismatch += _outside(chunk, element, mask[done * 8 // element.bits // 8 :])
            if sha:
                sha.update(chunk)
            settled = (
                not done
                and len(axes) > 1
                and isinstance(pattern, NMPattern)
                and (judge(totals[axes[0]], pattern) == "sparse")
            )
            if settled:
                counters = {axes[0]: counters[axes[0]]}
                totals = {axes[0]: totals[axes[0]]}
            done += chunk.size
        return Scanned(
            totals,
            mismatch,
            sha.hexdigest() if sha else stored_digest(source) if digest else None,
            {axis: rows[axis].result() for axis in totals if axis in rows},
        )

    def _counter(
        self, pattern: Pattern, element: ElementType, shape: tuple[int, ...], axis: int
    ) -> GroupCounter:
        key = (pattern, element, math.prod(shape[axis + 1 :]))
        if key not in self._counters:
            if len(self._counters) > 16:
                self._counters.clear()
            self._counters[key] = GroupCounter(*key)
        return self._counters[key]


def countable(shape: tuple[int, ...], axis: int, element: ElementType, pattern: Pattern) -> bool:
    """Tell whether the axis is made of whole groups that lie close enough together to be read in
    constant memory."""
    return (
        shape[axis] % pattern.alignment == 0
        and _chunk_size(element, shape, [axis], pattern) <= MAX_CHUNK
    )


def _chunk_size(
    element: ElementType, shape: tuple[int, ...], axes: Sequence[int], pattern: Pattern
) -> int:
    """Return the bytes of a chunk: whole groups along every axis, and whole bytes of packed
    mask."""
    unit = (
        math.lcm(8, *(pattern.alignment * max(1, math.prod(shape[axis + 1 :])) for axis in axes))
        * element.bits
        // 8
    )
    return max(unit, CHUNK // unit * unit)


def _outside(chunk: np.ndarray, element: ElementType, mask: np.ndarray) -> int:
    """Count the non-zeros (minus zero is a zero) where the packed mask says pruned."""
    values = chunk.view(f"u{element.bits // 8}")
    if element.sign:
        values = values & values.dtype.type(element.sign - 1)
    bits = np.packbits(values != 0, bitorder="little")
    wrong = bits & ~mask[: bits.size]
    return int(np.bitwise_count(wrong).sum(dtype=np.int64)) if wrong.any() else 0
