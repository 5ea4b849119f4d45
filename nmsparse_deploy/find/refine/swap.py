"""Swap: exchange a kept and a pruned weight of one group, the best pair of every row at a time;
weights stay original.

Let `e = w ∘ (1 - m)` be what a row has lost and `c = e G`. Pruning the kept `p` for the pruned `u`
changes the row's error `L = e G eᵀ` by

    ΔL = w_p² G_pp + 2 w_p c_p  +  w_u² G_uu - 2 w_u c_u  -  2 w_p w_u G_pu

and moves `c` by two rows of `G`. A row is done when no pair of any of its groups lowers `L`. A
layer's error is not the model's: `protect` holds the kept weights with the highest `|w| ‖X‖` of
every row in place.

Zimmer et al., SparseSwaps, 2025, arXiv:2512.10922; the protected weights are those of Roux et al.,
SparseFW, 2025, arXiv:2510.13713, which holds nine tenths.
"""

from __future__ import annotations

import torch

from nmsparse_deploy.find.methods.base import LayerResult
from nmsparse_deploy.find.methods.hessian import FP64_WIDTH
from nmsparse_deploy.find.refine.base import PrunedLayer
from nmsparse_deploy.recipe import Swap

CELLS = 1 << 18
"""Pairs priced at once: few enough that they stay in a processor's cache."""

WORTH = 1e-6
"""A change must win this share of the row's error at the start; less is nothing, or rounding."""


def change(
    w: torch.Tensor, c: torch.Tensor, kept: torch.Tensor, free: torch.Tensor, blocks: torch.Tensor
) -> torch.Tensor:
    """Return `ΔL` of every pair `[..., p, u]` of every group; infinite unless `p` may leave
    (`free`) and `u` is pruned.

    The others are `[..., group]`, `blocks` the groups' own parts of `G`, `[..., group, group]`.
    """
    own = w.square() * blocks.diagonal(dim1=-2, dim2=-1)
    leave = (own + 2 * w * c).masked_fill(~free, torch.inf)
    come = (own - 2 * w * c).masked_fill(kept, torch.inf)
    return (leave.unsqueeze(-1) + come.unsqueeze(-2)).addcmul_(
        w.unsqueeze(-1) * blocks, w.unsqueeze(-2), value=-2
    )


def best_swaps(
    w: torch.Tensor,
    c: torch.Tensor,
    kept: torch.Tensor,
    fixed: torch.Tensor,
    gram: torch.Tensor,
    group: int,
    steps: int,
    worth: torch.Tensor,
) -> torch.Tensor:
    """Return the mask `[R, n]` after at most `steps` swaps per row, each of which wins more than
    the row's `worth` `[R]`."""
    blocks = (
        gram.unflatten(0, (-1, group))
        .unflatten(2, (-1, group))
        .diagonal(dim1=0, dim2=2)
        .movedim(-1, 0)
    )
    kept, live = kept.clone(), torch.arange(len(w), device=w.device)

    def groups(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (-1, group))

    for _ in range(steps):
        now = kept[live]
        pairs = change(groups(w[live]), groups(c), groups(now), groups(now & ~fixed[live]), blocks)
        won, place = pairs.flatten(1).min(1)
        better = won < -worth[live]
        live, place, c = live[better], place[better], c[better]
        if not len(live):
            break
        start = place // group**2 * group
        p, u = start + place % group**2 // group, start + place % group
        c = c + w[live, p].unsqueeze(1) * gram[p] - w[live, u].unsqueeze(1) * gram[u]
        kept[live, p], kept[live, u] = False, True
    return kept


def strongest(layer: PrunedLayer, share: float) -> torch.Tensor:
    """Return the `share` of every row's kept weights with the highest `|w| ‖X‖`, as a bool mask
    `[R, n]`."""
    kept = layer.result.mask
    count = round(share * int(kept[0].sum()))
    scores = torch.where(kept, layer.dense.abs() * layer.stats.rms, -1.0)
    first = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(kept).scatter_(1, first, True)


def precise(layer: PrunedLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and Gram in fp64 where that is cheap: gains are differences of large
    numbers."""
    assert layer.stats.gram is not None
    dtype = torch.float64 if layer.dense.shape[1] <= FP64_WIDTH else torch.float32
    return layer.dense.to(dtype), layer.stats.gram.to(dtype)


def refine(layer: PrunedLayer, step: Swap) -> LayerResult:
    """Swap kept and pruned weights of a layer while a row's error falls."""
    w, gram = precise(layer)
    fixed = strongest(layer, step.protect)
    masks = []
    for rows in torch.arange(len(w), device=w.device).split(
        max(1, CELLS // (w.shape[1] * layer.groups.group))
    ):
        kept = layer.result.mask[rows]
        lost = torch.where(kept, 0.0, w[rows])
        c = lost @ gram
        worth = WORTH * (lost * c).sum(1).clamp(min=0)
        masks.append(
            best_swaps(w[rows], c, kept, fixed[rows], gram, layer.groups.group, step.steps, worth)
        )
    return LayerResult(torch.cat(masks))
