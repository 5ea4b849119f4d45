"""Least squares on a fixed mask, by conjugate gradients, all rows at once.

With `H` the (damped) Hessian and `S` what the mask keeps, every row solves `x_S H_SS = wanted_S`.
Rows have their own step lengths, and the residual is projected onto the mask, so nothing outside it
ever changes. Meng et al., ALPS, 2024, section 3.3; there all rows share one step length.
"""

from __future__ import annotations

import torch


def conjugate_gradients(
    hessian: torch.Tensor, wanted: torch.Tensor, x: torch.Tensor, mask: torch.Tensor, steps: int
) -> torch.Tensor:
    """Solve `x_S H_SS = wanted_S` for every row of `[R, n]`, starting from `x`; a row that is
    solved stays as it is."""
    factor = _far_from_one(wanted * mask, x)
    if bool((factor != 1).any()):
        return _solve(hessian, wanted / factor, x / factor, mask, steps) * factor
    return _solve(hessian, wanted, x, mask, steps)


def _far_from_one(wanted: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return by row the power of two that brings values near 1 whose squares, or their rounding,
    would not be normal numbers; 1 for the other rows. Dividing by it changes no bit."""
    sizes = [torch.linalg.vector_norm(values, torch.inf, 1, True) for values in (wanted, x)]
    exponent = torch.frexp(torch.maximum(*sizes)).exponent
    far = (exponent < -40) | (exponent > 60)
    exponent = torch.where(far, exponent, 0).clamp(-120, 120)
    return torch.exp2(exponent.to(x.dtype))


def _solve(
    hessian: torch.Tensor, wanted: torch.Tensor, x: torch.Tensor, mask: torch.Tensor, steps: int
) -> torch.Tensor:
    keep = mask.to(x.dtype)
    x = x.clone()
    residual = torch.addmm(wanted, x, hessian, alpha=-1).mul_(keep)
    direction, moved = residual.clone(), torch.empty_like(residual)
    norm = _dot(residual, residual)
    # Below the rounding of the right-hand side a step only amplifies noise, and its ratios
    # underflow.
    wanted = wanted * keep
    solved = torch.finfo(x.dtype).eps ** 2 * _dot(wanted, wanted)
    for _ in range(steps):
        torch.mm(direction, hessian, out=moved).mul_(keep)
        length = torch.where(norm > solved, _ratio(norm, _dot(direction, moved)), 0.0)
        x.addcmul_(length, direction)
        residual.addcmul_(length, moved, value=-1)
        before, norm = norm, _dot(residual, residual)
        direction.mul_(_ratio(norm, before)).add_(residual)
    return x


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the products of rows, `[R, 1]`."""
    return torch.linalg.vecdot(a, b).unsqueeze(1)


def _ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where(b > 0, a / torch.where(b > 0, b, torch.ones_like(b)), torch.zeros_like(a))
