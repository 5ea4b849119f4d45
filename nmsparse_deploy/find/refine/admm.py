"""ADMM: weights on a mask by the alternating direction method of multipliers, and the mask chosen
on the way.

Normalise the inputs, `s = √diag G`, `Ĝ = G/(s sᵀ)`, `Ŵ = W diag(s)`, so that magnitude is Wanda's
score, and add the damping to `Ĝ`, which pulls towards `Ŵ`. With `C = Ŵ Ĝ` and `Q = (Ĝ + ρI)⁻¹`,
starting from `X = Ŵ` and `U = 0`:

    Z = (X + U) ∘ M,    U = U + X - Z,    X = (C + ρ(Z - U)) Q

`M` keeps the largest `|X + U|` of every group; during the first three quarters of the iterations it
is chosen anew each time, first with `group - 1` kept, then one fewer in equal parts down to `keep`.
(All kept would leave `X = Ŵ` where it is.) Without `gradual` the mask is the given one. `Z / s` is
the answer.

Boža, Fast and Effective Weight Update for Pruned Large Language Models, 2024, section 3; there the
soft masks are unstructured, and N:M jumps to the pattern at once.
"""

from __future__ import annotations

import math

import torch

from nmsparse_deploy.find.methods.base import LayerResult
from nmsparse_deploy.find.methods.hessian import FP64_WIDTH
from nmsparse_deploy.find.refine.base import PrunedLayer
from nmsparse_deploy.masks import project
from nmsparse_deploy.pattern import NMPattern
from nmsparse_deploy.recipe import Admm

SOFT = 0.75
"""Share of the iterations in which the mask is still moving: 15 of the paper's 20."""

FLOOR = 1e-8
"""Scale of a dead column, relative to the largest: its weights are the first to go, and nothing is
divided by zero."""


def solve(
    weight: torch.Tensor,
    gram: torch.Tensor,
    pattern: NMPattern,
    mask: torch.Tensor | None,
    *,
    steps: int,
    damping: float,
    rho: float,
) -> LayerResult:
    """Mask and weights `[R, n]` for the dense `weight`; `mask` is kept, None = chosen on the
    way."""
    scale = _scale(gram)
    target = weight * scale
    normal = gram / scale.outer(scale)
    normal.diagonal().add_(damping)
    wanted, inverse = target @ normal, _inverse(normal, rho)
    kept = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    x, u = target, torch.zeros_like(target)
    moving = max(1, round(SOFT * steps))
    for step in range(steps):
        if mask is None and step < moving:
            kept = project((x + u).abs(), level(pattern, step, moving))
        z = torch.where(kept, x + u, 0.0)
        u = u + x - z
        x = (wanted + rho * (z - u)) @ inverse
    return LayerResult(kept, torch.where(kept, x + u, 0.0) / scale)


def level(pattern: NMPattern, step: int, moving: int) -> NMPattern:
    """Return the pattern of a step: one more zero per group after each of `zeros` equal parts of
    `moving` steps, and `pattern` itself in the last."""
    return NMPattern(pattern.group - math.ceil((step + 1) * pattern.zeros / moving), pattern.group)


def _scale(gram: torch.Tensor) -> torch.Tensor:
    scale = gram.diagonal().sqrt()
    largest = float(scale.max())
    return scale.clamp(min=FLOOR * largest) if largest > 0 else torch.ones_like(scale)


def _inverse(normal: torch.Tensor, rho: float) -> torch.Tensor:
    """Return `(Ĝ + ρI)⁻¹`: safe with any Gram, since ρ and the damping are large beside a unit
    diagonal."""
    shifted = normal.to(torch.float64 if len(normal) <= FP64_WIDTH else torch.float32, copy=True)
    shifted.diagonal().add_(rho)
    return torch.linalg.inv(shifted).to(normal.dtype)


def refine(layer: PrunedLayer, step: Admm) -> LayerResult:
    assert layer.stats.gram is not None
    mask = None if step.gradual else layer.result.mask
    return solve(
        layer.dense,
        layer.stats.gram,
        layer.groups,
        mask,
        steps=step.steps,
        damping=step.damping,
        rho=step.rho,
    )
