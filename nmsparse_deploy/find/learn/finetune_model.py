"""The refinement of a whole pruned model: its dense twin is loaded beside it, what comes back is
written into it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import cast

import torch
from torch import nn

from nmsparse_deploy import models
from nmsparse_deploy.errors import CheckFailed
from nmsparse_deploy.find.facts import RefinementRecord
from nmsparse_deploy.find.learn.checkpoint import Checkpoints
from nmsparse_deploy.find.learn.learner import ADAM_BYTES, MASK_BYTES, LearnedMask
from nmsparse_deploy.find.learn.mask_parametrization import MaskSite
from nmsparse_deploy.find.learn.memory_budget import TrainedMatrix, memory_budget
from nmsparse_deploy.find.learn.subjects import BatchSubject
from nmsparse_deploy.find.learn.whole_model import objective_of, recomputed
from nmsparse_deploy.find.plan.make_plan import Plan
from nmsparse_deploy.find.refine.base import PrunedModel, RefineModel
from nmsparse_deploy.masks import Mask, mask_follows
from nmsparse_deploy.models.base import from_rows, to_rows
from nmsparse_deploy.models.loaded import Batch, LoadedModel
from nmsparse_deploy.pattern import NMPattern
from nmsparse_deploy.recipe import Prune
from nmsparse_deploy.registry import REFINEMENTS
from nmsparse_deploy.system.hardware import autocast_for
from nmsparse_deploy.system.progress import Progress

WEIGHT = 2 * torch.float32.itemsize
"""Bytes of a weight in fp32, and of the best one so far."""
ADVICE = "a smaller calibration.batch, or gradient_checkpointing: true in the step finetune"


class TaughtSubject(BatchSubject):
    """A pruned model with another one as its teacher."""

    teacher: nn.Module | None = None

    def _dense(self, batch: Batch) -> torch.Tensor:
        assert self.teacher is not None
        with torch.no_grad(), autocast_for(self.compute, next(self.module.parameters()).device):
            return self.objective.signal(self.teacher(**batch))


def refine_model(
    checkpoints: Checkpoints,
    loaded: LoadedModel,
    plan: Plan,
    spec: Prune,
    masks: Mapping[str, Mask],
    inputs: dict[str, torch.Tensor],
    compute: torch.dtype,
    progress: Progress,
) -> tuple[dict[str, torch.Tensor], RefinementRecord]:
    """Refine `loaded` in place by the recipe's last step; return its masks as rows, by parameter
    name, and the record.

    Raises `CheckFailed` when a mask that comes back does not follow its pattern.
    """
    step = spec.finetune
    assert step is not None
    sites = {
        name: MaskSite(name, name, mask.axis, cast(NMPattern, mask.pattern))
        for name, mask in masks.items()
    }
    rows = {name: to_rows(mask.unpack(), mask.axis) for name, mask in masks.items()}
    device = next(loaded.module.parameters()).device
    batches = loaded.batches(inputs, spec.calibration.batch)
    with in_fp32(loaded.module):
        objective, signal = objective_of(loaded, batches[0], compute)
        subject = TaughtSubject(loaded.module, sites, batches, objective, step, compute)
        _check_memory(
            sites,
            loaded.module,
            signal,
            subject.samples,
            compute,
            step.gradient_checkpointing,
            device,
        )
        if step.distill or step.moves_mask or objective.kind != "cross-entropy":
            progress(f"loading {loaded.source} as the teacher", 0, 0)
            subject.teacher = models.load(loaded.source).module.to(device, compute).eval()

        def dense(name: str) -> torch.Tensor:
            assert subject.teacher is not None
            return to_rows(subject.teacher.get_parameter(name).detach(), sites[name].axis).float()

        pruned = PrunedModel(subject, rows, dense, spec.calibration.seed, checkpoints, progress)
        with recomputed(loaded.module, plan.blocks if step.gradient_checkpointing else ()):
            refine: RefineModel = REFINEMENTS.load(step.name)
            outcome = refine(pruned, step)
        better = (
            outcome.facts.best_step > 0
        )  # norms and biases were trained in place: they are written in any case
        trained = {
            name: mask for name, mask in outcome.masks.items() if better or name not in sites
        }
        _write(loaded.module, trained, sites)
        rows = {
            name: trained[name].mask if name in trained else mask for name, mask in rows.items()
        }
    for name, kept in rows.items():
        if isinstance(masks[name].pattern, NMPattern) and not mask_follows(
            kept, masks[name].pattern
        ):
            raise CheckFailed(
                f"The step {step.name} broke the pattern {masks[name].pattern} on '{name}'."
            )
    return rows, RefinementRecord(None, step.name, outcome.facts.to_json())


@contextmanager
def in_fp32(module: nn.Module) -> Iterator[None]:
    """Hold every parameter and buffer in fp32 inside the block; afterwards they have their own
    dtypes again."""
    tensors = list(chain(module.parameters(), module.buffers()))
    before = [tensor.dtype for tensor in tensors]
    module.float()
    try:
        yield
    finally:
        for tensor, dtype in zip(tensors, before):
            tensor.data = tensor.data.to(dtype)


def _check_memory(
    sites: Mapping[str, MaskSite],
    module: nn.Module,
    signal: torch.Tensor,
    samples: int,
    compute: torch.dtype,
    recompute: bool,
    device: torch.device,
) -> None:
    """Raise `NmsparseError` when the training state will not fit."""
    shapes = [
        (to_rows(module.get_parameter(name), site.axis).shape, site.pattern)
        for name, site in sites.items()
    ]
    weights = [TrainedMatrix(n * k, k, n, pattern) for (n, k), pattern in shapes]
    tokens = signal.numel() // signal.shape[-1] * samples
    budget = memory_budget(
        weights,
        lambda pattern: ADAM_BYTES + MASK_BYTES + WEIGHT,
        tokens,
        compute,
        recomputed=recompute,
        outputs=signal.shape[-1],
    )
    budget.check(device, ADVICE)


@torch.no_grad()
def _write(
    module: nn.Module, trained: Mapping[str, LearnedMask], sites: Mapping[str, MaskSite]
) -> None:
    """Put trained values into the module, pruned ones exactly +0.0."""
    for name, result in trained.items():
        assert result.weight is not None
        parameter, value = module.get_parameter(name), torch.where(result.mask, result.weight, 0.0)
        if name in sites:
            value = from_rows(value, parameter.shape, sites[name].axis)
        parameter.copy_(value)
