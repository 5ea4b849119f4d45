"""Group descent: every group in turn takes the pattern that is best beside the rest of its row;
weights stay original.

Let `e = w ∘ (1 - m)` be what a row has lost, so that its error is `L = e G eᵀ`. For one group `g`
with everything else held, each pattern leaves

    L = e_g G_gg e_gᵀ + 2 e_g · c_g + what does not depend on the group,    c_g = Σ_{h ≠ g} e_h G_hg

All patterns are priced and the best is taken, for all rows at once. The error never rises, and a
row is done when a sweep over its groups changes nothing: then no other pattern of any single group
is better. Patterns with more than `ENUMERATED` candidates are improved by the best swaps inside the
group instead (see `swap.py`).

This is exact block-coordinate descent on the objective of Zimmer et al., SparseSwaps, 2025,
arXiv:2512.10922; `protect` is the remedy of Roux et al., SparseFW, 2025, arXiv:2510.13713, against
masks that fit the layer and not the model.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from math import comb

import torch

from nmsparse_deploy.find.methods.base import LayerResult
from nmsparse_deploy.find.methods.group_obs import ENUMERATED
from nmsparse_deploy.find.refine.base import PrunedLayer
from nmsparse_deploy.find.refine.swap import WORTH, best_swaps, precise, strongest
from nmsparse_deploy.pattern import BLOCK_SIZE, NMPattern
from nmsparse_deploy.recipe import GroupDescent

Choose = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    torch.Tensor,
]
"""`choose(w, c, kept, fixed, block, worth)`: a better mask `[R, group]` of one group, where it wins
more than `worth`.

`c` is `e G` with the group's own part in it; `fixed` weights stay.
"""


def descend(
    w: torch.Tensor,
    mask: torch.Tensor,
    fixed: torch.Tensor,
    gram: torch.Tensor,
    pattern: NMPattern,
    sweeps: int,
) -> torch.Tensor:
    """Return the mask `[R, n]` after at most `sweeps` sweeps over the groups of `w` `[R, n]`,
    starting from `mask`."""
    choose = (
        enumerating(pattern)
        if comb(pattern.group, pattern.keep) <= ENUMERATED
        else swapping(pattern)
    )
    kept, live = mask.clone(), torch.arange(len(w), device=w.device)
    lost = torch.where(mask, 0.0, w)
    worth = WORTH * ((lost @ gram) * lost).sum(1).clamp(min=0)
    for _ in range(sweeps):
        before = kept[live]
        after = _sweep(w[live], before, fixed[live], gram, pattern.group, choose, worth[live])
        kept[live] = after
        live = live[(after != before).any(1)]
        if not len(live):
            break
    return kept


def _sweep(
    w: torch.Tensor,
    kept: torch.Tensor,
    fixed: torch.Tensor,
    gram: torch.Tensor,
    group: int,
    choose: Choose,
    worth: torch.Tensor,
) -> torch.Tensor:
    """Sweep once; `c` is made anew for every block of columns, so errors of rounding do not add
    up."""
    kept, block_size = kept.clone(), max(group, BLOCK_SIZE // group * group)
    for start in range(0, w.shape[1], block_size):
        block = slice(start, start + block_size)
        c = torch.where(kept, 0.0, w) @ gram[:, block]
        for first in range(start, min(start + block_size, w.shape[1]), group):
            here, local = slice(first, first + group), slice(first - start, first - start + group)
            chosen = choose(
                w[:, here], c[:, local], kept[:, here], fixed[:, here], gram[here, here], worth
            )
            moved = w[:, here] * (kept[:, here].to(w.dtype) - chosen.to(w.dtype))
            c.addmm_(moved, gram[here, block])
            kept[:, here] = chosen
    return kept


def enumerating(pattern: NMPattern) -> Choose:
    """Price every pattern of the group in every row (the first of equals, and the present one
    before all)."""
    removed = torch.tensor(list(combinations(range(pattern.group), pattern.zeros)))
    pruned = torch.zeros(len(removed), pattern.group, dtype=torch.bool).scatter_(
        1, removed, True
    )  # [patterns, group]

    def choose(
        w: torch.Tensor,
        c: torch.Tensor,
        kept: torch.Tensor,
        fixed: torch.Tensor,
        block: torch.Tensor,
        worth: torch.Tensor,
    ) -> torch.Tensor:
        out = pruned.to(w.device)
        z = out.to(w.dtype)
        pairs = (z.unsqueeze(2) * z.unsqueeze(1)).flatten(1)
        lost = torch.where(kept, 0.0, w)
        own = lost @ block
        rest = c - own
        costs = (w.unsqueeze(2) * block * w.unsqueeze(1)).flatten(1) @ pairs.T + 2 * (
            w * rest
        ) @ z.T
        costs.masked_fill_(fixed.to(w.dtype) @ z.T > 0, torch.inf)
        best, number = costs.min(1)
        better = (lost * (own + 2 * rest)).sum(1) - best > worth
        return torch.where(better.unsqueeze(1), ~out[number], kept)

    return choose


def swapping(pattern: NMPattern) -> Choose:
    """Make the best swaps of the group, one after the other."""

    def choose(
        w: torch.Tensor,
        c: torch.Tensor,
        kept: torch.Tensor,
        fixed: torch.Tensor,
        block: torch.Tensor,
        worth: torch.Tensor,
    ) -> torch.Tensor:
        return best_swaps(
            w, c, kept, fixed, block, pattern.group, min(pattern.keep, pattern.zeros), worth
        )

    return choose


def refine(layer: PrunedLayer, step: GroupDescent) -> LayerResult:
    """Improve the mask group by group, from its present state."""
    w, gram = precise(layer)
    fixed = strongest(layer, step.protect)
    return LayerResult(descend(w, layer.result.mask, fixed, gram, layer.groups, step.sweeps))
