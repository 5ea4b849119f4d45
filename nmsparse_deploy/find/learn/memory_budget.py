"""The memory that learning takes, predicted from shapes before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.pattern import NMPattern
from nmsparse_deploy.system.memory import free_memory

SOFTMAX_BYTES = 12
"""Per logit of a micro-batch's outputs: as they come, as fp32 probabilities and as their
gradient."""


@dataclass(frozen=True)
class TrainedMatrix:
    """One weight that learns: how many numbers it has, its width and height as a matrix, its
    pattern."""

    count: int
    k: int
    n: int
    pattern: NMPattern


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes by what holds them."""

    state: float
    masked: float
    activations: float

    @property
    def total(self) -> float:
        return self.state + self.masked + self.activations

    def to_json(self) -> dict[str, float | str]:
        parts = {
            "learned_values_and_optimiser": self.state,
            "masked_weights": self.masked,
            "activations": self.activations,
            "total": self.total,
        }
        return {
            **{f"{name}_mb": round(size / 1e6) for name, size in parts.items()},
            "status": "predicted",
        }

    def sentence(self, device: torch.device) -> str:
        """Say what it comes to, and what there is."""
        return (
            f"will hold about {self.total / 1e6:,.0f} MB more (predicted); {free_memory(device) / 1e6:,.0f} MB are "
            "free"
        )

    def check(self, device: torch.device, advice: str) -> None:
        """Raise `NmsparseError` when it does not fit into what is free on the device."""
        free = free_memory(device)
        if self.total > free:
            raise NmsparseError(
                f"Learning needs about {self.total / 1e9:.1f} GB more (predicted; "
                f"{self.state / 1e9:.1f} GB of it for learned values and their optimiser), and "
                f"{free / 1e9:.1f} GB are free.",
                advice,
            )


def memory_budget(
    weights: Sequence[TrainedMatrix],
    bytes_per_weight: Callable[[NMPattern], float],
    tokens: int,
    compute: torch.dtype,
    *,
    recomputed: bool,
    outputs: int = 0,
    processes: int = 1,
) -> MemoryBudget:
    """Predict the memory for `tokens` in a micro-batch and `outputs` logits per token.

    `bytes_per_weight` covers trained values, gradients, optimiser state and the best masks. A
    masked copy of every weight lives until the backward pass, and so does what a layer reads and
    writes, unless blocks are recomputed. `processes` share the state.
    """
    single = torch.float32.itemsize
    state = sum(matrix.count * bytes_per_weight(matrix.pattern) for matrix in weights)
    cast = compute.itemsize if compute.itemsize < single else 0  # autocast keeps another copy
    masked = sum(matrix.count for matrix in weights) * (single + cast)
    touched = sum(matrix.k + 2 * matrix.n for matrix in weights)
    if recomputed:
        touched = max((matrix.k for matrix in weights), default=0)
        masked = max((matrix.count for matrix in weights), default=0) * single
    return MemoryBudget(
        state / processes, masked, tokens * (touched * compute.itemsize + outputs * SOFTMAX_BYTES)
    )
