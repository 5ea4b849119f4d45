"""The ProxSparse regulariser on one layer's least squares: no back-propagation, only the Gram of
its inputs.

    min_V  ½ tr[(V - Ŵ) Ĥ (V - Ŵ)ᵀ] + λ Σ_groups e_{N+1}(|v|),    Ĥ of unit diagonal, rows of Ŵ of unit size

Accelerated proximal gradient steps `V <- prox_{λ/L}(Y - (Y - Ŵ) Ĥ / L)`, with `L` the largest
eigenvalue, from the dense weights and with `λ` growing geometrically until every group holds N
entries. Correlated inputs take over for each other on the way, which a score cannot see. The
support is then refitted by conjugate gradients.

Kübler et al., A Proximal Operator for Inducing 2:4-Sparsity, 2025, arXiv:2501.18015, section 4
(with masked gradient steps at the end). Scaling, acceleration and the conjugate gradients are this
project's.
"""

from __future__ import annotations

import torch

from nmsparse_deploy.find.calibration.layer_stats import LayerStats
from nmsparse_deploy.find.learn.prox import prox
from nmsparse_deploy.find.methods.base import LayerResult
from nmsparse_deploy.find.methods.hessian import normalised
from nmsparse_deploy.find.methods.least_squares import conjugate_gradients
from nmsparse_deploy.masks import project
from nmsparse_deploy.pattern import NMPattern

DAMPING = 0.01
FIRST, GROWTH = 0.01, 1.1
"""λ at the start, and its factor from one step to the next."""
MAX_STEPS = 150
"""Steps at most; the support is projected if some groups still hold more."""
STEPS = 20
"""Conjugate-gradient steps on the support."""
SWEEPS = 10
"""Of the proximal operator: the next step corrects what is not quite at rest."""
POWER, MARGIN = 100, 1.1
"""Power iterations for the largest eigenvalue, and a margin for what they miss."""


def prune_layer(
    weight: torch.Tensor,
    stats: LayerStats,
    pattern: NMPattern,
    mask: torch.Tensor | None = None,
    damping: float = DAMPING,
    growth: float = GROWTH,
) -> LayerResult:
    """Prune `weight` `[R, n]` to `pattern`. Needs `stats.gram`."""
    assert stats.gram is not None
    hessian, scale = normalised(stats.gram, damping)
    scaled = weight * scale
    size = scaled.square().mean(1, keepdim=True).sqrt()
    scaled = scaled / torch.where(size > 0, size, 1.0)
    sparse = descend(scaled, hessian, pattern, growth)
    kept = project(sparse.abs(), pattern)
    fitted = conjugate_gradients(
        hessian, scaled @ hessian, torch.where(kept, sparse, 0.0), kept, STEPS
    )
    return LayerResult(kept, torch.where(kept, fitted * size / scale, 0.0))


def descend(
    weight: torch.Tensor, hessian: torch.Tensor, pattern: NMPattern, growth: float = GROWTH
) -> torch.Tensor:
    """Return weights whose groups hold N entries, or nearly, after the steps."""
    length = 1 / (MARGIN * largest_eigenvalue(hessian))
    now = before = weight
    strength, momentum = FIRST, 1.0
    for _ in range(MAX_STEPS):
        follows = 0.5 + (0.25 + momentum**2) ** 0.5
        ahead = now + (momentum - 1) / follows * (now - before)
        before, now = (
            now,
            prox(ahead - length * (ahead - weight) @ hessian, length * strength, pattern, SWEEPS),
        )
        momentum, strength = follows, strength * growth
        if ((now != 0).unflatten(1, (-1, pattern.group)).sum(-1) <= pattern.keep).all():
            break
    return now


def largest_eigenvalue(hessian: torch.Tensor) -> float:
    """Find the largest eigenvalue of a positive semi-definite matrix, by power iteration."""
    vector = torch.ones(len(hessian), device=hessian.device) / len(hessian) ** 0.5
    for _ in range(POWER):
        vector = hessian @ vector
        vector = vector / vector.norm()
    return float(vector @ hessian @ vector)
