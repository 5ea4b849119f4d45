"""Refit: the least-squares weights on a fixed mask, by conjugate gradients, all rows at once.

With inputs `X_s` of the pruned stream and `X_d` of the dense stream (columns are tokens), blend `α`
and the mask `S`, every row solves

    min over ŵ on S of  ‖(α w X_d + (1-α) w X_s) - ŵ X_s‖²  + λ‖w - ŵ‖²

that is `ŵ_S H_SS = (w C)_S` with `H = X_s X_sᵀ + λI` and `C = α X_d X_sᵀ + (1-α) X_s X_sᵀ + λI`.
Both are normalised to unit diagonal first, so λ is relative. Rows have their own step lengths; the
residual is projected onto the mask, so nothing outside it ever changes. With α > 0 a layer also
repairs what the layers before it have shifted; α = 1 is known to shrink weights layer after layer
and destroys the model (the regressors are noisy), a quarter to a half helps.

A layer whose output is added to the residual stream can repair the drift of that stream as well:
with `R_s` and `R_d` what its output is added to in the two streams, `β (R_d - R_s)` joins the
target, that is `β (R_d - R_s) X_sᵀ` joins `w C`.

Meng et al., ALPS, 2024, section 3.3 (refit on the support); the blended target is the asymmetric
calibration of Li et al., GPTAQ, 2025, damped.
"""

from __future__ import annotations

import torch

from nmsparse_deploy.find.calibration.layer_stats import LayerStats
from nmsparse_deploy.find.methods.base import LayerResult
from nmsparse_deploy.find.methods.least_squares import conjugate_gradients
from nmsparse_deploy.find.refine.base import PrunedLayer
from nmsparse_deploy.recipe import Refit


def refit(
    weight: torch.Tensor,
    start: torch.Tensor,
    mask: torch.Tensor,
    stats: LayerStats,
    *,
    blend: float,
    residual: float,
    steps: int,
    damping: float,
) -> torch.Tensor:
    """Return weights `[R, n]` on `mask` for the dense `weight`, warm-started from `start`.

    Needs `stats.gram`, and `stats.cross` or `stats.wanted` when `blend` is not 0.
    """
    assert stats.gram is not None
    scale = stats.gram.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    outer = scale.outer(scale)
    hessian = stats.gram / outer
    scaled = weight * scale
    if not blend:
        wanted = scaled @ hessian
    elif stats.wanted is not None:
        wanted = torch.lerp(scaled @ hessian, stats.wanted / scale, blend)
    else:
        wanted = scaled @ torch.lerp(hessian, _cross(stats) / outer, blend)
    wanted += damping * scaled
    if residual and stats.drift is not None:
        wanted += residual * stats.drift / scale
    hessian.diagonal().add_(damping)
    x = torch.where(mask, start * scale, 0.0)
    return torch.where(mask, conjugate_gradients(hessian, wanted, x, mask, steps) / scale, 0.0)


def _cross(stats: LayerStats) -> torch.Tensor:
    assert stats.cross is not None
    return stats.cross


def refine(layer: PrunedLayer, step: Refit) -> LayerResult:
    """Refit the weights of a layer on its mask."""
    weight = refit(
        layer.dense,
        layer.weight,
        layer.result.mask,
        layer.stats,
        blend=step.blend,
        residual=step.residual,
        steps=step.steps,
        damping=step.damping,
    )
    return LayerResult(layer.result.mask, weight)
