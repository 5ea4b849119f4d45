"""ALPS: the alternating direction method of multipliers searches the support, least squares finds
its weights.

With `Ĥ` the damped Gram scaled to unit diagonal by `s`, `Ŵ = W s`, and a copy `D` of the weights
that follows the pattern, each iteration is

    B = (Ŵ Ĥ - V + ρ D)(Ĥ + ρI)⁻¹,    D = P(B + V/ρ),    V = V + ρ (B - D)

where `P` keeps the largest of every group, so `D` follows the pattern all the time. `ρ` grows with
the share of the mask that changed lately, until nothing changes. The support is then refitted by
conjugate gradients.

Meng et al., ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models, 2024, section
3. The ridge is that of the released code (0.01 of the mean diagonal; the paper prints the trace). `B` is
computed as the equal `Ŵ - (V + ρ (Ŵ - D))(Ĥ + ρI)⁻¹` with one Cholesky factor for every `ρ`, where the released code
keeps an eigendecomposition: scaled and damped the matrix is well conditioned, and factors in fp32 without harm.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.find.calibration.layer_stats import LayerStats
from nmsparse_deploy.find.methods.base import LayerResult
from nmsparse_deploy.find.methods.hessian import normalised
from nmsparse_deploy.find.methods.least_squares import conjugate_gradients
from nmsparse_deploy.masks import project
from nmsparse_deploy.pattern import NMPattern

DAMPING = 0.01
ITERATIONS = 60
STEPS = 20
"""Conjugate-gradient steps on the support."""
RHO = 0.1
EVERY = 3
"""Iterations between two looks at the mask."""
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""Factors of `ρ` where more than this share of the mask has changed since the last look."""
MOVING, RETREAT = 0.005, 5.0
"""When the first looks find no more change than this, `ρ` was too large: divide it and start
again."""
SETTLED, EARLIEST = 3e-4, 30
"""Less change than this ends the search, but not before this iteration."""


def prune_layer(
    weight: torch.Tensor,
    stats: LayerStats,
    pattern: NMPattern,
    mask: torch.Tensor | None = None,
    damping: float = DAMPING,
    iterations: int = ITERATIONS,
) -> LayerResult:
    """Prune `weight` `[R, n]` to `pattern`; the search starts from `mask` where one is given. Needs
    `stats.gram`."""
    assert stats.gram is not None
    hessian, scale = normalised(stats.gram, damping)
    scaled = weight * scale
    kept, sparse = deque(admm(scaled, hessian, pattern, mask, iterations), maxlen=1)[0]
    fitted = conjugate_gradients(hessian, scaled @ hessian, sparse, kept, STEPS)
    return LayerResult(kept, torch.where(kept, fitted / scale, 0.0))


def admm(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    pattern: NMPattern,
    mask: torch.Tensor | None = None,
    iterations: int = ITERATIONS,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the mask and `D` at the start and after each iteration, for a `hessian` of unit
    diagonal.

    Starts from `mask`, or from the largest of `weight` (with unit diagonal, Wanda's mask).
    """
    start = project(weight.abs(), pattern) if mask is None else mask
    seen, rho, moving = start, RHO, False
    factor, sparse = _factor(hessian, rho), torch.where(start, weight, 0.0)
    dual = rho * (weight - sparse)
    yield start, sparse
    for step in range(1, iterations + 1):
        point = (
            weight - torch.cholesky_solve((dual + rho * (weight - sparse)).T, factor).T + dual / rho
        )  # B + V/ρ
        kept = project(point.abs(), pattern)
        sparse = torch.where(kept, point, 0.0)
        dual = rho * (point - sparse)
        yield kept, sparse
        if step % EVERY:
            continue
        changed = float((kept ^ seen).sum()) / float(kept.sum())
        moving = moving or changed > MOVING
        if moving and (changed == 0 or (step > EARLIEST and changed < SETTLED)):
            return
        if moving:
            seen, rho = kept, rho * next(factor for share, factor in GROWTH if changed > share)
        else:
            seen, rho, sparse = start, rho / RETREAT, torch.where(start, weight, 0.0)
            dual = rho * (weight - sparse)
        factor = _factor(hessian, rho)


def _factor(hessian: torch.Tensor, rho: float) -> torch.Tensor:
    """Lower Cholesky factor of `Ĥ + ρI`."""
    shifted = hessian.clone()
    shifted.diagonal().add_(rho)
    factor, info = torch.linalg.cholesky_ex(shifted)
    if int(info):
        raise NmsparseError(
            "The calibration statistics of this layer cannot be factorised, even damped.",
            "use more calibration samples",
        )
    return factor
