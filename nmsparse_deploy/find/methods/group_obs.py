"""Group-OBS: the SparseGPT sweep with an exact choice and an exact update inside every group.

At the start of a group let `A = U_gᵀ U_g`, with `U_g` the group's block of the inverse factor: the
inverse Hessian of everything not yet frozen, restricted to the group. Removing the set `P` of a
row's group costs exactly

    cost_P = w_P (A_PP)⁻¹ w_Pᵀ,    λ_P = w_P (A_PP)⁻¹,    E = λ U_gᵀ   (λ zero outside P)

The cheapest pattern of every row is taken; its kept weights take part in the compensation, and
pairs of correlated weights are priced as pairs. The sum of the costs is the final damped error, as
in the sweep. Patterns with more than `ENUMERATED` candidates per group are chosen by SparseGPT's
score and still updated exactly.

The idea of pricing a block jointly is that of Kurtic et al., The Optimal BERT Surgeon, 2022,
section 3.2; here it is done inside the sweep of Frantar & Alistarh 2023.
"""

from __future__ import annotations

from itertools import combinations
from math import comb

import torch

from nmsparse_deploy.find.calibration.layer_stats import LayerStats
from nmsparse_deploy.find.methods.base import LayerResult
from nmsparse_deploy.find.methods.grid import Grid
from nmsparse_deploy.find.methods.hessian import inverse_factor
from nmsparse_deploy.find.methods.sweep import Freeze, sweep
from nmsparse_deploy.masks import project
from nmsparse_deploy.pattern import BLOCK_SIZE, NMPattern

DAMPING = 0.01
ENUMERATED = 70
"""All patterns of 2:4 (6) and of 4:8 (70)."""


def prune_layer(
    weight: torch.Tensor,
    stats: LayerStats,
    pattern: NMPattern,
    mask: torch.Tensor | None = None,
    damping: float = DAMPING,
    block_size: int = BLOCK_SIZE,
    grid: Grid | None = None,
) -> LayerResult:
    """Prune `weight` `[R, n]` to `pattern` and round it to `grid`, or do so with a given `mask`.
    Needs `stats.gram`."""
    assert stats.gram is not None
    factor = inverse_factor(stats.gram, damping)
    few = mask is None and comb(pattern.group, pattern.keep) <= ENUMERATED
    freeze = enumerating(pattern) if few else solving(pattern)
    pruned, kept, _ = sweep(weight, factor, pattern, freeze, mask, block_size, grid=grid)
    return LayerResult(kept, pruned, grid)


def enumerating(pattern: NMPattern) -> Freeze:
    """Price every pattern of the group in every row, and take the cheapest (the first of
    equals)."""
    removed = torch.tensor(
        list(combinations(range(pattern.group), pattern.zeros))
    )  # [patterns, zeros]
    pruned = torch.zeros(len(removed), pattern.group, dtype=torch.bool).scatter_(1, removed, True)
    number = torch.arange(len(removed)).view(-1, 1, 1)

    def freeze(
        w: torch.Tensor, factor: torch.Tensor, errors: torch.Tensor, given: torch.Tensor | None
    ) -> torch.Tensor:
        inverse = (factor.T @ factor).double()
        block = torch.linalg.inv(
            inverse[removed.unsqueeze(2), removed.unsqueeze(1)]
        )  # (A_PP)⁻¹ of every pattern
        padded = torch.zeros(len(removed), *inverse.shape, dtype=torch.float64, device=w.device)
        padded[number, removed.unsqueeze(2), removed.unsqueeze(1)] = block
        multipliers = padded.to(w.dtype) @ w  # λ of every pattern, [patterns, group, R]
        costs = (multipliers * w).sum(1)
        best = costs.argmin(0)
        chosen = multipliers.gather(0, best.expand(1, *w.shape)).squeeze(0)
        return _apply(w, factor, errors, ~pruned.to(w.device)[best].T, chosen)

    return freeze


def solving(pattern: NMPattern) -> Freeze:
    """Take a given mask, or SparseGPT's choice: one small system per row."""

    def freeze(
        w: torch.Tensor, factor: torch.Tensor, errors: torch.Tensor, given: torch.Tensor | None
    ) -> torch.Tensor:
        prices = (w / factor.diagonal().unsqueeze(1)).square_()
        kept = project(prices, pattern, axis=0) if given is None else given
        out = (~kept).T.double()  # [R, group], 1 = removed
        inverse = (factor.T @ factor).double()
        systems = inverse * out.unsqueeze(1) * out.unsqueeze(2) + torch.diag_embed(1 - out)
        multipliers = (
            torch.linalg.solve(systems, (w.T.double() * out).unsqueeze(2)).squeeze(2).to(w.dtype)
        )
        return _apply(w, factor, errors, kept, multipliers.T)

    return freeze


def _apply(
    w: torch.Tensor,
    factor: torch.Tensor,
    errors: torch.Tensor,
    kept: torch.Tensor,
    multipliers: torch.Tensor,
) -> torch.Tensor:
    """Write `E = λ U_gᵀ` and the compensated weights of the group, zeros exactly zero."""
    torch.mm(factor, multipliers, out=errors)
    w.addmm_(factor.T, errors, alpha=-1).masked_fill_(~kept, 0.0)
    return kept
