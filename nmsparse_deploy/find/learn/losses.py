"""Losses: that of the task, and the distance to the dense model, for which unlabelled data is
enough.

All return scalars in fp32. Distillation: Hinton et al. 2015, arXiv:1503.02531; denoising: Ho et al.
2020, arXiv:2006.11239.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

PIECE = 512
"""Rows of logits that are turned to fp32 at a time; they are computed again in the backward
pass."""
FAINT = 1e-6
"""A token with less than this share of the mean squared norm is as good as zero."""
STRIP = 64
"""Rows of two models' logits that are compared at a time: what a CPU's cache holds."""


def next_token(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy in nats per token; logits `[samples, tokens, vocabulary]`, ids
    `[samples, tokens]`."""
    return classification(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def classification(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy in nats; logits `[samples, classes]`, labels `[samples]`, or
    probabilities like the logits."""
    return _in_pieces(lambda x, y: cross_entropy(x.float(), y, reduction="sum"), logits, labels)


def divergence(logits: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the mean over rows of `T^2 KL(softmax(teacher/T) || softmax(logits/T))`, logits
    `[..., classes]`.

    The gradient reaches `logits` alone and is found along with the value, `T (q - p)` for every
    row.
    """
    return _Divergence.apply(logits.flatten(0, -2), teacher.detach().flatten(0, -2), temperature)


class _Divergence(torch.autograd.Function):
    """Logits are the largest tensors of a language model: each is read once, a strip at a time, and
    only the gradient is kept, in the logits' dtype."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, logits: torch.Tensor, teacher: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        gradient = torch.empty_like(logits)
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for x, t, out in zip(logits.split(STRIP), teacher.split(STRIP), gradient.split(STRIP)):
            log_q, log_p = ((z.float() / temperature).log_softmax(-1) for z in (x, t))
            p = log_p.exp()
            total += (p * log_p.sub_(log_q)).sum()
            out.copy_(log_q.exp_().sub_(p))
        ctx.save_for_backward(gradient)
        ctx.scale = temperature / len(logits)  # type: ignore[attr-defined]
        return (total * temperature**2 / len(logits)).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradient * (outer * ctx.scale).to(gradient.dtype), None, None  # type: ignore[attr-defined]


def relative_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean over tokens of `‖y - t‖² / ‖t‖²`, with states `[..., hidden]`; where `‖t‖`
    vanishes (behind a ReLU), the size of the usual token stands in."""
    target = target.float()
    size = target.square().sum(-1)
    usual = size.mean()
    size = torch.where(size > FAINT * usual, size, usual).clamp(min=torch.finfo(torch.float32).tiny)
    return ((output.float() - target).square().sum(-1) / size).mean()


def squared_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean over all entries of `(y - t)²`: the loss of a denoising model."""
    return (output.float() - target.float()).square().mean()


def _in_pieces(
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    logits: torch.Tensor,
    other: torch.Tensor,
) -> torch.Tensor:
    sums = [
        checkpoint(loss, x, y, use_reentrant=False, preserve_rng_state=False)
        for x, y in zip(logits.split(PIECE), other.split(PIECE))
    ]
    return torch.stack(sums).sum() / len(logits)
