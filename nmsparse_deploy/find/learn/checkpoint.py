"""Checkpoints of a training run: one safetensors file, replaced by rename. No pickle, no
half-written file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.find.learn.learner import LearnedMask
from nmsparse_deploy.find.learn.sharded import like, whole
from nmsparse_deploy.runs.run_dir import RunDir

RECORD = "record"
"""The one metadata key."""


@dataclass
class TrainingProgress:
    """The progress of a run; numbers and texts only."""

    step: int = 0
    """Optimiser steps made."""
    prior: float = float("inf")
    best: float = float("inf")
    best_step: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    """One entry per evaluation of the hard mask."""
    judged_at: list[float] = field(default_factory=list)
    """Seconds of training before each of them."""


class Checkpoints:
    """The checkpoint file `name` of a run folder."""

    def __init__(self, run: RunDir, name: str) -> None:
        self.run, self.name = run, name

    def save(self, so_far: TrainingProgress, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the checkpoint; it replaces the one before."""
        stored = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        with self.run.replacing(self.name) as temporary:
            save_file(stored, temporary, {RECORD: json.dumps(asdict(so_far))})

    def load(self) -> tuple[TrainingProgress, dict[str, torch.Tensor]] | None:
        """Return the newest checkpoint, or None. Raises `UsageError` when it is damaged."""
        path = self.run / self.name
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                so_far = TrainingProgress(**json.loads(file.metadata()[RECORD]))
                return so_far, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"The checkpoint '{path}' is damaged: {error}.",
                "delete it; the run then goes on from what was finished before it",
            ) from error


def flat_optimiser(optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return an optimiser's state as named tensors."""
    return {
        f"{index}/{key}": whole(value)
        for index, state in optimiser.state_dict()["state"].items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def restore_optimiser(
    optimiser: torch.optim.Optimizer,
    trained: Sequence[torch.Tensor],
    flat: Mapping[str, torch.Tensor],
) -> None:
    """Put `flat` back; `trained` are the optimiser's parameters in order."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in flat.items():
        index, _, key = name.partition("/")
        parameter = trained[int(index)]
        mine = like(parameter, value) if value.shape == parameter.shape else value
        state.setdefault(int(index), {})[key] = mine
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})


def flat_masks(learned: Mapping[str, LearnedMask]) -> dict[str, torch.Tensor]:
    """Return learned masks and weights as named tensors."""
    masks = {f"{name}/mask": result.mask for name, result in learned.items()}
    return masks | {
        f"{name}/weight": result.weight
        for name, result in learned.items()
        if result.weight is not None
    }


def unflat_masks(flat: Mapping[str, torch.Tensor]) -> dict[str, LearnedMask]:
    """Return the learned masks that `flat_masks` wrote."""
    names = [key.removesuffix("/mask") for key in flat if key.endswith("/mask")]
    return {name: LearnedMask(flat[f"{name}/mask"], flat.get(f"{name}/weight")) for name in names}


def with_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Put `prefix` and a colon before every name."""
    return {f"{prefix}:{key}": value for key, value in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors that `with_prefix` named, by their own names."""
    return {
        key.removeprefix(f"{prefix}:"): value
        for key, value in tensors.items()
        if key.startswith(f"{prefix}:")
    }
