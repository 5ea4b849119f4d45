"""The global objective: one-shot priors for the whole model, then masks learned through all of it
at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from nmsparse_deploy.data.calibration_sample import Sample, some
from nmsparse_deploy.data.images import ImageSample
from nmsparse_deploy.data.latents import NoisedSample
from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.find.calibration.block_walk import BlockWalk
from nmsparse_deploy.find.facts import RefinementRecord
from nmsparse_deploy.find.learn.augment import Augmentation
from nmsparse_deploy.find.learn.diffusion import DiffusionSubject
from nmsparse_deploy.find.learn.images import ImageSubject, class_numbers
from nmsparse_deploy.find.learn.learner import Subject
from nmsparse_deploy.find.learn.mask_parametrization import MaskSite
from nmsparse_deploy.find.learn.prior_selection import Masks
from nmsparse_deploy.find.learn.session import FOLDER, LearningSession
from nmsparse_deploy.find.learn.subjects import BatchSubject
from nmsparse_deploy.find.methods.base import LayerResult, Method
from nmsparse_deploy.find.plan.make_plan import Plan
from nmsparse_deploy.find.prune_block import prune_block
from nmsparse_deploy.models.base import to_rows
from nmsparse_deploy.models.loaded import Batch, LoadedModel
from nmsparse_deploy.models.objective import Objective, objective
from nmsparse_deploy.pattern import NMPattern
from nmsparse_deploy.recipe import Prune
from nmsparse_deploy.system import distributed
from nmsparse_deploy.system.hardware import autocast_for
from nmsparse_deploy.system.progress import Progress


def learn_model(
    session: LearningSession, loaded: LoadedModel, plan: Plan, spec: Prune, sample: Sample
) -> tuple[dict[str, LayerResult], RefinementRecord]:
    """Learn masks for everything in the plan; return them by parameter name, and the record.

    The model is dense before and after.
    """
    if session.spec.labels or session.spec.augment:
        sample = _shuffled(sample, session.seed)
    batches = loaded.batches(some(sample, session.spec.prior_samples), spec.calibration.batch)
    sites, weights = {}, []
    for row in plan.pruned():
        assert isinstance(row.pattern, NMPattern)
        name = row.target.name
        sites[name] = MaskSite(name, name, row.target.axis, row.pattern)
        weights.append((to_rows(loaded.module.get_parameter(name), row.target.axis), row.pattern))
    objective, signal = objective_of(loaded, batches[0], session.compute)
    subject = _subject(
        session, loaded, sites, objective, sample, spec.calibration.batch, signal.shape[-1]
    )
    labelled = isinstance(subject, ImageSubject) and subject.labels is not None
    accuracy = subject.accuracy() if isinstance(subject, ImageSubject) and labelled else None
    states = signal.numel() // signal.shape[-1]
    budget = session.budget(weights, states * subject.samples, signal.shape[-1])
    priors = {
        method: _prior(session, loaded.module, plan, spec, method, batches)
        for method in session.spec.prior_methods
    } | dict(session.stored)
    with recomputed(loaded.module, plan.blocks if session.spec.gradient_checkpointing else ()):
        masks, facts = session.learn(
            subject, priors, budget, "whole", f"{spec.method} {spec.pattern}"
        )
    facts = replace(facts, dense_accuracy=accuracy)
    return (
        {name: LayerResult(learned.mask, learned.weight) for name, learned in masks.items()},
        RefinementRecord(None, spec.method, facts.to_json()),
    )


@torch.no_grad()
def objective_of(
    loaded: LoadedModel, batch: Batch, compute: torch.dtype
) -> tuple[Objective, torch.Tensor]:
    """Return the loss that suits the model, and what it looks at in the output for one sample."""
    with autocast_for(compute, next(loaded.module.parameters()).device):
        output = loaded.module(
            **{
                name: value[:1] if isinstance(value, torch.Tensor) else value
                for name, value in batch.items()
            }
        )
    suitable = objective(loaded, output)
    return suitable, suitable.signal(output)


def _subject(
    session: LearningSession,
    loaded: LoadedModel,
    sites: Mapping[str, MaskSite],
    objective: Objective,
    sample: Sample,
    batch: int,
    classes: int,
) -> Subject:
    """Make the subject that suits the sample and the settings."""
    spec = session.spec
    if isinstance(sample, NoisedSample) and not (spec.labels or spec.augment):
        return DiffusionSubject(loaded.module, sites, sample, batch, spec, session.compute)
    if not isinstance(sample, ImageSample) or not (spec.labels or spec.augment):
        batches = loaded.batches(sample.inputs, batch)
        return BatchSubject(loaded.module, sites, batches, objective, spec, session.compute)
    if spec.labels and objective.kind != "kl":
        raise UsageError(f"'{loaded.source}' has no classes to learn from.", "learn.labels: false")
    labels = class_numbers(sample, loaded.module, classes) if spec.labels else None
    augmentation = Augmentation(spec.augment, loaded.processor, classes) if spec.augment else None
    return ImageSubject(
        loaded.module, sites, sample, batch, objective, spec, session.compute, labels, augmentation
    )


def _shuffled(sample: Sample, seed: int) -> ImageSample:
    """Shuffle images: those of one class lie side by side in their folder. Raises `UsageError` for
    other data."""
    if not isinstance(sample, ImageSample):
        raise UsageError("learn.labels and learn.augment are for images.", "leave them out")
    order = torch.randperm(len(sample), generator=torch.Generator().manual_seed(seed)).tolist()
    return sample.at(order)


def _prior(
    session: LearningSession,
    module: nn.Module,
    plan: Plan,
    spec: Prune,
    method: str,
    batches: Sequence[Batch],
) -> Masks:
    """Return the masks of a one-shot method for the original weights, from an earlier process if it
    got that far."""
    name = f"{FOLDER}/prior-{method}.safetensors"
    team = distributed.current()
    if team.first and not (session.run / name).is_file():
        masks = one_shot(module, plan, spec, method, batches, session.compute, session.progress)
        with session.run.replacing(name) as temporary:
            save_file({key: mask.contiguous() for key, mask in masks.items()}, temporary)
    team.wait()
    return load_file(session.run / name)


def one_shot(
    module: nn.Module,
    plan: Plan,
    spec: Prune,
    name: str,
    batches: Sequence[Batch],
    compute: torch.dtype,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """Return bool rows by parameter name; weights stay as they are.

    The blocks are walked, and every block sees what the pruned ones before it make of the data.
    """
    method = Method.load(name)
    alone = spec.model_copy(update={"method": name, "learn": None, "refine": (), "permute": False})
    walk = (
        None if method.facts.needs == "none" else BlockWalk(module, plan.blocks, batches, compute)
    )
    masks: dict[str, torch.Tensor] = {}
    for number in range(max(row.target.block for row in plan.pruned()) + 1):
        progress(f"prior {name}, block {number}", number, len(plan.blocks))
        pruned = (
            prune_block(module, plan, number, alone, method, walk) if plan.pruned(number) else None
        )
        layers = {
            key: replace(layer, result=LayerResult(layer.result.mask))
            for key, layer in (pruned.layers if pruned else {}).items()
        }
        masks |= {key: layer.result.mask.cpu() for key, layer in layers.items()}
        if walk is not None:
            walk.advance(
                number, {key: layer.stored(torch.float32) for key, layer in layers.items()}
            )
    return masks


@contextmanager
def recomputed(module: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """Let the blocks keep nothing for the backward pass but their inputs."""
    layers = [module.get_submodule(path) for path in blocks]
    for block in layers:
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )
    try:
        yield
    finally:
        for block in layers:
            del block.forward
