"""Learned masks inside the prune stage: priors, the best of them, the loop, and its report.

With the block objective a block is learned where the walk stands, from the stream of the pruned
model; with the global one the whole model is learned first (`whole_model.py`) and the walk only
writes down the masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.find.calibration.layer_stats import LayerStats
from nmsparse_deploy.find.facts import Json, RefinementRecord
from nmsparse_deploy.find.learn.checkpoint import Checkpoints
from nmsparse_deploy.find.learn.learner import LearnedMask, LearnedMethod, Subject
from nmsparse_deploy.find.learn.loop import Outcome, TrainingFacts, fit
from nmsparse_deploy.find.learn.mask_parametrization import MaskSite
from nmsparse_deploy.find.learn.memory_budget import MemoryBudget, TrainedMatrix, memory_budget
from nmsparse_deploy.find.learn.prior_selection import Masks, best_prior
from nmsparse_deploy.find.learn.subjects import BlockSubject
from nmsparse_deploy.find.methods.base import LayerResult, Method
from nmsparse_deploy.find.plan.make_plan import Plan
from nmsparse_deploy.find.refine.base import BlockPair, BlockResult
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.models.base import to_rows
from nmsparse_deploy.pattern import NMPattern
from nmsparse_deploy.recipe import Learn
from nmsparse_deploy.registry import LEARNERS
from nmsparse_deploy.runs.manifest import LearnedRecord
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.system import distributed
from nmsparse_deploy.system.progress import Progress

FOLDER = "learning"
"""In the run folder while masks are learned: priors and checkpoints."""


@dataclass(frozen=True)
class LearnFacts:
    """The report of learning the masks of one block, or of the whole model."""

    objective: Literal["block", "global"]
    prior_method: str
    """The best of the priors: a method, or a mask file."""
    priors: dict[str, float]
    """Held-out loss under each."""
    training: TrainingFacts
    memory: MemoryBudget
    changed: float
    """Share of the groups whose mask is not the prior's."""
    dense_accuracy: float | None = None
    """Of the dense model on held-out labels, where there are labels."""

    def to_json(self) -> Json:
        facts = {
            "objective": self.objective,
            "prior_method": self.prior_method,
            "priors": self.priors,
            **self.training.to_json(),
            "memory": self.memory.to_json(),
            "changed": self.changed,
        }
        return (
            facts
            if self.dense_accuracy is None
            else {**facts, "dense_accuracy": self.dense_accuracy}
        )


ADVICE = "a smaller calibration.batch, gradient_checkpointing, objective: block, or more processes with shard: true"


