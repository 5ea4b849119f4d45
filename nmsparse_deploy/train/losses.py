"""What is minimised: the task's own loss, and the distance to the dense model, for which unlabelled data is enough.

All return scalars in fp32. Distillation: Hinton et al. 2015, arXiv:1503.02531.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy, kl_div
from torch.utils.checkpoint import checkpoint

PIECE = 512
"""Rows of logits that are turned to fp32 at a time; they are computed again in the backward pass."""


def next_token(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats per token; logits `[samples, tokens, vocabulary]`, ids `[samples, tokens]`."""
    return classification(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def classification(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats; logits `[samples, classes]`, labels `[samples]`."""
    return _in_pieces(lambda x, y: cross_entropy(x.float(), y, reduction="sum"), logits, labels)


def divergence(logits: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Mean over rows of `T^2 KL(softmax(teacher/T) || softmax(logits/T))`, logits `[..., classes]`."""
    def piece(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        q, p = ((z.float() / temperature).log_softmax(-1) for z in (x, t))
        return temperature**2 * kl_div(q, p, reduction="sum", log_target=True)

    return _in_pieces(piece, logits.flatten(0, -2), teacher.flatten(0, -2))


def relative_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of `‖y - t‖² / ‖t‖²`, with states `[..., hidden]`."""
    target = target.float()
    size = target.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return ((output.float() - target).square().sum(-1) / size).mean()


def _in_pieces(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], logits: torch.Tensor,
               other: torch.Tensor) -> torch.Tensor:
    sums = [checkpoint(loss, x, y, use_reentrant=False, preserve_rng_state=False)
            for x, y in zip(logits.split(PIECE), other.split(PIECE))]
    return torch.stack(sums).sum() / len(logits)
