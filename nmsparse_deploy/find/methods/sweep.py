"""The column sweep that SparseGPT introduced, with the treatment of one group left to the method.

With `H⁻¹ = UᵀU`, what the columns left of `j` have frozen is accounted for by `U[j:, j:]` alone. A
method freezes the columns of a group and leaves errors `E` behind; the columns to its right absorb
them: `W[:, j:] -= E U[j:j+group, j:]`. The sum of `E²` is the final error under `H`. Updates beyond
a block of columns are applied as one matrix product ("lazy batch"); its length does not change the
result. An unstructured mask has no groups: there the method is given whole blocks, all rows of one
compete, and the length counts. Frantar & Alistarh 2023, section 3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nmsparse_deploy.find.methods.grid import Grid
from nmsparse_deploy.masks import project
from nmsparse_deploy.pattern import BLOCK_SIZE, NMPattern, Pattern

Freeze = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""`freeze(w, factor, errors, given)` works on one group, `[group, R]`, with `factor` the group's
block of `U`.

It chooses what to keep (or takes `given`), writes the frozen weights into `w` and the errors into
`errors`, and returns the bool mask.
"""


def sweep(
    weight: torch.Tensor,
    factor: torch.Tensor,
    pattern: Pattern,
    freeze: Freeze,
    mask: torch.Tensor | None = None,
    block_size: int = BLOCK_SIZE,
    prices: torch.Tensor | None = None,
    grid: Grid | None = None,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Sweep `weight` `[R, n]` along the inverse factor `U` `[n, n]`; returns weights, mask and the
    damped error.

    The mask is `mask`; or, with `prices` `[n]`, in each group the largest of the present
    `w² · price`; else the choice of `freeze`. With a `grid`, kept weights are rounded to it group
    by group, and what that costs is compensated too. Works on the transposed weight, so that a
    column is contiguous in memory.
    """
    group = pattern.group if isinstance(pattern, NMPattern) else block_size
    block_size = max(group, block_size // group * group)
    w = weight.T.contiguous().float().clone()
    n = w.shape[0]
    given = None if mask is None else mask.T.contiguous()
    kept = torch.empty(w.shape, dtype=torch.bool, device=w.device)
    loss = 0.0
    for start in range(0, n, block_size):
        stop = min(start + block_size, n)
        errors = torch.zeros((stop - start, w.shape[1]), device=w.device)
        for first in range(start, stop, group):
            here = slice(first, first + group)
            group_errors = errors[first - start : first - start + group]
            chosen = None if given is None else given[here]
            if chosen is None and prices is not None:
                chosen = project(w[here].square().mul_(prices[here].unsqueeze(1)), pattern, axis=0)
            kept[here] = freeze(w[here], factor[here, here], group_errors, chosen)
            if grid is not None:
                grid.freeze(first, w[here], factor[here, here], group_errors, kept[here])
            w[first + group : stop].addmm_(
                factor[here, first + group : stop].T, group_errors, alpha=-1
            )
        w[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        loss += float(errors.square().sum(dtype=torch.float64))
    return w.T.contiguous(), kept.T.contiguous(), loss
