"""MixGPT's unstructured sparsity of every matrix from its sensitivity.

Sorted by rising sensitivity, the i-th of n matrices keeps the share

    density_i = L + i (R - L) / (n - 1),   L = 1 - p - α,   R = 2 (1 - p) - L,   i = 0 .. n - 1

of its weights, so the least sensitive keeps `1 - p - α` and the most sensitive `1 - p + α`. The
unweighted mean is exactly `1 - p`. The share of zeros among all weights is not `p` unless the
matrices are of one size or size and sensitivity have nothing to do with each other: with large
sensitive matrices the model ends up denser. Shao et al., One-Shot Sensitivity-Aware Mixed Sparsity
Pruning for Large Language Models, 2024, arXiv:2310.09499.
"""

from __future__ import annotations

from collections.abc import Sequence

from nmsparse_deploy.errors import UsageError


def mixed_ratios(sensitivities: Sequence[float], ratio: float, alpha: float) -> list[float]:
    """Return the sparsity (share of zeros) of every matrix around the mean `ratio` = p, most for
    the least sensitive.

    Equal sensitivities are ranked by their order. A single matrix gets `ratio`. Raises `UsageError`
    when a density would leave [0, 1].
    """
    if not 0 <= ratio <= 1 or not 0 <= alpha <= min(ratio, 1 - ratio):
        raise UsageError(
            f"Shares of zeros of {ratio:g} ± {alpha:g} leave the range from 0 to 1.",
            "choose a smaller spread",
        )
    lowest = 1 - ratio - alpha
    highest = 2 * (1 - ratio) - lowest
    last = len(sensitivities) - 1
    ratios = [ratio] * len(sensitivities)
    for rank, place in enumerate(sorted(range(len(ratios)), key=lambda i: sensitivities[i])):
        if last:
            ratios[place] = 1 - (lowest + rank * (highest - lowest) / last)
    return ratios
