"""The values that a node multiplies by: the stored tensor, or the part of it that is used, without
its zero point."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nmsparse_deploy.pattern import NMPattern
from nmsparse_deploy.prove.group_counter import ELEMENT_TYPES, ElementType
from nmsparse_deploy.prove.onnx_graph import WeightUse
from nmsparse_deploy.prove.onnx_tensor import element_name, source_of, used_values
from nmsparse_deploy.prove.report import CLAIMS, judge
from nmsparse_deploy.prove.scan import ByteSource, MemoryBytes, Scanned, Scanner, countable

if TYPE_CHECKING:
    from onnx import TensorProto


@dataclass(frozen=True)
class UsedWeight:
    """What one use of a stored tensor multiplies by."""

    tensor: TensorProto
    folder: Path
    use: WeightUse

    @property
    def key(self) -> object:
        """What tells two uses of one tensor along one axis apart."""
        zero, picks = self.use.zero, self.use.picks
        parts = tuple(None if places is None else places.tobytes() for places in picks)
        return parts, None if zero is None else (
            zero.name,
            zero.values.shape,
            zero.values.tobytes(),
        )

    @property
    def source(self) -> ByteSource:
        """The stored bytes."""
        return source_of(self.tensor, self.folder)

    @property
    def element(self) -> ElementType | None:
        """The type of the stored values, if it is one that can be checked."""
        return ELEMENT_TYPES.get(element_name(self.use.dtype))

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of the part that is used, in the order of the stored axes."""
        picks = self.use.picks or (None,) * len(self.use.shape)
        return tuple(
            size if places is None else places.size for size, places in zip(self.use.shape, picks)
        )

    def hidden(self, pattern: NMPattern) -> tuple[str, bool]:
        """Return why the values cannot be checked, if they cannot, and whether that is an answer: a
        length that no group fits is one."""
        use, element = self.use, self.element
        if element is None:
            return f"values of type {use.dtype} cannot be checked", False
        if use.start % pattern.alignment:
            return "is joined to others in the middle of a group", False
        whole = not self.shape[use.axis] % pattern.alignment and not use.k % pattern.alignment
        if whole and countable(self.shape, use.axis, element, pattern):
            return "", True
        reason = (
            f"axis {use.axis} of {list(use.shape)} cannot be checked in groups of {pattern.group}"
        )
        return reason, not whole

    def scan(self, scanner: Scanner, pattern: NMPattern) -> Scanned:
        """Count along the axis that is reduced, and, unless the pattern is soon seen there, along
        the others."""
        use = self.use
        if use.picks or use.zero is not None:
            zero = None if use.zero is None else use.zero.values
            return self._counted(
                scanner, pattern, used_values(self.tensor, self.folder, use.picks, zero)
            )
        element = self.element
        assert element is not None
        axes = self._axes(element, pattern)
        return scanner.scan(self.source, element, self.shape, axes, pattern, digest=True)

    def moved(self, scanner: Scanner, pattern: NMPattern, verdict: str) -> list[str]:
        """Return what a zero point that is not zero does to a pattern: one in the values is lost in
        the integers, and one in the integers is none in the values."""
        point = self.use.zero
        if point is None:
            return []
        if verdict == "sparse":
            return [
                f"it is {pattern} in real values, which is lost in the stored integers: {point.moved()}"
            ]
        codes = self._counted(
            scanner, pattern, used_values(self.tensor, self.folder, self.use.picks, None)
        )
        axis = self.use.axis
        said = judge(codes.counts[axis], pattern, codes.outputs.get(axis))
        if verdict in CLAIMS or said in CLAIMS:
            return [f"{point.moved()}, so quantisation is asymmetric and destroys the pattern"]
        return []

    def stored_place(self, place: tuple[int, ...]) -> tuple[int, ...]:
        """Return where in the stored tensor a value of the used part lies."""
        if not self.use.picks:
            return place
        return tuple(
            at if places is None else int(places[at]) for at, places in zip(place, self.use.picks)
        )

    def _counted(self, scanner: Scanner, pattern: NMPattern, values: np.ndarray) -> Scanned:
        """Count values that are in memory."""
        element = self.element
        assert element is not None
        if values.itemsize * 8 != element.bits:
            element = ELEMENT_TYPES["U8"]
        source = MemoryBytes(values.reshape(-1).view(np.uint8))
        axes = self._axes(element, pattern)
        return scanner.scan(source, element, self.shape, axes, pattern)

    def _axes(self, element: ElementType, pattern: NMPattern) -> list[int]:
        """Return the axes to count along, the one that is reduced first."""
        axis = self.use.axis
        others = [
            other
            for other in range(len(self.shape))
            if other != axis and countable(self.shape, other, element, pattern)
        ]
        return [axis, *others]
