"""Statistics of experts: each from the tokens that were routed to it, in the pruned stream.

An expert that fewer than `MIN_TOKENS` calibration tokens reach is pruned by magnitude: its
statistics are white (unit second moments, no correlation), under which every criterion ranks by the
weight alone and no weight is compensated. The dense and the pruned model route differently, so
there is no pairing of tokens: the dense stream is not used.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from nmsparse_deploy.find.calibration.layer_stats import LayerStats, Need, StatsAccumulator
from nmsparse_deploy.models.base import Target

MIN_TOKENS = 16


class ExpertAccumulator:
    """Sums per expert of a stack, or for one matrix that only some tokens reach."""

    def __init__(
        self, need: Need, target: Target, device: torch.device, twin: bool = False
    ) -> None:
        self._need, self._target, self._device, self._twin = need, target, device, twin
        self._sums = [StatsAccumulator(need) for _ in range(target.experts)]

    def update(
        self,
        layer: nn.Module,
        x: torch.Tensor,
        dense: torch.Tensor | None = None,
        drift: torch.Tensor | None = None,
        wanted: torch.Tensor | None = None,
        expert: int = 0,
    ) -> None:
        if x.numel():
            self._sums[expert].update(layer, x)

    def parts(self) -> list[StatsAccumulator]:
        """Return the accumulators of the experts."""
        return self._sums

    def finish(self) -> LayerStats:
        """Return the statistics of one matrix, or of a stack with those of its matrices in
        `experts`.

        Raises `NmsparseError` when the model's activations have overflowed.
        """
        experts = [self._finished(total) for total in self._sums]
        if self._target.experts == 1:
            return experts[0]
        return LayerStats(
            sum(stats.tokens for stats in experts), torch.zeros(0), experts=tuple(experts)
        )

    def _finished(self, total: StatsAccumulator) -> LayerStats:
        stats = total.finish()
        if total.tokens < MIN_TOKENS:
            stats = white(self._target.k, total.tokens, self._need, self._device)
        return replace(stats, cross=stats.gram) if self._twin else stats


def accumulator(
    need: Need, target: Target, device: torch.device, twin: bool = False
) -> StatsAccumulator | ExpertAccumulator:
    """Make the accumulator that suits a target: per expert where tokens are routed."""
    return (
        ExpertAccumulator(need, target, device, twin) if target.routed else StatsAccumulator(need)
    )


def white(width: int, tokens: int, need: Need, device: torch.device) -> LayerStats:
    """Make statistics that say nothing about any channel; `tokens` is how many there were."""
    gram = torch.eye(width, device=device) if need == "gram" else None
    ones = torch.ones(width, device=device)
    return LayerStats(tokens, ones, gram, total=torch.zeros_like(ones), white=True)
