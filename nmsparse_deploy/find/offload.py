"""Open a model the way that fits into memory: whole; streamed from its files; hidden states on disk
besides.

The first of the three that is predicted to fit is taken. What is computed is the same bits in all
of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nmsparse_deploy import models
from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.find.facts import Json
from nmsparse_deploy.find.footprint import footprint
from nmsparse_deploy.find.plan.make_plan import Plan, make_plan
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.pattern import parse_pattern
from nmsparse_deploy.recipe import Prune
from nmsparse_deploy.system import memory
from nmsparse_deploy.system.memory import megabytes
from nmsparse_deploy.system.progress import Progress, silent

SPARE = 0.25
"""The share of free memory that may be used to save computing."""


@dataclass(frozen=True)
class OpenedModel:
    """A model with what is to be pruned in it, and how it is held."""

    loaded: LoadedModel
    plan: Plan
    on_disk: bool
    """The hidden states of the calibration stream."""
    predicted: int
    """Peak memory in bytes."""
    limit: int | None
    """What the user allows, in bytes."""

    def spare(self) -> int:
        """Return the bytes beyond the predicted ones that may be used to save computing: a part
        of what is free, and none where memory is short."""
        short = self.limit is not None or self.loaded.streamed or self.on_disk
        return 0 if short else int(SPARE * memory.free_memory(self.loaded.device))

    def to_json(self) -> Json:
        return {
            "weights": "streamed" if self.loaded.streamed else "in memory",
            "hidden_states": "on disk" if self.on_disk else "in memory",
            "predicted_bytes": self.predicted,
            "limit_bytes": self.limit,
        }

    def check(self, peak: int, done: str) -> None:
        """Raise `NmsparseError` when more memory was in use than the user allows."""
        if self.limit is not None and peak > self.limit:
            raise NmsparseError(
                f"{done} took {megabytes(peak)} of memory, more than the {megabytes(self.limit)} of --max-memory; the "
                "finished blocks are kept.",
                "the same command with a larger --max-memory goes on from here",
            )


def load_fitting(model: str, limit: int | None = None) -> LoadedModel:
    """Load `model`, with its weights left in their files when they are more than is free, or when
    there is a limit.

    A model of the hub is downloaded first: how large it is should not be found out by loading it.
    """
    folder = models.download(model) or models.checkpoint(model)
    free = memory.free_memory()
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder else 0
    stream = folder is not None and (limit is not None or size > free)
    return models.load(model, stream=stream)


def planned(loaded: LoadedModel, spec: Prune) -> Plan:
    """Plan what `spec` asks to be pruned in `loaded`.

    Raises `NmsparseError` when a block runs several times, and the recipe wants to know on what.
    """
    discovery = loaded.discover()
    if discovery.shared and (spec.needs != "none" or spec.learn or spec.finetune):
        raise NmsparseError(
            f"The block '{discovery.shared[0]}' runs several times in one forward pass, so there is no "
            "single place in the model that it could be calibrated at.",
            "--method magnitude needs no calibration",
        )
    return make_plan(
        discovery, parse_pattern(spec.pattern), spec.include, spec.exclude, spec.patterns
    )


def open_model(
    model: str,
    spec: Prune,
    compute: torch.dtype,
    limit: int | None = None,
    progress: Progress = silent,
) -> OpenedModel:
    """Load `model` and plan. Raises `NmsparseError` when it cannot be pruned as asked in the memory
    there is."""
    loaded = load_fitting(model, limit)
    progress(models.described(model, loaded), 0, 0)
    plan = planned(loaded, spec)
    if note := loaded.provenance.get("pictures"):
        progress(note, 0, 0)
    need = footprint(loaded, plan, spec, compute)
    if not loaded.streamed:
        _refuse_over(limit, need.whole, "and this kind of model cannot be streamed from its files")
        return OpenedModel(loaded, plan, False, need.whole, limit)
    available = limit or memory.free_memory()
    if need.whole <= available:
        return OpenedModel(models.load(model), plan, False, need.whole, limit)
    if reason := spec.whole_model:
        raise NmsparseError(
            f"{reason} needs the whole model in memory, {megabytes(need.whole)} as predicted, and "
            f"there are {megabytes(available)}.",
            "leave it out, or take a machine with more memory",
        )
    on_disk = need.streamed > available
    predicted = need.on_disk if on_disk else need.streamed
    progress(
        f"weights are streamed from their files{', hidden states are on disk' if on_disk else ''}; predicted peak "
        f"{megabytes(predicted)}",
        0,
        0,
    )
    if limit is not None:
        _refuse_over(limit, predicted, "one block of it at a time, with hidden states on disk")
    return OpenedModel(loaded, plan, on_disk, predicted, limit)


def _refuse_over(limit: int | None, predicted: int, how: str) -> None:
    if limit is not None and predicted > limit:
        raise NmsparseError(
            f"Pruning this model is predicted to take {megabytes(predicted)} of memory, {how}; "
            f"--max-memory allows {megabytes(limit)}.",
            "raise --max-memory, shorten --length, or take a method without a Gram (wanda, magnitude)",
        )
