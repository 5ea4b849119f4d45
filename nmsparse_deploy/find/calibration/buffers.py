"""Buffers for the hidden states of a calibration stream: in memory, or on disk, mapped one batch at
a time."""

from __future__ import annotations

import itertools
import shutil
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch


class DiskBuffers:
    """A factory of buffers in `folder`, which is emptied first."""

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder = folder
        self._count = itertools.count()

    def __call__(self) -> DiskBuffer:
        return DiskBuffer(self.folder / f"{next(self._count):05d}")


class DiskBuffer(Sequence[torch.Tensor]):
    """Tensors in files, read through a private mapping that goes with the tensor; the files go with
    the buffer."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._specs: list[tuple[torch.Size, torch.dtype, torch.device]] = []
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    def append(self, x: torch.Tensor) -> None:
        raw = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        raw.numpy().tofile(self._folder / str(len(self._specs)))
        self._specs.append((x.shape, x.dtype, x.device))

    def __len__(self) -> int:
        return len(self._specs)

    def __getitem__(self, number: int) -> torch.Tensor:  # type: ignore[override]
        shape, dtype, device = self._specs[number]
        file = self._folder / str(number % len(self._specs))
        return (
            torch.from_file(str(file), shared=False, size=shape.numel(), dtype=dtype)
            .view(shape)
            .to(device)
        )

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[number] for number in range(len(self)))


Buffer = list[torch.Tensor] | DiskBuffer
"""One tensor per batch, in order."""
MakeBuffer = Callable[[], Buffer]
