"""ISC, the improved saliency criterion of MixGPT, inside SparseGPT's sweep.

    ISC_ij = w_ij² (H_jj + 1/[H⁻¹]_jj)

is the sum of two answers to "what does removing this weight cost": `w² H_jj` when nothing
compensates (OBD) and `w²/[H⁻¹]_jj` when everything does (OBS). In the sweep `w` is the weight as
corrected so far and the inverse that of the columns not yet frozen, so `[H⁻¹]_jj = d_j²` with the
factor's diagonal `d`. `H_jj` is taken from the same damped `H`: both terms are then prices under
one quadratic, `H_jj >= 1/d_j²` with equality where nothing correlates, and a common factor on the
activations changes no mask. Weights are compensated as in `sparsegpt`.

Shao et al., One-Shot Sensitivity-Aware Mixed Sparsity Pruning for Large Language Models, 2023. The
paper uses it for unstructured sparsity; its allocation of sparsity over layers has no counterpart
where keep:group is fixed.
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
    prices = (
        dampen(stats.gram, damping).diagonal().float() + factor.diagonal().square().reciprocal()
    )
    pruned, kept, _ = sweep(
        weight, factor, pattern, freezer(pattern), mask, block_size, prices, grid
    )
    return LayerResult(kept, pruned, grid)
