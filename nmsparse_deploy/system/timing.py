"""Latency in arms that are timed in the same process, interleaved in random order, and compared as
ratios.

speed-up = median(base) / median(other),   95 % interval by bootstrap over the rounds, which stay paired
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CPU_SENTENCE = (
    "No CPU kernel here uses 2:4 sparsity: the pruned model runs the same dense kernels over zeros, so no "
    "speed-up is expected and any difference is noise."
)

Call = Callable[[], Any]
Clock = Callable[[Call], float]
"""Runs a call and returns how long it took, in milliseconds."""


def wall(call: Call) -> float:
    """Time on a processor: nothing goes on when the call returns."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


@dataclass(frozen=True)
class TimedArm:
    """One timed variant. Times are in milliseconds per call."""

    name: str
    kernel: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    calls: int
    times_ms: tuple[float, ...]
    mean_ms: float = 0.0
    min_ms: float = 0.0
    p95_ms: float = 0.0
    p99_ms: float = 0.0
    variation: float = 0.0
    """Standard deviation over mean."""


@dataclass(frozen=True)
class SpeedUp:
    """The time of one arm over that of another, with a 95 % interval."""

    speedup: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.speedup:.2f} ({self.low:.2f} to {self.high:.2f})"


def interleave(
    calls: Mapping[str, Call], rounds: int, warmup: int = 2, seed: int = 0, clock: Clock = wall
) -> dict[str, list[float]]:
    """Time every call once a round, in an order that changes from round to round; milliseconds per
    call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(seed)
    for round_number in range(-warmup, rounds):
        for name in order.sample(sorted(calls), len(calls)):
            taken = clock(calls[name])
            if round_number >= 0:
                times[name].append(taken)
    return times


def summarise(name: str, kernel: str, times: Sequence[float]) -> TimedArm:
    ordered = sorted(times)
    mean = statistics.fmean(times)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return TimedArm(
        name,
        kernel,
        statistics.median(times),
        at(0.1),
        at(0.9),
        len(times),
        tuple(round(t, 4) for t in times),
        mean,
        ordered[0],
        at(0.95),
        at(0.99),
        statistics.pstdev(times) / mean if mean else 0.0,
    )


def ratio(
    base: Sequence[float], other: Sequence[float], seed: int = 0, draws: int = 1000
) -> SpeedUp:
    """Return the speed-up of `other` over `base` (ratio of medians) with a 95 % bootstrap interval
    of paired rounds."""
    generator = random.Random(seed)
    count = len(base)
    ratios = []
    for _ in range(draws):
        picks = [generator.randrange(count) for _ in range(count)]
        ratios.append(
            statistics.median([base[i] for i in picks])
            / statistics.median([other[i] for i in picks])
        )
    ratios.sort()
    return SpeedUp(
        statistics.median(base) / statistics.median(other),
        ratios[int(0.025 * draws)],
        ratios[int(0.975 * draws)],
    )
