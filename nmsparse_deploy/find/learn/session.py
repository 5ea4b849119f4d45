"""Learned masks inside the prune stage: priors, the best of them, the loop, and what it has to tell.

With the block objective a block is learned where the walk stands, from the stream of the pruned model; with the global
one the whole model is learned first (`learn_model.py`) and the walk only writes down the masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.find.learn.checkpoint import Checkpoints
from nmsparse_deploy.find.learn.learner import Learned, Learnt, Subject
from nmsparse_deploy.find.learn.loop import Outcome, fit
from nmsparse_deploy.find.learn.mask_parametrization import Site
from nmsparse_deploy.find.learn.memory_budget import Budget, Weights, budget
from nmsparse_deploy.find.learn.prior_selection import Masks, best_prior
from nmsparse_deploy.find.learn.subjects import BlockSubject
from nmsparse_deploy.find.methods.base import LayerResult, Method
from nmsparse_deploy.find.plan.make_plan import Plan
from nmsparse_deploy.find.refine.base import Block, BlockResult
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.models.base import to_rows
from nmsparse_deploy.pattern import NMPattern
from nmsparse_deploy.recipe import Learn
from nmsparse_deploy.registry import LEARNERS
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.system import distributed
from nmsparse_deploy.system.progress import Progress

FOLDER = "learning"
"""In the run folder while masks are learned: priors and checkpoints."""

ADVICE = "a smaller calibration.batch, gradient_checkpointing, objective: block, or more processes with shard: true"


@dataclass(frozen=True)
class Session:
    """One prune stage that learns: its settings and where it writes."""

    run: RunDir
    spec: Any
    """Settings of the method, a `Learn`."""
    seed: int
    compute: torch.dtype
    device: torch.device
    progress: Progress
    stored: Mapping[str, Masks] = field(default_factory=dict)
    """Priors from files, checked."""

    @property
    def method(self) -> Learned:
        found: Learned = LEARNERS.load(self.spec.name)
        return found

    def learn(self, subject: Subject, priors: Mapping[str, Masks], room: Budget, name: str,
              title: str) -> tuple[dict[str, Learnt], dict[str, Any]]:
        """From the best of the priors to the best mask found, and the facts. Resumes from the checkpoint `name`."""
        room.check(self.device, self._advice(subject, room))
        self.progress(f"{title}: {room.sentence(self.device)}", 0, 0)
        chosen, losses = best_prior(subject, priors)
        outcome: Outcome = fit(subject, self.method.make(self.spec), priors[chosen], self.spec, self.seed,
                               Checkpoints(self.run, f"{FOLDER}/{name}.safetensors"), self.progress, title)
        patterns = {site.name: site.pattern for site in subject.sites.values()}
        facts = {"prior_method": chosen, "priors": losses, **outcome.facts, "memory": room.to_json(),
                 "changed": changed(outcome.learnt, priors[chosen], patterns)}
        return outcome.learnt, facts

    @property
    def shares(self) -> int:
        """Over how many processes the state is split."""
        return distributed.current().world if self.spec.shard else 1

    def _advice(self, subject: Subject, room: Budget) -> str:
        """What to do when `room` is more than there is, with figures where the method has lighter settings."""
        sizes = [(site.pattern, subject.module.get_parameter(site.path).numel()) for site in subject.sites.values()]
        told = []
        for change in self.method.lighter:
            spec = self.spec.model_copy(update=change)
            state = sum(count * self.method.bytes_per_weight(spec, pattern) for pattern, count in sizes)
            needed = replace(room, state=state / self.shares).total
            if needed < room.total:
                told.append(f"{', '.join(f'{key}: {value}' for key, value in change.items())} takes "
                            f"{needed / 1e9:.1f} GB")
        return "; ".join([*told, ADVICE])

    def learn_block(self, block: Block, spec: Learn, number: int, path: str) -> BlockResult:
        """A block refinement that throws the given weights away and learns masks for the dense ones."""
        assert block.dense_inputs is not None
        sites = {name: Site(f"{path}.{name}", name, layer.axis, layer.groups) for name, layer in block.layers.items()}
        subject = BlockSubject(block.dense, sites, block.inputs, block.dense_inputs, block.run, spec.holdout)
        priors = {method: {sites[name].name: mask_of(method, layer.dense, layer.stats, layer.groups)
                           for name, layer in block.layers.items()} for method in spec.prior_methods}
        priors |= {file: {site.name: masks[site.name] for site in sites.values()}
                   for file, masks in self.stored.items()}
        tokens = max(x.numel() // x.shape[-1] for x in block.inputs)
        room = self.room([(layer.dense, layer.groups) for layer in block.layers.values()], tokens)
        learnt, facts = self.learn(subject, priors, room, f"block-{number:03d}", f"block {number}")
        layers = {name: LayerResult(learnt[site.name].mask, learnt[site.name].weight) for name, site in sites.items()}
        return BlockResult(layers, facts={"objective": "block", **facts})

    def room(self, weights: Sequence[tuple[torch.Tensor, NMPattern]], tokens: int, outputs: int = 0) -> Budget:
        """Predicted memory for matrices `[n, k]` with their patterns."""
        rows = [Weights(rows.numel(), rows.shape[1], rows.shape[0], pattern) for rows, pattern in weights]
        return budget(rows, lambda pattern: self.method.bytes_per_weight(self.spec, pattern), tokens, self.compute,
                      recomputed=self.spec.gradient_checkpointing, outputs=outputs, processes=self.shares)


def stored_priors(spec: Learn, module: nn.Module, plan: Plan) -> dict[str, Masks]:
    """The mask files among the priors as bool rows.

    Raises `UsageError` for a file that is not there, damaged, incomplete or of another pattern, `CheckFailed` for masks
    of another model.
    """
    found: dict[str, Masks] = {}
    for file in spec.prior_files:
        masks = MaskSet.load(Path(file))
        wanted = {row.target.name: row for row in plan.pruned()}
        MaskSet({name: mask for name, mask in masks.masks.items() if name in wanted}).check_base(
            dict(module.named_parameters()))
        for name, row in wanted.items():
            if name not in masks.masks:
                raise UsageError(f"The prior '{file}' has no mask for '{name}'.", "leave it dense with --exclude")
            if (stored := masks.masks[name].pattern) != row.pattern or masks.masks[name].axis != row.target.axis:
                raise UsageError(f"The prior '{file}' is {stored} on '{name}', which is to be {row.pattern}.")
        found[file] = {name: to_rows(masks.masks[name].unpack(), row.target.axis) for name, row in wanted.items()}
    return found


def mask_of(method: str, weight: torch.Tensor, stats: Any, pattern: NMPattern) -> torch.Tensor:
    """What a one-shot method would keep, for the original weights."""
    return Method.load(method).prune_layer(weight, stats, pattern).mask


def changed(learnt: Mapping[str, Learnt], priors: Masks, patterns: Mapping[str, NMPattern]) -> float:
    """Share of the groups whose mask is another than the prior's."""
    different = groups = 0
    for name, one in learnt.items():
        moved = (one.mask != priors[name].cpu()).reshape(-1, patterns[name].group).any(-1)
        different += int(moved.sum())
        groups += moved.numel()
    return different / groups if groups else 0.0


def summary(told: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a stage learned, from the facts of its blocks or of the whole model."""
    if not told:
        raise NmsparseError("Nothing was learned.")
    count = len(told)
    mean = {key: sum(row[key] for row in told) / count for key in ("prior", "best", "changed")}
    return {"objective": told[0]["objective"], **mean, "unmoved": sum(row["changed"] == 0 for row in told),
            "parts": count, "steps": sum(row["steps"] for row in told),
            "learning_seconds": round(sum(row["seconds"] for row in told), 1)}


def sentence(found: dict[str, Any]) -> str:
    """What the summary means."""
    what = "block" if found["objective"] == "block" else "model"
    if found["unmoved"] == found["parts"]:
        return "no learned mask beat its one-shot prior on held-out data: the masks are the priors, unchanged."
    kept = f"; {found['unmoved']} of {found['parts']} blocks kept their prior" if found["unmoved"] else ""
    return (f"learned per {what}: mean held-out loss {found['prior']:.4g} for the one-shot prior, {found['best']:.4g} "
            f"for the learned mask; {found['changed']:.1%} of the groups changed{kept}.")
