"""What a model family has to answer, and the matrix multiplications found in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from nmsparse_deploy.models.weights import WHOLE, Weights


@dataclass(frozen=True)
class Target:
    """One weight that a GEMM reads and that may be pruned.

    `k` is the length of the reduction axis (`axis` of the stored weight), `n` the number of outputs. Targets with the
    same `fusion` read the same input tensor; compilers merge them into one GEMM, so they are pruned all or none.

    A parameter may be a stack of `experts` matrices along its first axis; `n` counts the outputs of all of them. Where
    it is `routed`, a router decides which tokens are read. Where its module is not called, the product with the weight
    is `watched` instead.
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
        """Of one matrix."""
        return self.n // self.experts


@dataclass(frozen=True)
class Skipped:
    """A weight matrix that is never pruned, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Discovery:
    """Everything with two or more axes in a model: what can be pruned, and what cannot and why."""

    blocks: tuple[str, ...]
    targets: tuple[Target, ...]
    skipped: tuple[Skipped, ...]

    def of_block(self, index: int) -> list[Target]:
        return [t for t in self.targets if t.block == index]


@dataclass
class LoadedModel:
    """A pretrained model in memory with what the later stages need to know about it."""

    module: nn.Module
    source: str
    """What the user can type to load the same model again."""
    name: str
    """A short name for folders and headings."""
    family: str
    """`llm`, `encoder`, `seq2seq` or `vision`: which data it eats and which metric it is judged by."""
    library: str = "transformers"
    """Which adapter loads and saves it: `transformers` or `timm`."""
    processor: Any = None
    """Tokenizer (text) or preprocessing settings (images)."""
    provenance: dict[str, str] = field(default_factory=dict)
    """Revision, file hashes, dtype, library versions."""
    weights: Weights = WHOLE

    @property
    def streamed(self) -> bool:
        """Do the weights stay in their files?"""
        return self.weights.device is not None

    def to(self, device: torch.device) -> None:
        """Compute on `device` from now on."""
        if self.streamed:
            self.weights.to(device)
        else:
            self.module.to(device)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.weights.device or next(self.module.parameters()).device


class ModelAdapter(Protocol):
    """A module of this folder, one per library. Discovery and the block walk need nothing that is specific to one."""

    def load(self, source: str, dtype: torch.dtype | None = None) -> LoadedModel: ...

    def sample_inputs(self, model: LoadedModel, batch: int = 2, length: int = 16) -> dict[str, torch.Tensor]:
        """Keyword arguments for one forward pass, for tracing and for export; `length` is in tokens (text only)."""
        ...

    def save(self, model: LoadedModel, folder: Path) -> None:
        """Write a folder that the stock library loads."""
        ...


def block_index(blocks: tuple[str, ...], module: str) -> int | None:
    """Which block a module path lies in."""
    for index, block in enumerate(blocks):
        if module == block or module.startswith(block + "."):
            return index
    return None


def weights(module: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(module path, parameter name, parameter) of everything with two or more axes; tied ones once per name."""
    for path, child in module.named_modules():
        for name, parameter in child.named_parameters(recurse=False):
            if parameter.ndim >= 2:
                yield path, f"{path}.{name}" if path else name, parameter


def to_rows(weight: torch.Tensor, axis: int) -> torch.Tensor:
    """A weight as the matrix `[outputs, reduction]` that the methods work on.

    A convolution `[M, C, R, S]` becomes `[M, R*S*C]`: groups run along input channels, one kernel position at a time.
    A stack `[E, out, in]` or `[E, in, out]` becomes `[E*out, in]`.
    """
    if weight.ndim == 2:
        return weight.movedim(axis, -1)
    moved = weight.movedim(axis, -1)
    return moved.flatten(0, 1) if weight.ndim == 3 else moved.flatten(1)


def from_rows(rows: torch.Tensor, shape: torch.Size | tuple[int, ...], axis: int) -> torch.Tensor:
    """The inverse of `to_rows`."""
    moved = [n for i, n in enumerate(shape) if i != axis] + [shape[axis]]
    return rows.reshape(moved).movedim(-1, axis).contiguous()
