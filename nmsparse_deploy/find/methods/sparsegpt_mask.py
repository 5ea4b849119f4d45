"""SparseGPT's mask on the original weights: the full sweep decides, its compensated weights are
thrown away.

Other toolkits return this under the name of SparseGPT. The mask was chosen for weights that
compensate, so it is no optimum for weights that do not; better than Wanda, far behind `sparsegpt`.
Good as a prior for mask learning.
"""

from __future__ import annotations

import torch

from nmsparse_deploy.find.calibration.layer_stats import LayerStats
from nmsparse_deploy.find.methods import sparsegpt
from nmsparse_deploy.find.methods.base import LayerResult
from nmsparse_deploy.pattern import Pattern


def prune_layer(
    weight: torch.Tensor, stats: LayerStats, pattern: Pattern, mask: torch.Tensor | None = None
) -> LayerResult:
    """Return the mask of `sparsegpt.prune_layer`, without its weights."""
    return LayerResult(sparsegpt.prune_layer(weight, stats, pattern, mask).mask)
