"""What a model loses when its weights change, per sample and without labels that nobody has.

* language models: token cross-entropy, in nats per token (text is its own label)
* models with a classifier: `KL(p_dense ‖ p)` of the logits, in nats
* the others: `‖h - h_dense‖² / ‖h_dense‖²` of the final hidden states (diffusion: of the
  prediction)

The last two are zero at the dense model; their Hessians there are the Fisher matrix and
`2 JᵀJ / ‖h‖²`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div

from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.models.outputs import primary_output

Kind = Literal["cross-entropy", "kl", "hidden"]
UNITS: dict[Kind, str] = {
    "cross-entropy": "nats per token",
    "kl": "nats of KL",
    "hidden": "squared relative error of the hidden states",
}
PIECE = 256
"""Tokens whose logits are turned to fp32 at a time."""


@dataclass(frozen=True)
class Objective:
    """A loss per sample of a model's output; `reference` is what `signal` gave for the dense
    model."""

    kind: Kind

    @property
    def unit(self) -> str:
        return UNITS[self.kind]

    def signal(self, output: Any) -> torch.Tensor:
        """Return what the loss looks at: logits, final hidden states, or what a diffusion model
        predicts."""
        return primary_output(output).value

    def loss(
        self, output: Any, batch: Mapping[str, Any], reference: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the loss `[samples]`, fp32. `reference` is not needed for cross-entropy."""
        signal = self.signal(output)
        if self.kind == "cross-entropy":
            return _cross_entropy(signal, batch["input_ids"])
        assert reference is not None
        if self.kind == "kl":
            p, q = (x.float().log_softmax(-1).flatten(0, -2) for x in (reference, signal))
            return (
                kl_div(q, p, reduction="none", log_target=True)
                .sum(-1)
                .view(len(signal), -1)
                .mean(1)
            )
        dense = reference.float().flatten(1)
        return (signal.float().flatten(1) - dense).square().sum(1) / dense.square().sum(1).clamp(
            min=1e-30
        )


def _cross_entropy(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Average over the tokens of each sample; the first has no prediction."""
    pieces = [
        cross_entropy(part.float().flatten(0, 1), target.flatten(), reduction="none").view(
            target.shape
        )
        for part, target in zip(logits[:, :-1].split(PIECE, 1), ids[:, 1:].split(PIECE, 1))
    ]
    return torch.cat(pieces, 1).mean(1)


def objective(loaded: LoadedModel, output: Any) -> Objective:
    """Choose what suits the model, by its family and one output of it."""
    return (
        Objective("cross-entropy") if loaded.family == "llm" else unlabelled(loaded.module, output)
    )


def unlabelled(module: nn.Module, output: Any) -> Objective:
    """Choose what compares a model's output with the dense model's."""
    if isinstance(output, torch.Tensor):  # timm
        return Objective("kl" if getattr(module, "num_classes", 0) else "hidden")
    return Objective("kl" if primary_output(output).name == "logits" else "hidden")
