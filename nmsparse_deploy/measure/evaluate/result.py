"""What a measurement says: one number with its protocol, and how far chance alone could have moved
it."""

from __future__ import annotations

import base64
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

Protocol = Mapping[str, object]
"""Under what conditions a number was measured; every metric has conditions of its own."""
PNG = b"\x89PNG\r\n\x1a\n"
BOOTSTRAP = 2000
"""Resamples behind every interval and every bootstrap standard error."""


@dataclass(frozen=True)
class EvalResult:
    """One metric with its protocol. `per_sample` holds what the value is the mean of, one number a
    sample.

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
class TimmRow:
    """The fields that timm's `validate.py` prints, with its rounding; shares are in percent."""

    model: str
    top1: float
    top1_err: float
    top5: float
    top5_err: float
    param_count: float
    img_size: int
    crop_pct: float
    interpolation: str


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a prompt."""

    prompt: str
    text: str


@dataclass(frozen=True)
class DrawnImage:
    """An image for the report; checked, because a page will embed it."""

    title: str
    png_base64: str

    def __post_init__(self) -> None:
        if not base64.b64decode(self.png_base64, validate=True).startswith(PNG):
            raise ValueError(f"the image '{self.title}' is not a PNG")


@dataclass(frozen=True)
class NotChecked:
    """A step that was not taken, and why."""

    place: str
    why: str


Results = dict[str, list[EvalResult]]
"""Model -> its metrics, the one that matters most first."""


@dataclass(frozen=True)
class Evaluation:
    """The content of an `evaluate.json`, without versions and hardware.

    `held_out` counts what was compared with the calibration sample (None: there was none), and the
    overlaps.
    """

    results: dict[str, EvalResult | list[EvalResult]]
    held_out: dict[str, int | None] = field(default_factory=dict)
    ratio: Ratio | None = None
    difference: Difference | None = None
    continuations: dict[str, list[Continuation]] = field(default_factory=dict)
    images: list[DrawnImage] = field(default_factory=list)
    samples: Mapping[str, object] = field(default_factory=dict)
    timesteps: list[dict[str, float]] = field(default_factory=list)
    timm: dict[str, TimmRow] = field(default_factory=dict)
    not_checked: list[NotChecked] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return it as it is written; models without a result are left out."""
        return asdict(
            replace(self, results={label: rows for label, rows in self.results.items() if rows})
        )


def mean_result(metric: str, values: Sequence[float], where: str, protocol: Protocol) -> EvalResult:
    """Return the mean over samples with its standard error."""
    mean = math.fsum(values) / len(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return EvalResult(metric, mean, error, len(values), where, protocol, tuple(values))


def _draws(count: int, seed: int) -> torch.Tensor:
    return torch.randint(count, (BOOTSTRAP, count), generator=torch.Generator().manual_seed(seed))


def bootstrap_interval(values: torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of `values` [samples]."""
    return _quantiles(values[_draws(len(values), seed)].mean(1))


def _quantiles(values: torch.Tensor) -> tuple[float, float]:
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


def bootstrap_error(
    statistic: Callable[[torch.Tensor], float], count: int, draws: int = 200, seed: int = 0
) -> float:
    """Return the standard error of a statistic that is no mean: its spread over `count` resampled
    indices."""
    finite = [
        value for index in _draws(count, seed)[:draws] if math.isfinite(value := statistic(index))
    ]
    return statistics.stdev(finite) if len(finite) > 1 else 0.0


def paired_difference(dense: EvalResult, pruned: EvalResult, seed: int = 0) -> Difference:
    """Return pruned minus dense on the same samples, with a 95 % bootstrap interval over
    samples."""
    difference = torch.tensor(
        [b - a for a, b in zip(dense.per_sample, pruned.per_sample)], dtype=torch.float64
    )
    low, high = bootstrap_interval(difference, seed)
    return Difference(float(difference.mean()), low, high, pruned.metric)


def bootstrap_pairs(
    dense: Callable[[torch.Tensor], float],
    pruned: Callable[[torch.Tensor], float],
    count: int,
    metric: str = "",
    draws: int = 400,
    seed: int = 0,
) -> Difference:
    """Return pruned minus dense of a statistic that is no mean, on the same resampled indices, with
    a 95 % interval."""
    differences = [pruned(index) - dense(index) for index in _draws(count, seed)[:draws]]
    low, high = _quantiles(torch.tensor(differences, dtype=torch.float64))
    whole = torch.arange(count)
    return Difference(pruned(whole) - dense(whole), low, high, metric)
