"""The context of a training step: where the run is.

Schedules, noise and data order are functions of this and of nothing else, so that a run that was
killed and resumed draws what an unbroken one draws.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class StepContext:
    """One micro-batch of one optimiser step on one process; all numbers count from 0."""

    seed: int = 0
    step: int = 0
    steps: int = 1
    part: int = 0
    """Micro-batch of this step on this process; `parts` of them make a step."""
    parts: int = 1
    rank: int = 0
    world: int = 1

    @property
    def progress(self) -> float:
        """Return 0 at the first optimiser step and exactly 1 at the last; accumulation does not
        advance it."""
        return self.step / (self.steps - 1) if self.steps > 1 else 0.0

    def generator(self, name: str, device: torch.device | str = "cpu") -> torch.Generator:
        """Return the noise of the tensor `name` here: always the same here, another one anywhere
        else."""
        return torch.Generator(device).manual_seed(
            digest(self.seed, name, self.step, self.part, self.rank)
        )


def digest(*parts: object) -> int:
    """Return a seed that differs whenever a part does."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class LinearSchedule:
    """From `start` at the first optimiser step to `end` at the last, both exact."""

    start: float
    end: float

    def at(self, progress: float) -> float:
        return self.start * (1 - progress) + self.end * progress


def rate_factor(
    step: int, steps: int, warmup: int, schedule: Literal["cosine", "linear"], floor: float
) -> float:
    """Return the learning rate at an optimiser step as a share of its peak: linear warm-up, then
    down to `floor` at the last."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    left = max(1, steps - 1 - warmup)
    share = min(1.0, (step - warmup) / left)
    shape = (1 + math.cos(math.pi * share)) / 2 if schedule == "cosine" else 1 - share
    return floor + (1 - floor) * shape


def order(seed: int, count: int, start: int, length: int) -> list[int]:
    """Return positions `start` to `start + length` of an endless stream over `count` batches,
    shuffled anew every epoch."""
    epochs: dict[int, list[int]] = {}
    for epoch in range(start // count, (start + length - 1) // count + 1):
        generator = torch.Generator().manual_seed(digest(seed, "order", epoch))
        epochs[epoch] = torch.randperm(count, generator=generator).tolist()
    return [epochs[place // count][place % count] for place in range(start, start + length)]
