"""ISC as MixGPT's released code computes it: `w² (H_jj + 1/U_jj)` where the paper has
`1/[H⁻¹]_jj = 1/U_jj²`.

The two terms have different units: scale the activations by `c` and one grows by `c²`, the other by
`c`, so the mask depends on the scale of the activations. Here to reproduce and to compare; `isc` is
the criterion as published.

`H` is damped and scaled as in that code, `(2/N) XXᵀ` over `N` calibration sequences, of `LENGTH`
tokens there. The code has the criterion in its unstructured branch only; the sweep around it is
that of `isc`.
"""

from __future__ import annotations

import torch

from nmsparse_deploy.find.calibration.layer_stats import LayerStats
from nmsparse_deploy.find.methods.base import LayerResult
from nmsparse_deploy.find.methods.grid import Grid
from nmsparse_deploy.find.methods.hessian import dampen, inverse_factor
from nmsparse_deploy.find.methods.sparsegpt import DAMPING, freezer
from nmsparse_deploy.find.methods.sweep import sweep
from nmsparse_deploy.pattern import BLOCK_SIZE, Pattern

LENGTH = 2048


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
    gram = stats.gram * (2 * LENGTH / max(stats.tokens, 1))
    factor = inverse_factor(gram, damping)
    prices = dampen(gram, damping).diagonal().float() + factor.diagonal().reciprocal()
    pruned, kept, _ = sweep(
        weight, factor, pattern, freezer(pattern), mask, block_size, prices, grid
    )
    return LayerResult(kept, pruned, grid)
