"""What masks are learned on.

A whole model with its own loss and its dense self as the teacher, or one block against the dense block's output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..objective import Objective
from ..steps import Training
from .losses import classification, divergence, next_token, relative_error
from .masked import Site, showing


def split(count: int, share: float) -> tuple[Sequence[int], Sequence[int]]:
    """Batches to learn from, and the last `share` of them, at least one, to judge by."""
    held_out = min(count, max(1, round(share * count)))
    return range(count - held_out), range(count - held_out, count)


class BlockSubject:
    """One block. Its masks see what the pruned model feeds it and aim at what the dense model has at its exit.

    `run(module, number, x)` calls a block on batch `number`; `dense_inputs` are the dense model's states at its
    entrance.
    """

    def __init__(self, module: nn.Module, sites: Mapping[str, Site], inputs: Sequence[torch.Tensor],
                 dense_inputs: Sequence[torch.Tensor], run: Callable[[nn.Module, int, torch.Tensor], torch.Tensor],
                 holdout: float) -> None:
        self.module, self.sites, self.inputs, self.run = module, sites, inputs, run
        self.training, self.held_out = split(len(inputs), holdout)
        self.samples = len(inputs[0])
        with torch.no_grad():
            self.targets = [run(module, number, x) for number, x in enumerate(dense_inputs)]

    def loss_terms(self, number: int) -> dict[str, torch.Tensor]:
        return {"error": self.score(number)}

    def score(self, number: int) -> torch.Tensor:
        return relative_error(self.run(self.module, number, self.inputs[number]), self.targets[number])


class WholeModel:
    """A model with batches of keyword arguments. `labels` among them are classes, not an argument of the model."""

    def __init__(self, module: nn.Module, sites: Mapping[str, Site], batches: Sequence[Mapping[str, Any]],
                 objective: Objective, spec: Training, compute: torch.dtype = torch.float32) -> None:
        self.module, self.sites, self.objective, self.spec, self.compute = module, sites, objective, spec, compute
        self.labels = [batch.get("labels") for batch in batches]
        self.batches = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
        self.training, self.held_out = split(len(batches), spec.holdout)
        self.samples = len(next(value for value in batches[0].values() if isinstance(value, torch.Tensor)))

    def loss_terms(self, number: int) -> dict[str, torch.Tensor]:
        """The task's loss where the batch tells the truth, and the distance to the dense model."""
        spec, labels, batch = self.spec, self.labels[number], self.batches[number]
        teacher = self._dense(number) if spec.distill else None
        output = self._signal(number)
        terms = {}
        if spec.task and self.objective.kind == "cross-entropy":
            terms["task"] = spec.task * next_token(output, batch["input_ids"])
        elif spec.task and labels is not None:
            terms["task"] = spec.task * classification(output, labels)
        if teacher is not None:
            far = (relative_error(output, teacher) if self.objective.kind == "hidden"
                   else divergence(output, teacher, spec.temperature))
            terms["distill"] = spec.distill * far
        if not terms:
            raise UsageError("There is nothing to learn from: the data has no labels, and learn.distill is 0.")
        return terms

    def score(self, number: int) -> torch.Tensor:
        """What suits the model's family: cross-entropy, or the distance to the dense model."""
        kind, output = self.objective.kind, self._signal(number)
        if kind == "cross-entropy":
            return next_token(output, self.batches[number]["input_ids"])
        dense = self._dense(number)
        return relative_error(output, dense) if kind == "hidden" else divergence(output, dense)

    def _signal(self, number: int) -> torch.Tensor:
        with self._autocast():
            return self.objective.signal(self.module(**self.batches[number]))

    def _dense(self, number: int) -> torch.Tensor:
        with torch.no_grad(), showing(self.module, "dense"):
            return self._signal(number)

    def _autocast(self) -> AbstractContextManager[Any]:
        device = next(self.module.parameters()).device.type
        return torch.autocast(device, self.compute, enabled=self.compute != torch.float32)
