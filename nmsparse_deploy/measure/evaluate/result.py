"""What a measurement says: one number with its protocol, and how far chance alone could have moved it."""

from __future__ import annotations

import base64
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

Protocol = Mapping[str, object]
"""Under what conditions a number was measured; every metric has conditions of its own."""
PNG = b"\x89PNG\r\n\x1a\n"
BOOTSTRAP = 2000
"""Resamples behind every interval and every bootstrap standard error."""


@dataclass(frozen=True)
class EvalResult:
    """One metric with its protocol. `per_sample` holds what the value is the mean of, one number a sample.

    For perplexity these are the mean negative log-likelihoods of the windows, in nats.
    """

    metric: str
    value: float
    standard_error: float
    samples: int
    where: str
    protocol: Protocol
    per_sample: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Ratio:
    """Pruned over dense on the same samples, with a 95 % interval."""

    ratio: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Difference:
    """Pruned minus dense of `metric` on the same samples, with a 95 % interval."""

    difference: float
    low: float | None = None
    high: float | None = None
    metric: str = ""


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a prompt."""

    prompt: str
    text: str


@dataclass(frozen=True)
class DrawnImage:
    """A picture for the report; checked, because a page will embed it."""

    title: str
    png_base64: str

    def __post_init__(self) -> None:
        if not base64.b64decode(self.png_base64, validate=True).startswith(PNG):
            raise ValueError(f"the picture '{self.title}' is not a PNG")


@dataclass(frozen=True)
class Evaluation:
    """The content of an `evaluate.json`."""

    results: dict[str, EvalResult | tuple[EvalResult, ...]]
    ratio: Ratio | None = None
    difference: Difference | None = None
    continuations: dict[str, tuple[Continuation, ...]] = field(default_factory=dict)
    images: tuple[DrawnImage, ...] = ()
    held_out: dict[str, int | None] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    hardware: Protocol = field(default_factory=dict)


def mean_result(metric: str, values: Sequence[float], where: str, protocol: Protocol) -> EvalResult:
    """The mean over samples with its standard error."""
    mean = math.fsum(values) / len(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return EvalResult(metric, mean, error, len(values), where, protocol, tuple(values))


def _draws(count: int, seed: int) -> torch.Tensor:
    return torch.randint(count, (BOOTSTRAP, count), generator=torch.Generator().manual_seed(seed))


def bootstrap_interval(values: torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of `values` [samples]."""
    means = values[_draws(len(values), seed)].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


def bootstrap_error(statistic: Callable[[torch.Tensor], float], count: int, draws: int = 200, seed: int = 0) -> float:
    """Standard error of a statistic that is no mean: its spread over resampled indices of `count` samples."""
    found = [statistic(index) for index in _draws(count, seed)[:draws]]
    finite = [value for value in found if math.isfinite(value)]
    return statistics.stdev(finite) if len(finite) > 1 else 0.0


def paired_difference(dense: EvalResult, pruned: EvalResult, seed: int = 0) -> dict[str, float]:
    """Pruned minus dense on the same samples, with a 95 % bootstrap interval over samples."""
    difference = torch.tensor([b - a for a, b in zip(dense.per_sample, pruned.per_sample)], dtype=torch.float64)
    low, high = bootstrap_interval(difference, seed)
    return {"difference": float(difference.mean()), "low": low, "high": high}


def bootstrap_pairs(dense: Callable[[torch.Tensor], float], pruned: Callable[[torch.Tensor], float], count: int,
                    draws: int = 400, seed: int = 0) -> dict[str, float]:
    """Pruned minus dense of a statistic that is no mean, with a 95 % interval; both see the same resampled indices."""
    found = torch.tensor([pruned(index) - dense(index) for index in _draws(count, seed)[:draws]], dtype=torch.float64)
    low, high = torch.quantile(found, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    whole = torch.arange(count)
    return {"difference": pruned(whole) - dense(whole), "low": low, "high": high}
