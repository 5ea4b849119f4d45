"""RIA, relative importance and activations: a weight counts by its share of its row and of its
column.

    RI_ij = (|W_ij| / Σ_i |W_ij| + |W_ij| / Σ_j |W_ij|) · ‖X_j‖^a,   a = 1/2

The shares keep whole channels from being emptied; the root tempers channels of huge activations.
The norm is the root mean square: a constant factor changes no order. Rows and columns of zeros
score zero (the released code divides by zero there). The paper's channel permutation is a step of
its own and not part of this score.

Zhang et al., Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models,
2024.
"""

from __future__ import annotations

import torch

from nmsparse_deploy.find.calibration.layer_stats import LayerStats

POWER = 0.5


def scores(weight: torch.Tensor, stats: LayerStats) -> torch.Tensor:
    """Return `RI`, `[R, n]`. Needs the norms."""
    size = weight.abs()
    tiny = torch.finfo(size.dtype).tiny
    shares = size / size.sum(0).clamp(min=tiny) + size / size.sum(1, keepdim=True).clamp(min=tiny)
    return shares * stats.rms**POWER
