"""Masks drawn from one logit per weight: N of every M without replacement, in the order of a
Plackett-Luce law.

    P(o₁, …, o_N) = Π_t softmax(π over what was left before draw t)_{o_t}

Adding Gumbel noise to the logits and taking the N largest, largest first, draws exactly from this
law (Kool et al., ICML 2019). The gradient of the logarithm is the ordered score

    ∂ log P / ∂π_i = [i drawn] - Σ_t softmax(π over what was left before draw t)_i

whose expectation is zero. The probability of the mask as a set would sum over N! orders; the
ordered score estimates the same gradient without bias for every N. Everything goes through
log-softmax: `1 / (1 - p)` of the closed form for N = 2 (MaskPro, arXiv:2506.12876) blows up exactly
where training starts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

MIN_UNIFORM, MAX_UNIFORM = 1e-9, 1 - 1e-7
"""Uniform draws are clamped to these, so that their Gumbel noise is finite in fp32."""


def sample(
    logits: torch.Tensor, keep: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Draw `keep` places of every block: indices `[..., keep]` in the order of the draws, for
    `logits` `[..., M]`."""
    uniform = torch.rand(
        logits.shape, dtype=logits.dtype, device=logits.device, generator=generator
    )
    gumbel = -(-uniform.clamp(MIN_UNIFORM, MAX_UNIFORM).log()).log()
    return (logits + gumbel).topk(keep, dim=-1, sorted=True).indices


def as_mask(order: torch.Tensor, group: int) -> torch.Tensor:
    """Return drawn indices `[..., keep]` as a bool mask `[..., group]`."""
    empty = torch.zeros(*order.shape[:-1], group, dtype=torch.bool, device=order.device)
    return empty.scatter_(-1, order, True)


def log_probability(logits: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return `log P` of drawing exactly `order` `[..., keep]`, one number per block.
    Differentiable."""
    steps = [left.gather(-1, drawn).squeeze(-1) for left, drawn in _draws(logits, order)]
    return torch.stack(steps).sum(0)


def score(logits: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return `∂ log P(order) / ∂ logits`, `[..., M]`."""
    drawn = as_mask(order, logits.shape[-1]).to(logits.dtype)
    return drawn - sum(left.exp() for left, _ in _draws(logits, order))


def _draws(
    logits: torch.Tensor, order: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield before each draw: log-softmax over what is left (-inf elsewhere), and the index
    drawn."""
    left = logits
    for drawn in order.split(1, -1):
        yield left.log_softmax(-1), drawn
        left = left.scatter(-1, drawn, -torch.inf)
