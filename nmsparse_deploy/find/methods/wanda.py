"""Wanda: keep the largest `|W_ij| · ‖X_j‖` of every group.

With the Gram matrix replaced by its diagonal this minimises the layer's output error over masks
exactly. Weights are not changed. Sun et al., A Simple and Effective Pruning Approach for Large
Language Models, 2024, section 3.
"""

from __future__ import annotations

import torch

from nmsparse_deploy.find.calibration.layer_stats import LayerStats


def scores(weight: torch.Tensor, stats: LayerStats) -> torch.Tensor:
    """Return `|W_ij| · ‖X_j‖`, `[R, n]`, with the root mean square for the norm. Needs the
    norms."""
    return weight.abs() * stats.rms
