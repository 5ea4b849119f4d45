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
    residual = torch.where(mask, wanted - x @ hessian, 0.0)
    direction, norm = residual.clone(), residual.square().sum(1, keepdim=True)
    # Below the rounding of the right-hand side a step only amplifies noise, and its ratios
    # underflow.
    solved = torch.finfo(x.dtype).eps ** 2 * torch.where(mask, wanted, 0.0).square().sum(
        1, keepdim=True
    )
    for _ in range(steps):
        moved = torch.where(mask, direction @ hessian, 0.0)
        length = torch.where(
            norm > solved, _ratio(norm, (direction * moved).sum(1, keepdim=True)), 0.0
        )
        x = x + length * direction
        residual = residual - length * moved
        before, norm = norm, residual.square().sum(1, keepdim=True)
        direction = residual + _ratio(norm, before) * direction
    return x


def _ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where(b > 0, a / torch.where(b > 0, b, torch.ones_like(b)), torch.zeros_like(a))
