"""SparseGPT: a sweep over the columns that prunes group by group and lets the later columns
compensate.

With `H = XXᵀ + λI`, `H⁻¹ = UᵀU` and `d_j = U_jj`, at the start of each group the `keep` largest
`w²/d²` of the already corrected weights stay in every row. Then column by column the error
`e = (w_j - q_j)/d_j` is left behind, also to the columns of the same group:
`W[:, j:] -= e U[j, j:]`. Unstructured, the group is a block of 128 columns, and one threshold over
all its rows decides.

Frantar & Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, 2023,
section 3.
"""

from __future__ import annotations

import torch

from nmsparse_deploy.find.calibration.layer_stats import LayerStats
from nmsparse_deploy.find.methods.base import LayerResult
from nmsparse_deploy.find.methods.grid import Grid
from nmsparse_deploy.find.methods.hessian import inverse_factor
from nmsparse_deploy.find.methods.sweep import Freeze, sweep
from nmsparse_deploy.masks import project
from nmsparse_deploy.pattern import BLOCK_SIZE, Pattern

DAMPING = 0.01


def prune_layer(
    weight: torch.Tensor,
    stats: LayerStats,
    pattern: Pattern,
    mask: torch.Tensor | None = None,
    damping: float = DAMPING,
    block_size: int = BLOCK_SIZE,
    grid: Grid | None = None,
) -> LayerResult:
    """Prune `weight` `[R, n]` to `pattern` and round it to `grid`, or do so with a given `mask`.
    Needs `stats.gram`."""
    assert stats.gram is not None
    factor = inverse_factor(stats.gram, damping)
    pruned, kept, _ = sweep(weight, factor, pattern, freezer(pattern), mask, block_size, grid=grid)
    return LayerResult(kept, pruned, grid)


def freezer(pattern: Pattern) -> Freeze:
    """Choose once at the start of the group, then freeze its columns left to right."""

    def freeze(
        w: torch.Tensor, factor: torch.Tensor, errors: torch.Tensor, given: torch.Tensor | None
    ) -> torch.Tensor:
        prices = (w / factor.diagonal().unsqueeze(1)).square_()
        kept = project(prices, pattern, axis=0) if given is None else given
        for column in range(w.shape[0]):
            torch.div(
                w[column].masked_fill(kept[column], 0.0), factor[column, column], out=errors[column]
            )
            w[column].masked_fill_(~kept[column], 0.0)
            if column + 1 < w.shape[0]:
                w[column + 1 :].addr_(factor[column, column + 1 :], errors[column], alpha=-1)
        return kept

    return freeze
