"""Subjects that masks are learned on.

A subject is a whole model with its own loss and its dense self as the teacher, or one block against
the dense block's output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.find.learn.losses import classification, divergence, next_token, relative_error
from nmsparse_deploy.find.learn.mask_parametrization import MaskSite, showing
from nmsparse_deploy.find.learn.step_context import StepContext
from nmsparse_deploy.models.loaded import Batch
from nmsparse_deploy.models.objective import Objective
from nmsparse_deploy.recipe import Training
from nmsparse_deploy.system.hardware import autocast_for


def split(count: int, share: float) -> tuple[Sequence[int], Sequence[int]]:
    """Return the batches to learn from, and the last `share` of them, at least one, to evaluate
    on."""
    held_out = min(count, max(1, round(share * count)))
    return range(count - held_out), range(count - held_out, count)


class BlockSubject:
    """One block. Its masks see what the pruned model feeds it and aim at what the dense model has
    at its exit.

    `run(module, number, x)` calls a block on batch `number`; `dense_inputs` are the dense model's
    states at its entrance.
    """

    varies = False

    def __init__(
        self,
        module: nn.Module,
        sites: Mapping[str, MaskSite],
        inputs: Sequence[torch.Tensor],
        dense_inputs: Sequence[torch.Tensor],
        run: Callable[[nn.Module, int, torch.Tensor], torch.Tensor],
        holdout: float,
    ) -> None:
        self.module, self.sites, self.inputs, self.run = module, sites, inputs, run
        self.training, self.held_out = split(len(inputs), holdout)
        self.samples = len(inputs[0])
        with torch.no_grad():
            self.targets = [run(module, number, x) for number, x in enumerate(dense_inputs)]

    def loss_terms(self, number: int, context: StepContext) -> dict[str, torch.Tensor]:
        return {"error": self.score(number)}

    def score(self, number: int) -> torch.Tensor:
        return relative_error(
            self.run(self.module, number, self.inputs[number]), self.targets[number]
        )


class ModelSubject:
    """A whole model on batches that a subclass supplies: its own loss, and the distance to its
    dense self."""

    varies = False

    def __init__(
        self,
        module: nn.Module,
        sites: Mapping[str, MaskSite],
        count: int,
        samples: int,
        objective: Objective,
        spec: Training,
        compute: torch.dtype,
    ) -> None:
        self.module, self.sites, self.objective, self.spec, self.compute = (
            module,
            sites,
            objective,
            spec,
            compute,
        )
        self.training, self.held_out = split(count, spec.holdout)
        self.samples = samples

    def batch(
        self, number: int, context: StepContext | None = None
    ) -> tuple[Batch, torch.Tensor | None]:
        """Return micro-batch `number` and its classes, if they are known; as training sees it at
        `context`, or for evaluation."""
        raise NotImplementedError

    def loss_terms(self, number: int, context: StepContext) -> dict[str, torch.Tensor]:
        """Return the task's loss where the batch is labelled, and the distance to the dense
        model."""
        spec, (batch, labels) = self.spec, self.batch(number, context)
        teacher = self._dense(batch) if spec.distill else None
        output = self._signal(batch)
        terms = {}
        if spec.task and self.objective.kind == "cross-entropy":
            terms["task"] = spec.task * next_token(output, batch["input_ids"])
        elif spec.task and labels is not None:
            terms["task"] = spec.task * classification(output, labels)
        if teacher is not None:
            far = (
                relative_error(output, teacher)
                if self.objective.kind == "hidden"
                else divergence(output, teacher, spec.temperature)
            )
            terms["distill"] = spec.distill * far
        if not terms:
            raise UsageError(
                "There is nothing to learn from: the data has no labels, and learn.distill is 0."
            )
        return terms

    def score(self, number: int) -> torch.Tensor:
        """Return what suits the model's family: cross-entropy, or the distance to the dense
        model."""
        batch, _ = self.batch(number)
        kind, output = self.objective.kind, self._signal(batch)
        if kind == "cross-entropy":
            return next_token(output, batch["input_ids"])
        dense = self._dense(batch)
        return relative_error(output, dense) if kind == "hidden" else divergence(output, dense, 1.0)

    def _signal(self, batch: Batch) -> torch.Tensor:
        with autocast_for(self.compute, next(self.module.parameters()).device):
            return self.objective.signal(self.module(**batch))

    def _dense(self, batch: Batch) -> torch.Tensor:
        with torch.no_grad(), showing(self.module, "dense"):
            return self._signal(batch)


class BatchSubject(ModelSubject):
    """Batches of keyword arguments in memory. `labels` among them are classes, not an argument of
    the model."""

    def __init__(
        self,
        module: nn.Module,
        sites: Mapping[str, MaskSite],
        batches: Sequence[Batch],
        objective: Objective,
        spec: Training,
        compute: torch.dtype,
    ) -> None:
        samples = len(
            next(value for value in batches[0].values() if isinstance(value, torch.Tensor))
        )
        super().__init__(module, sites, len(batches), samples, objective, spec, compute)
        self.labels = [batch.get("labels") for batch in batches]
        self.batches = [
            {name: value for name, value in batch.items() if name != "labels"} for batch in batches
        ]

    def batch(
        self, number: int, context: StepContext | None = None
    ) -> tuple[Batch, torch.Tensor | None]:
        return self.batches[number], self.labels[number]
