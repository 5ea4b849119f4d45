"""The damped Hessian of a layer's least-squares problem, and the factor that the sweeps walk
along."""

from __future__ import annotations

import torch

from nmsparse_deploy.errors import NmsparseError

FP64_WIDTH = 4096
"""Factor in fp64 up to this width: cheap there, and safe for badly conditioned Grams."""
MIN_DAMPING = 1e-8
"""Where the damping starts to climb from zero."""


def dampen(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """Return `G + λI` with λ = `damping` times the mean diagonal (1 when there was no signal at
    all).

    A column that never saw an input is left with λ alone: the cheapest to prune, and untouched
    where it is kept. Raises `NmsparseError` when the Gram is not finite.
    """
    if not torch.isfinite(gram).all():
        raise NmsparseError(
            "The calibration statistics contain NaN or Inf; the model's activations overflow."
        )
    hessian = gram.to(torch.float64 if gram.shape[0] <= FP64_WIDTH else torch.float32, copy=True)
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    diagonal += damping * mean if mean > 0 else 1.0
    return hessian


def normalised(gram: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the damped Hessian at unit diagonal and the scale `s` of its columns, fp32:
    `H = Ĥ ∘ s sᵀ`."""
    hessian = dampen(gram, damping)
    scale = hessian.diagonal().sqrt()
    return (hessian / scale.outer(scale)).float(), scale.float()


def inverse_factor(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """Return the upper triangular `U` with `H⁻¹ = UᵀU` for the damped Hessian `H`; fp32, `[n, n]`.

    Its trailing blocks factor the inverses of the trailing blocks of `H`. When the factorisation
    fails the damping is raised tenfold up to 1, then negative eigenvalues are lifted; raises
    `NmsparseError` when even that fails.
    """
    strength = damping
    while True:
        factor = _factor(dampen(gram, strength))
        if factor is not None:
            return factor.float()
        if strength >= 1.0:
            break
        strength = min(1.0, max(strength * 10, MIN_DAMPING))
    values, vectors = torch.linalg.eigh(dampen(gram, damping).double())
    lifted = (vectors * values.clamp(min=float(values[-1]) * 1e-6)) @ vectors.T
    factor = _factor((lifted + lifted.T) / 2)
    if factor is None:
        raise NmsparseError(
            "The calibration statistics of this layer cannot be factorised, even damped.",
            "use more calibration samples",
        )
    return factor.float()


def _factor(hessian: torch.Tensor) -> torch.Tensor | None:
    """Factor from the last row up, `H = V Vᵀ` with `V` upper triangular, and return `U = V⁻¹`; None
    on failure."""
    lower, info = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if int(info) or not torch.isfinite(lower).all():
        return None
    identity = torch.eye(lower.shape[0], dtype=lower.dtype, device=lower.device)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse.flip(0, 1) if torch.isfinite(inverse).all() else None
