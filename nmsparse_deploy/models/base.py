"""The matrix multiplications found in a model, and their weights as matrices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Target:
    """One weight that a GEMM reads and that may be pruned.

    `k` is the length of the reduction axis (`axis` of the stored weight), `n` the number of
    outputs. Targets with the same `fusion` read the same input tensor; compilers merge them into
    one GEMM, so they are pruned all or none.

    A parameter may be a stack of `experts` matrices along its first axis; `n` counts the outputs of
    all of them. Where it is `routed`, a router decides which tokens are read. Where its module is
    not called, the product with the weight is `watched` instead.
    """

    name: str
    module: str
    block: int
    axis: int
    k: int
    n: int
    fusion: str
    experts: int = 1
    routed: bool = False
    watched: bool = False

    @property
    def outputs(self) -> int:
        """Outputs of one matrix."""
        return self.n // self.experts


@dataclass(frozen=True)
class Skipped:
    """A weight matrix that is never pruned, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str
    gemm: bool = True
    """Is it multiplied? A table that is looked up or added is not, nor is the second name of a
    weight."""


@dataclass(frozen=True)
class Discovery:
    """Everything with two or more axes in a model: what can be pruned, and what cannot and why."""

    blocks: tuple[str, ...]
    targets: tuple[Target, ...]
    skipped: tuple[Skipped, ...]
    shared: tuple[str, ...] = ()
    """Blocks that run several times in one forward pass."""

    def of_block(self, index: int) -> list[Target]:
        return [t for t in self.targets if t.block == index]


def block_index(blocks: tuple[str, ...], module: str) -> int | None:
    """Return the block that a module path lies in."""
    for index, block in enumerate(blocks):
        if module == block or module.startswith(block + "."):
            return index
    return None


def weights(module: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield (module path, parameter name, parameter) of what has two or more axes; tied ones once
    per name."""
    for path, child in module.named_modules():
        for name, parameter in child.named_parameters(recurse=False):
            if parameter.ndim >= 2:
                yield path, f"{path}.{name}" if path else name, parameter


def to_rows(weight: torch.Tensor, axis: int) -> torch.Tensor:
    """Reshape a weight to the matrix `[outputs, reduction]` that the methods work on.

    A convolution `[M, C, R, S]` becomes `[M, R*S*C]`: groups run along input channels, one kernel
    position at a time. A stack `[E, out, in]` or `[E, in, out]` becomes `[E*out, in]`.
    """
    if weight.ndim == 2:
        return weight.movedim(axis, -1)
    moved = weight.movedim(axis, -1)
    return moved.flatten(0, 1) if weight.ndim == 3 else moved.flatten(1)


def from_rows(rows: torch.Tensor, shape: torch.Size | tuple[int, ...], axis: int) -> torch.Tensor:
    """Invert `to_rows`."""
    moved = [n for i, n in enumerate(shape) if i != axis] + [shape[axis]]
    return rows.reshape(moved).movedim(-1, axis).contiguous()
