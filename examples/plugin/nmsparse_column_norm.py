"""Magnitude relative to the column: a weight counts by its share of all weights that read the same
input.

    s_ij = |W_ij| / ‖W_:j‖₂

The module is imported to validate a recipe that names the method, so it imports no torch by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nmsparse_deploy.registry import MethodEntry

if TYPE_CHECKING:
    import torch

    from nmsparse_deploy.find.calibration.layer_stats import LayerStats

COLUMN_NORM = MethodEntry(
    code="nmsparse_column_norm:scores",
    needs="none",
    updates_weights=False,
    ranks=True,
    scope="row",
    summary="weights relative to the norm of their column",
    source="the plug-in of examples/plugin",
)


def scores(weight: torch.Tensor, stats: LayerStats) -> torch.Tensor:
    """Return `s`, `[outputs, inputs]`; the highest scores of every group stay."""
    return weight.abs() / weight.norm(dim=0).clamp(min=1e-12)
