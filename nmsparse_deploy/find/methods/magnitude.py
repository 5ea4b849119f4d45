"""Magnitude pruning: keep the largest `|W|` of every group. Needs no data; the floor every other
method must beat.

Han et al., Learning both Weights and Connections for Efficient Neural Networks, 2015; Mishra et
al., Accelerating Sparse Deep Neural Networks, 2021 (the 2:4 form). Unstructured, all weights of the
matrix compete.
"""

from __future__ import annotations

import torch

from nmsparse_deploy.find.calibration.layer_stats import LayerStats


def scores(weight: torch.Tensor, stats: LayerStats) -> torch.Tensor:
    """Return `|W|`, `[R, n]`."""
    return weight.abs()