@dataclass(frozen=True)
class LearningSession:
    """One prune stage that learns: its settings and where it writes."""

    run: RunDir
    spec: Learn
    """Settings of the method."""
    seed: int
    compute: torch.dtype
    device: torch.device
    progress: Progress
    stored: Mapping[str, Masks] = field(default_factory=dict)
    """Priors from files, checked."""

    @property
    def method(self) -> LearnedMethod:
        method: LearnedMethod = LEARNERS.load(self.spec.name)
        return method

    def learn(
        self,
        subject: Subject,
        priors: Mapping[str, Masks],
        budget: MemoryBudget,
        name: str,
        title: str,
    ) -> tuple[dict[str, LearnedMask], LearnFacts]:
        """Learn from the best of the priors; return the best masks and the facts.

        Resumes from the checkpoint `name`. Raises `NmsparseError` when memory does not suffice.
        """
        budget.check(self.device, self._advice(subject, budget))
        self.progress(f"{title}: {budget.sentence(self.device)}", 0, 0)
        best, losses = best_prior(subject, priors)
        outcome: Outcome = fit(
            subject,
            self.method.make(self.spec),
            priors[best],
            self.spec,
            self.seed,
            Checkpoints(self.run, f"{FOLDER}/{name}.safetensors"),
            self.progress,
            title,
        )
        patterns = {site.name: site.pattern for site in subject.sites.values()}
        return outcome.masks, LearnFacts(
            self.spec.scope,
            best,
            losses,
            outcome.facts,
            budget,
            changed(outcome.masks, priors[best], patterns),
        )

    @property
    def shares(self) -> int:
        """Return over how many processes the state is split."""
        return distributed.current().world if self.spec.shard else 1

    def _advice(self, subject: Subject, budget: MemoryBudget) -> str:
        """Say what to do when `budget` is more than there is, with figures where the method has
        lighter settings."""
        sizes = [
            (site.pattern, subject.module.get_parameter(site.path).numel())
            for site in subject.sites.values()
        ]
        lighter = []
        for change in self.method.lighter:
            spec = self.spec.model_copy(update=dict(change))
            state = sum(
                count * self.method.bytes_per_weight(spec, pattern) for pattern, count in sizes
            )
            needed = replace(budget, state=state / self.shares).total
            if needed < budget.total:
                settings = ", ".join(f"{key}: {value}" for key, value in change.items())
                lighter.append(f"{settings} takes {needed / 1e9:.1f} GB")
        return "; ".join([*lighter, ADVICE])

    def learn_block(self, block: BlockPair, spec: Learn, number: int, path: str) -> BlockResult:
        """Learn the masks of a block's dense weights; the given ones are not used."""
        assert block.dense_inputs is not None
        sites = {
            name: MaskSite(f"{path}.{name}", name, layer.axis, layer.groups)
            for name, layer in block.layers.items()
        }
        subject = BlockSubject(
            block.dense, sites, block.inputs, block.dense_inputs, block.run, spec.holdout
        )
        priors = {
            method: {
                sites[name].name: mask_of(method, layer.dense, layer.stats, layer.groups)
                for name, layer in block.layers.items()
            }
            for method in spec.prior_methods
        }
        priors |= {
            file: {site.name: masks[site.name] for site in sites.values()}
            for file, masks in self.stored.items()
        }
        tokens = max(x.numel() // x.shape[-1] for x in block.inputs)
        budget = self.budget(
            [(layer.dense, layer.groups) for layer in block.layers.values()], tokens
        )
        masks, facts = self.learn(subject, priors, budget, f"block-{number:03d}", f"block {number}")
        layers = {
            name: LayerResult(masks[site.name].mask, masks[site.name].weight)
            for name, site in sites.items()
        }
        return BlockResult(layers, facts)

    def budget(
        self, weights: Sequence[tuple[torch.Tensor, NMPattern]], tokens: int, outputs: int = 0
    ) -> MemoryBudget:
        """Predict the memory for matrices `[n, k]` with their patterns."""
        matrices = [
            TrainedMatrix(rows.numel(), rows.shape[1], rows.shape[0], pattern)
            for rows, pattern in weights
        ]
        return memory_budget(
            matrices,
            lambda pattern: self.method.bytes_per_weight(self.spec, pattern),
            tokens,
            self.compute,
            recomputed=self.spec.gradient_checkpointing,
            outputs=outputs,
            processes=self.shares,
        )


def stored_priors(spec: Learn, module: nn.Module, plan: Plan) -> dict[str, Masks]:
    """Read the mask files among the priors as bool rows.

    Raises `UsageError` for a file that is not there, damaged, incomplete or of another pattern,
    `CheckFailed` for masks of another model.
    """
    priors: dict[str, Masks] = {}
    for file in spec.prior_files:
        stored = MaskSet.load(Path(file)).masks
        planned = {row.target.name: row for row in plan.pruned()}
        MaskSet({name: mask for name, mask in stored.items() if name in planned}).check_base(
            dict(module.named_parameters())
        )
        for name, row in planned.items():
            if name not in stored:
                raise UsageError(
                    f"The prior '{file}' has no mask for '{name}'.", "leave it dense with --exclude"
                )
            if (pattern := stored[name].pattern) != row.pattern or stored[
                name
            ].axis != row.target.axis:
                raise UsageError(
                    f"The prior '{file}' is {pattern} on '{name}', which is to be {row.pattern}."
                )
        priors[file] = {
            name: to_rows(stored[name].unpack(), row.target.axis) for name, row in planned.items()
        }
    return priors


def mask_of(
    method: str, weight: torch.Tensor, stats: LayerStats, pattern: NMPattern
) -> torch.Tensor:
    """Return what a one-shot method would keep, for the original weights."""
    return Method.load(method).prune_layer(weight, stats, pattern).mask


def changed(
    masks: Mapping[str, LearnedMask], priors: Masks, patterns: Mapping[str, NMPattern]
) -> float:
    """Return the share of the groups whose mask is another than the prior's."""
    different = groups = 0
    for name, learned in masks.items():
        moved = (learned.mask != priors[name].cpu()).reshape(-1, patterns[name].group).any(-1)
        different += int(moved.sum())
        groups += moved.numel()
    return different / groups if groups else 0.0


def summary(records: Sequence[RefinementRecord]) -> LearnedRecord:
    """Sum up what a stage learned: means over its blocks, or the figures of the whole model."""
    rows = [record.facts for record in records]
    if not rows:
        raise NmsparseError("Nothing was learned.")

    def mean(key: str) -> float:
        return sum(row[key] for row in rows) / len(rows)

    return LearnedRecord(
        objective=rows[0]["objective"],
        prior=mean("prior"),
        best=mean("best"),
        changed=mean("changed"),
        unmoved=sum(row["changed"] == 0 for row in rows),
        parts=len(rows),
        steps=sum(row["steps"] for row in rows),
        learning_seconds=round(sum(row["seconds"] for row in rows), 1),
    )


def sentence(learned: LearnedRecord) -> str:
    """Say what the figures mean."""
    if learned.unmoved == learned.parts:
        return "no learned mask beat its one-shot prior on held-out data: the masks are the priors, unchanged."
    kept = (
        f"; {learned.unmoved} of {learned.parts} blocks kept their prior" if learned.unmoved else ""
    )
    return (
        f"learned per {'block' if learned.objective == 'block' else 'model'}: mean held-out loss "
        f"{learned.prior:.4g} for the one-shot prior, {learned.best:.4g} for the learned mask; "
        f"{learned.changed:.1%} of the groups changed{kept}."
    )
