"""Group-OBS with the groups taken in the order of the damage that they are expected to do, the
worst first.

A group that is pruned early leaves its error to all the columns still to come, the last one to
none. A group's damage is what pruning takes from the layer's output before anything is compensated:
over all rows the sum of `w² G_jj` of the weights that this price (Wanda's, squared) would prune.
Groups stay whole, so the pattern does not notice the order.

After the order of columns in the code of Frantar et al., GPTQ, 2023 (there by `G_jj` alone).
"""

from __future__ import annotations

import torch

from nmsparse_deploy.find.calibration.layer_stats import LayerStats
from nmsparse_deploy.find.methods import group_obs
from nmsparse_deploy.find.methods.base import LayerResult
from nmsparse_deploy.masks import project
from nmsparse_deploy.pattern import NMPattern


def prune_layer(
    weight: torch.Tensor, stats: LayerStats, pattern: NMPattern, mask: torch.Tensor | None = None
) -> LayerResult:
    """Prune `weight` `[R, n]` to `pattern`, or do so with a given `mask`. Needs `stats.gram`."""
    assert stats.gram is not None
    order = by_damage(weight, stats.gram.diagonal(), pattern)
    result = group_obs.prune_layer(
        weight[:, order], stats.reordered(order), pattern, None if mask is None else mask[:, order]
    )
    assert result.weight is not None
    back = order.argsort()
    return LayerResult(result.mask[:, back], result.weight[:, back])


def by_damage(weight: torch.Tensor, energy: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    """Order the columns group by group, the groups by falling damage; `energy` `[n]` is that of the
    inputs."""
    prices = weight.square() * energy
    lost = prices.masked_fill(project(prices, pattern), 0.0).sum(0)
    groups = lost.view(-1, pattern.group).sum(1).argsort(descending=True, stable=True)
    return (
        groups.unsqueeze(1) * pattern.group + torch.arange(pattern.group, device=groups.device)
    ).flatten()
