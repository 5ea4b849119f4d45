"""The processes of one run, as `accelerate launch` or `torchrun` start them.

They share what is learned through the whole model; one of them, the main one, does the rest and writes the run folder,
which all of them have to see.
"""

from __future__ import annotations

import os

import torch
from accelerate import PartialState


def count() -> int:
    """How many there are; asks nothing but the environment."""
    return int(os.environ.get("WORLD_SIZE", 1))


def state() -> PartialState:
    """Join the others; on a GPU, take one's own."""
    return PartialState(cpu=not torch.cuda.is_available())
