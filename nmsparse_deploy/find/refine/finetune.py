"""Fine-tune: train what survives in the whole model, with the dense model as the teacher.

    loss = task · CE + distill · T² KL(dense ‖ pruned),    AdamW

It comes after any mask. Surviving weights, norms and biases move; embeddings and heads stay. The
four ways are in `learn/sparse_training.py`: the mask fixed, SR-STE and S-STE with a mask that
follows the weights and is frozen towards the end, and low-rank adapters under the mask. Held-out
batches decide which state is kept; when none beats the start, that is the start.

The weights of the loss are those of Huang et al., Pruning Large Language Models with
Semi-Structural Adaptive Sparse Training (AST), AAAI 2025, arXiv:2407.20584.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from nmsparse_deploy.find.learn.learner import LearnedMask, MaskLearner, Subject
from nmsparse_deploy.find.learn.loop import Outcome, fit
from nmsparse_deploy.find.learn.mask_parametrization import (
    MakeParametrization,
    MaskParametrization,
    MaskSite,
)
from nmsparse_deploy.find.learn.sparse_training import Adapters, FixedMask, SrSte, SSte
from nmsparse_deploy.find.learn.step_context import StepContext
from nmsparse_deploy.find.refine.base import PrunedModel
from nmsparse_deploy.recipe import Finetune


class FinetuneLearner(MaskLearner):
    """AdamW on the weights under their masks, and on norms and biases."""

    trains_weights = True
    shards = False  # masks, penalties and norms are looked at outside the forward pass

    def __init__(self, parametrize: MakeParametrization, rate: float) -> None:
        super().__init__(parametrize, rate, decay=0.0, moments=32)
        self.vectors: dict[str, nn.Parameter] = {}
        """Norms and biases by name."""

    def prepare(
        self, subject: Subject, priors: Mapping[str, torch.Tensor]
    ) -> torch.optim.Optimizer:
        self.vectors = {
            name: value for name, value in subject.module.named_parameters() if value.ndim < 2
        }
        optimiser = super().prepare(subject, priors)
        for value in self.vectors.values():
            value.requires_grad_(True)
        if self.vectors:
            optimiser.add_param_group({"params": list(self.vectors.values())})
        return optimiser

    def loss_terms(
        self, subject: Subject, number: int, context: StepContext
    ) -> dict[str, torch.Tensor]:
        terms = super().loss_terms(subject, number, context)
        penalties = [
            mask.parametrized_by(FixedMask).penalty(mask.values) for mask in self.masks.values()
        ]
        present = [term for term in penalties if term is not None]
        return {**terms, "decay": torch.stack(present).sum()} if present else terms

    def after_step(self, context: StepContext) -> None:
        for mask in self.masks.values():
            mask.parametrized_by(FixedMask).after_step(mask.values.data, context)

    def finish(self) -> dict[str, LearnedMask]:
        """Return weights, and norms and biases as if everything in them were kept."""
        vectors = {
            name: LearnedMask(
                torch.ones(value.shape, dtype=torch.bool), value.detach().float().cpu().clone()
            )
            for name, value in self.vectors.items()
        }
        return super().finish() | vectors

    def state(self) -> dict[str, torch.Tensor]:
        return {
            f"{mask.site.name}/{key}": value
            for mask in self.masks.values()
            for key, value in mask.parametrized_by(FixedMask).state().items()
        }

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        for mask in self.masks.values():
            prefix = f"{mask.site.name}/"
            own = {
                key.removeprefix(prefix): value
                for key, value in state.items()
                if key.startswith(prefix)
            }
            if own:
                mask.parametrized_by(FixedMask).restore(own)


def refine(pruned: PrunedModel, step: Finetune) -> Outcome:
    """Return the best weights found and their masks; see the module's docstring."""
    until = step.steps - round(step.frozen * step.steps)

    def parametrize(site: MaskSite) -> MaskParametrization:
        if step.how == "sr-ste":
            return SrSte(site.pattern, pruned.dense(site.name), step.refresh, until, step.decay)
        if step.how == "s-ste":
            return SSte(site.pattern, pruned.dense(site.name), until)
        return Adapters(site.name, step.rank) if step.how == "adapters" else FixedMask()

    return fit(
        pruned.subject,
        FinetuneLearner(parametrize, step.rate),
        pruned.masks,
        step,
        pruned.seed,
        pruned.checkpoints,
        pruned.progress,
        "fine-tuning",
    )
