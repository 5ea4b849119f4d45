"""Two-dimensional magnitude: the mask follows keep:group along rows and along columns, so its
transpose does too.

Every tile of `group x group` keeps exactly `keep` in each row and each column, with the largest sum
of `|W|`:

    max Σ_ij M_ij |W_ij|   over 0/1 matrices M with row and column sums `keep`

Where few such matrices exist (90 for 2:4) all are tried, and the best is exact. Otherwise pairs of
rows are dealt anew until none gains: what only one of the two keeps is shared out in the best way,
which leaves the sums of rows and columns as they were. Both directions are then still exact, and
the total is a local optimum.

Rows beyond the last whole tile (an output count that is not a multiple of `group`) follow the
pattern along the row only. A transposed mask pays when the backward pass is to be sparse too; for
inference alone `magnitude` keeps more.

NVIDIA apex, `m4n2_2d_best`; Hubara et al., Accelerated Sparse Neural Training: A Provable and
Efficient Method to Find N:M Transposable Masks, 2021, where the problem for any keep:group is
stated as a flow.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations, product
from math import comb

import torch

from nmsparse_deploy.find.calibration.layer_stats import LayerStats
from nmsparse_deploy.find.methods.base import LayerResult
from nmsparse_deploy.masks import project
from nmsparse_deploy.pattern import NMPattern

ENUMERATED = 2000
"""Try all tiles when there are no more row-wise candidates than this."""
CHUNK = 1 << 16
"""Tiles priced at a time."""
ROUNDS = 20


def prune_layer(
    weight: torch.Tensor, stats: LayerStats, pattern: NMPattern, mask: torch.Tensor | None = None
) -> LayerResult:
    """Return the two-dimensional mask of `weight` `[R, n]`; needs no data."""
    group, scores = pattern.group, weight.abs()
    whole = len(scores) // group * group
    tiles = (
        scores[:whole].unflatten(1, (-1, group)).unflatten(0, (-1, group)).transpose(1, 2)
    )  # [R/g, n/g, g, g]
    kept = torch.empty(tiles.shape, dtype=torch.bool, device=weight.device)
    for few, out in zip(tiles.flatten(0, 1).split(CHUNK), kept.flatten(0, 1).split(CHUNK)):
        out.copy_(transposable(few, pattern))
    square = kept.transpose(1, 2).flatten(2).flatten(0, 1)
    return LayerResult(torch.cat((square, project(scores[whole:], pattern))))


def transposable(scores: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    """Return, for tiles `[count, group, group]` of scores, masks with `keep` in each row and
    column."""
    if comb(pattern.group, pattern.keep) ** pattern.group > ENUMERATED:
        return exchanged(scores, pattern)
    shapes = all_tiles(pattern).to(scores.device)
    return shapes[(scores.flatten(1) @ shapes.flatten(1).T.to(scores.dtype)).argmax(1)]


@cache
def all_tiles(pattern: NMPattern) -> torch.Tensor:
    """Return every 0/1 tile with row and column sums `keep`, `[count, group, group]`."""
    rows = [
        [i in kept for i in range(pattern.group)]
        for kept in combinations(range(pattern.group), pattern.keep)
    ]
    candidates = torch.tensor(list(product(rows, repeat=pattern.group)))
    return candidates[(candidates.sum(1) == pattern.keep).all(1)]


def exchanged(scores: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    """Exchange between pairs of rows, from a band around the diagonal to a local optimum."""
    line = torch.arange(pattern.group, device=scores.device)
    band = (line - line.unsqueeze(1)) % pattern.group < pattern.keep
    kept = band.expand(scores.shape).clone()
    pairs = list(combinations(range(pattern.group), 2))
    for _ in range(ROUNDS):
        before = kept.clone()
        for i, j in pairs:
            kept[:, i], kept[:, j] = _deal(kept[:, i], kept[:, j], scores[:, i] - scores[:, j])
        if torch.equal(before, kept):
            break
    return kept


def _deal(
    first: torch.Tensor, second: torch.Tensor, gain: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Share out what only one of two rows keeps: the places that gain most go to the first, as many
    as it had."""
    both, single = first & second, first ^ second
    ranks = (
        gain.masked_fill(~single, -torch.inf)
        .argsort(dim=1, descending=True, stable=True)
        .argsort(1)
    )
    share = single & (ranks < (first & single).sum(1, keepdim=True))
    return both | share, both | (single & ~share)
