"""SparseGPT's score without its sweep: keep the largest `w²/d²` of the original weights, change
nothing.

This is what some mask-learning codes call "SparseGPT without update". The price `1/d_j²` assumes
that later columns will compensate, and here none does; expect no more than Wanda gives. Use it as a
prior for mask learning. Score of Frantar & Alistarh 2023, section 3.2, with `d` as in `sparsegpt`.
"""

from __future__ import annotations

import torch

from nmsparse_deploy.find.calibration.layer_stats import LayerStats
from nmsparse_deploy.find.methods.hessian import inverse_factor
from nmsparse_deploy.find.methods.sparsegpt import DAMPING


def scores(weight: torch.Tensor, stats: LayerStats) -> torch.Tensor:
    """Return `w²/d²`, `[R, n]`. Needs `stats.gram`."""
    assert stats.gram is not None
    return (weight / inverse_factor(stats.gram, DAMPING).diagonal()).square()
