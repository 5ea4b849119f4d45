"""Exactly one option for every item: the largest total value whose total weight fits a capacity.

    max Σ_i v_i(o_i)   subject to   Σ_i w_i(o_i) <= c        (multiple-choice knapsack)

Two options an item make the 0/1 knapsack. Solved by dynamic programming over the capacity in steps:
when all weights and the capacity share a step of which the capacity holds at most `STEPS`, the
answer is exact; otherwise weights are rounded up to multiples of `c / STEPS`. Rounding up never
breaks the constraint; with n items the answer is at least that of the exact problem with the
capacity `c (1 - n / STEPS)`. Kellerer, Pferschy & Pisinger, Knapsack Problems, 2004, chapter 11.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

STEPS = 100_000
"""Resolution of the capacity."""


@dataclass(frozen=True)
class Option:
    """One way to treat an item."""

    value: float
    weight: float


def choose(
    items: Sequence[Sequence[Option]], capacity: float, steps: int = STEPS
) -> list[int] | None:
    """Return the number of the chosen option of every item, or None when nothing fits.

    Weights are >= 0. Of equal values the lighter choice wins, then the option listed first.
    """
    scaled, limit = _in_steps(items, capacity, steps)
    if limit < 0:
        return None
    best = np.zeros(limit + 1)
    taken = np.zeros((len(items), limit + 1), dtype=np.int16)
    for number, options in enumerate(items):
        reached = np.full((len(options), limit + 1), -np.inf)
        for row, option, weight in zip(reached, options, scaled[number]):
            if weight <= limit:
                row[weight:] = best[: limit + 1 - weight] + option.value
        taken[number] = reached.argmax(0)
        best = reached.max(0)
    if best[-1] == -np.inf:
        return None
    left = int(best.argmax())  # the lightest of the best
    chosen = []
    for number in range(len(items) - 1, -1, -1):
        index = int(taken[number, left])
        chosen.append(index)
        left -= scaled[number][index]
    return chosen[::-1]


def _in_steps(
    items: Sequence[Sequence[Option]], capacity: float, steps: int
) -> tuple[list[list[int]], int]:
    """Return weights as whole steps, and how many steps the capacity holds."""
    weights = [[option.weight for option in options] for options in items]
    flat = [weight for row in weights for weight in row]
    if all(float(weight).is_integer() for weight in flat):
        step = math.gcd(*(int(weight) for weight in flat)) or 1
        limit = min(
            math.floor(capacity / step), sum(max(int(w) // step for w in row) for row in weights)
        )
        if limit <= steps:
            return [[int(weight) // step for weight in row] for row in weights], limit
    if capacity <= 0:
        return [
            [0 if weight <= 0 else 1 for weight in row] for row in weights
        ], 0 if capacity == 0 else -1
    # A hair of tolerance: 0.3 / (0.3 / n) must stay n steps.
    return [
        [math.ceil(weight / capacity * steps - 1e-9) for weight in row] for row in weights
    ], steps
