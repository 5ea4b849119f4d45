"""DSnoT: swap weights inside a group so that the row's mean error goes to zero; weights stay
original.

The mean error of row `r` is `ε_r = Σ_{pruned j} W_rj E[X_j]`. In every cycle a row regrows one
weight and prunes one of the same group, and both bring `ε_r` towards zero:

    grow  = argmax over pruned j of  sgn(ε_r) W_rj E[X_j] / Var[X_j]
    prune = argmin over kept j of the group with sgn(ε_r) W_rj E[X_j] < 0 of  |W_rj| ‖X_j‖

A row stops when `|ε_r|` is below the threshold or its sign flips; the swap that flips it is taken
only if `|ε_r|` gets smaller, so it never grows. Only groups that have both halves of a swap to
offer take part. It looks at first moments alone: where a layer has a bias, `bias` does the same
exactly and for free.

Zhang et al., Dynamic Sparse No Training, 2024, section 3; without its choices for unstructured
masks.
"""

from __future__ import annotations

import torch

from nmsparse_deploy.find.methods.base import LayerResult
from nmsparse_deploy.find.refine.base import PrunedLayer
from nmsparse_deploy.recipe import Dsnot


def balance(layer: PrunedLayer, cycles: int, threshold: float) -> torch.Tensor:
    """Return the mask `[R, n]` after at most `cycles` swaps per row. Needs `stats.total`."""
    group, stats, kept = layer.groups.group, layer.stats, layer.result.mask.clone()
    share = layer.dense.double() * stats.mean.double()
    square = stats.rms.double().square()
    # What the subtraction leaves of a constant column is rounding, and a variance of zero would
    # divide.
    variance = (square - stats.mean.double().square()).clamp(
        min=torch.finfo(torch.float32).eps * square
    )
    price = layer.dense.abs().double() * stats.rms.double()
    error = torch.where(kept, 0.0, share).sum(1)
    live, rows = error.abs() >= threshold, torch.arange(len(kept), device=kept.device)
    for _ in range(cycles):
        toward = share * error.sign().unsqueeze(1)
        leaving = kept & (toward < 0)
        paired = leaving.unflatten(1, (-1, group)).any(2).repeat_interleave(group, 1)
        gain, u = torch.where(~kept & (toward > 0) & paired, toward / variance, -torch.inf).max(1)
        within = u.div(group, rounding_mode="floor").unsqueeze(1) * group + torch.arange(
            group, device=kept.device
        )
        offered = torch.where(leaving, price, torch.inf).gather(1, within).argmin(1)
        p = within[rows, offered]
        after = error - share[rows, u] + share[rows, p]
        taken = live & (gain > -torch.inf) & (after.abs() < error.abs())
        if not taken.any():
            break
        kept[rows[taken], u[taken]], kept[rows[taken], p[taken]] = True, False
        live = taken & (after.sign() == error.sign()) & (after.abs() >= threshold)
        error = torch.where(taken, after, error)
    return kept


def refine(layer: PrunedLayer, step: Dsnot) -> LayerResult:
    """Swap weights inside groups until the mean errors of the rows are small."""
    return LayerResult(balance(layer, step.cycles, step.threshold))
