"""SparseGPT: one sweep over the columns that prunes group by group and lets the later columns compensate.

With `H = XXᵀ + λI`, `H⁻¹ = UᵀU` and `d_j = U_jj`, at the start of each group the `keep` largest `w²/d²` of the already
corrected weights stay in every row. A column then leaves its error `e = (w_j - q_j)/d_j` behind, which the columns to
its right absorb: `W[:, j:] -= e U[j, j:]`. The sum of `e²` is the final damped error. Updates beyond a block of columns
are applied as one matrix product ("lazy batch"); the block size does not change the result.

Frantar & Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, 2023, section 3.
"""

from __future__ import annotations

import torch

from ..calib.stats import LayerStats
from ..pattern import NMPattern, project
from .base import LayerResult, Method
from .hessian import inverse_factor

DAMPING = 0.01
COLUMNS = 128


def prune_layer(weight: torch.Tensor, stats: LayerStats, pattern: NMPattern, mask: torch.Tensor | None = None,
                damping: float = DAMPING, columns: int = COLUMNS) -> LayerResult:
    """Prune `weight` `[R, n]` to `pattern`, or compensate for a given `mask`. Needs `stats.gram`."""
    assert stats.gram is not None
    factor = inverse_factor(stats.gram, damping)
    dead = stats.gram.diagonal() == 0
    pruned, kept, _ = sweep(weight, factor, pattern, mask, columns, dead)
    return LayerResult(kept, pruned)


def sweep(weight: torch.Tensor, factor: torch.Tensor, pattern: NMPattern, mask: torch.Tensor | None = None,
          columns: int = COLUMNS, dead: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The column sweep along the inverse factor `U`. Returns weights, mask (both `[R, n]`) and the damped error.

    Columns marked `dead` carry no signal and are pruned first. Works on the transposed weight, so that a column is
    contiguous in memory.
    """
    group = pattern.group
    columns = max(group, columns // group * group)
    w = weight.T.contiguous().float().clone()
    n = w.shape[0]
    given = None if mask is None else mask.T.contiguous()
    kept = torch.empty(w.shape, dtype=torch.bool, device=w.device)
    scale = factor.diagonal().unsqueeze(1)
    loss = 0.0
    for start in range(0, n, columns):
        stop = min(start + columns, n)
        errors = torch.zeros((stop - start, w.shape[1]), device=w.device)
        for first in range(start, stop, group):
            here = slice(first, first + group)
            if given is None:
                scores = (w[here] / scale[here]).square_()
                if dead is not None:
                    scores[dead[here]] = -1.0
                kept[here] = project(scores, pattern, axis=0)
            else:
                kept[here] = given[here]
            _freeze_group(w[here], kept[here], errors[first - start : first - start + group], factor[here, here])
            w[first + group : stop].addmm_(factor[here, first + group : stop].T,
                                           errors[first - start : first - start + group], alpha=-1)
        w[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        loss += float(errors.square().sum(dtype=torch.float64))
    return w.T.contiguous(), kept.T.contiguous(), loss


def _freeze_group(w: torch.Tensor, kept: torch.Tensor, errors: torch.Tensor, factor: torch.Tensor) -> None:
    """Freeze the columns of one group left to right, in place; `w`, `kept`, `errors` are `[group, R]`."""
    for column in range(w.shape[0]):
        torch.div(w[column].masked_fill(kept[column], 0.0), factor[column, column], out=errors[column])
        w[column].masked_fill_(~kept[column], 0.0)
        if column + 1 < w.shape[0]:
            w[column + 1 :].addr_(factor[column, column + 1 :], errors[column], alpha=-1)


METHOD = Method(prune_layer, "gram", True, "sweep with weight compensation",
                "Frantar & Alistarh 2023, arXiv:2301.00774")
