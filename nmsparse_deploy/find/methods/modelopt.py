"""NVIDIA ModelOpt as a mask backend: its magnitude and SparseGPT masks, found on the statistics of
this package.

Every weight is shown to ModelOpt as a linear layer of its own, with its groups along the columns;
so layers that it skips in a model (Conv1D, stacked experts) or groups in another order than
TensorRT (k x k convolutions) come out right. Its SparseGPT sums `XXᵀ` itself: it is shown the rows
of a square root of the Gram, which sum to the same. The updates of its sweep stay inside, so both
return masks for the original weights. Only 2:4.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import nn

from nmsparse_deploy.errors import CheckFailed, MissingExtra, NmsparseError
from nmsparse_deploy.find.calibration.layer_stats import LayerStats
from nmsparse_deploy.find.methods.base import LayerResult
from nmsparse_deploy.masks import project
from nmsparse_deploy.pattern import NMPattern


def magnitude(
    weight: torch.Tensor, stats: LayerStats, pattern: NMPattern, mask: torch.Tensor | None = None
) -> LayerResult:
    """Return ModelOpt's mask of `weight` `[R, n]` by magnitude. Raises `NmsparseError` unless 8
    divides R and 16 divides n."""
    return LayerResult(_found("sparse_magnitude", {}, weight, pattern))


def sparsegpt(
    weight: torch.Tensor, stats: LayerStats, pattern: NMPattern, mask: torch.Tensor | None = None
) -> LayerResult:
    """Return ModelOpt's mask of `weight` `[R, n]` by its SparseGPT sweep (damping 0.1). Needs
    `stats.gram`."""
    assert stats.gram is not None
    values, vectors = torch.linalg.eigh(stats.gram)
    root = (vectors * values.clamp_(min=0).sqrt_()).mT  # rootᵀ root = gram
    settings = {
        "forward_loop": lambda layer: layer(root),
        "verbose": False,
        "device": str(weight.device),
    }
    return LayerResult(_found("sparsegpt", settings, weight, pattern))


def _found(
    mode: str, settings: Mapping[str, Any], weight: torch.Tensor, pattern: NMPattern
) -> torch.Tensor:
    """Return the mask of a layer with `weight`, with exactly `keep` per group: ModelOpt prunes too
    many where weights are exactly zero."""
    try:
        with warnings.catch_warnings(action="ignore"):
            import modelopt.torch.sparsity as backend
    except ImportError as error:
        raise MissingExtra("nvidia-modelopt", "modelopt", "A mask by NVIDIA ModelOpt") from error
    outputs, width = weight.shape
    layer = nn.Linear(width, outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    with redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        backend.sparsify(layer, mode, dict(settings))
    kept = getattr(layer, "_weight_mask", None)  # ModelOpt turns the layer into a class of its own
    if kept is None or bool(kept.all()):
        raise NmsparseError(
            f"NVIDIA ModelOpt's {mode} does not prune a weight of shape {outputs} x {width}.",
            "leave the layer dense with --exclude, or take --method magnitude or sparsegpt-mask",
        )
    if bool((kept.unflatten(1, (-1, pattern.group)).sum(-1) > pattern.keep).any()):
        raise CheckFailed(f"NVIDIA ModelOpt's {mode} returned a mask that is not {pattern}.")
    size = weight.abs()
    return project(size / size.max().clamp(min=torch.finfo(size.dtype).tiny) + 2 * kept, pattern)
