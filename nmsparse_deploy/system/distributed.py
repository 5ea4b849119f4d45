"""The processes of one `torchrun` or `accelerate launch`: which one this is, sums over all, waiting
for each other."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch

PATIENCE = timedelta(days=2)
"""How long one process waits for another, which may be saving."""


@dataclass(frozen=True)
class Processes:
    """A team of processes, of which this one is number `rank` of `world`; alone it is 0 of 1."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Tell whether this is the process that writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self.world > 1:
            torch.distributed.barrier()

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """Turn `tensor` into the sum of the tensors that the processes give; the same bits in
        each."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Return what each process gives, in every one of them."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values


ALONE = Processes()


@cache
def current() -> Processes:
    """Join the others on the first call: over gloo on the CPU, over nccl on GPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    return Processes(state.process_index, state.num_processes)
