"""Sparse or dense, GEMM by GEMM: time both at the user's numbers of rows and keep the faster.

Sparse kernels stay only where they win beyond noise: with the paired 95 % interval `[low, high]` of
the speed-up at each number of rows, `low > 1` somewhere and `high < 1` nowhere. So the model is
never slower than dense beyond noise.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.masks import project
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.ship.quantise import BASE
from nmsparse_deploy.ship.torch_sparse.linear import (
    MAX_VALUE,
    Codes,
    EightBit,
    KernelLinear,
    SparseCodes,
    make,
)
from nmsparse_deploy.ship.torch_sparse.semi_structured import DTYPES, KernelSetting, kernels
from nmsparse_deploy.system.gpu_clock import Machine
from nmsparse_deploy.system.progress import Progress, silent
from nmsparse_deploy.system.sparse_cores import shape_fits
from nmsparse_deploy.system.timing import Call, interleave, ratio

ROUNDS = 21
SEARCH_ROUNDS = 5
SHORT_MS, MANY = 0.1, 20
"""A product shorter than this is recorded so many times in a row: a replay of its own would be
waiting for the host."""
USUAL = 4.0
"""Where the random values that are read are cut off, in standard deviations."""
Keep = Literal["sparse", "dense"]


@dataclass(frozen=True)
class Times:
    """Paired timings of one GEMM at one number of rows, in milliseconds, and the setting that the
    sparse one used."""

    dense: Sequence[float]
    sparse: Sequence[float]
    setting: KernelSetting = field(default_factory=KernelSetting)


@dataclass(frozen=True)
class Verdict:
    """The verdict of paired timings. Microseconds per call."""

    rows: int
    dense_us: float
    sparse_us: float
    speedup: float
    low: float
    high: float

    @property
    def word(self) -> str:
        return "wins" if self.low > 1 else "loses" if self.high < 1 else "within noise"


@dataclass(frozen=True)
class GemmDecision:
    """A decision about one GEMM, and its reason. `weights` are the parameters that it stands for:
    all of its shape."""

    k: int
    n: int
    precision: str
    weights: tuple[str, ...]
    keep: Keep
    why: str
    verdicts: tuple[Verdict, ...] = ()
    settings: Mapping[int, KernelSetting] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        return {
            **asdict(self),
            "verdicts": [{**asdict(verdict), "word": verdict.word} for verdict in self.verdicts],
        }


@dataclass(frozen=True)
class Decisions:
    """The content of `decisions.json`: a decision for every shape of a packed model, as timed on
    one GPU."""

    gpu: str
    dry: bool
    gemms: tuple[GemmDecision, ...]
    rows: tuple[int, ...] = ()
    kernels: str = ""
    environment: Mapping[str, object] = field(default_factory=dict)

    @property
    def kept_sparse(self) -> int:
        return sum(gemm.keep == "sparse" for gemm in self.gemms)

    def to_json(self) -> dict[str, object]:
        return {
            "gpu": self.gpu,
            "rows": self.rows,
            "kernels": self.kernels,
            "dry": self.dry,
            "kept_sparse": self.kept_sparse,
            "shapes": len(self.gemms),
            "gemms": [gemm.to_json() for gemm in self.gemms],
            **self.environment,
        }


def judge(rows: int, times: Times) -> Verdict:
    """Return the paired speed-up at one number of rows."""
    gain = ratio(times.dense, times.sparse)
    dense, sparse = (1e3 * statistics.median(arm) for arm in (times.dense, times.sparse))
    return Verdict(rows, dense, sparse, gain.speedup, gain.low, gain.high)


def settle(verdicts: Sequence[Verdict]) -> tuple[Keep, str]:
    """Return what to keep, and why in a few words. A pure function of what was timed."""
    losing = [verdict for verdict in verdicts if verdict.word == "loses"]
    winning = [verdict for verdict in verdicts if verdict.word == "wins"]
    if losing:
        worst = min(losing, key=lambda verdict: verdict.speedup)
        return "dense", f"sparse is slower at {worst.rows} rows ({worst.speedup:.2f}x)"
    if not winning:
        return "dense", "no difference beyond noise"
    best = max(winning, key=lambda verdict: verdict.speedup)
    return "sparse", f"sparse is faster at {best.rows} rows ({best.speedup:.2f}x)"


def decide(
    shape: tuple[int, int], precision: str, weights: Sequence[str], times: Mapping[int, Times]
) -> GemmDecision:
    """Decide for one shape `(k, n)` from its timings by rows."""
    verdicts = tuple(judge(rows, pair) for rows, pair in sorted(times.items()))
    keep, why = settle(verdicts)
    return GemmDecision(
        *shape,
        precision,
        tuple(weights),
        keep,
        why,
        verdicts,
        {rows: pair.setting for rows, pair in times.items()},
    )


def decide_all(
    shapes: Mapping[tuple[int, int, bool], Sequence[str]],
    precision: str,
    rows: Sequence[int],
    machine: Machine,
    rounds: int = ROUNDS,
    progress: Progress = silent,
) -> list[GemmDecision]:
    """Time every shape `(k, n, has a bias)` once at all `rows`; same shapes take the same time,
    whatever they hold.

    Raises `NmsparseError` where the kernels do not take a shape or precision.
    """
    decisions = []
    for number, ((k, n, biased), weights) in enumerate(shapes.items()):
        progress(f"timing {k} x {n} in {precision}", number, len(shapes))
        pair = twins(k, n, precision, machine.device, biased)
        times = {count: time_pair(pair, count, machine, rounds) for count in rows}
        decisions.append(decide((k, n), precision, weights, times))
    return decisions


@dataclass(frozen=True)
class Twins:
    """The same random 2:4 weight as dense and as sparse layer."""

    dense: KernelLinear
    sparse: KernelLinear
    out: torch.dtype

    def reads(self, rows: int) -> torch.Tensor:
        """Return what both multiply at this number of rows: in 8 bits the codes, which are there
        already for both."""
        device = self.sparse.weight.device
        drawn = torch.randn(
            rows,
            self.sparse.in_features,
            generator=torch.Generator(device).manual_seed(rows),
            device=device,
        ).to(self.out)
        return self.sparse.encode(drawn)[0] if isinstance(self.sparse, SparseCodes) else drawn


def twins(k: int, n: int, precision: str, device: torch.device, biased: bool = False) -> Twins:
    """Make layers of one shape. Raises `NmsparseError` where the kernels do not take it."""
    why = kernels().why_not(precision)
    if why is None and not shape_fits(precision, k, n):
        why = f"the kernels do not take the shape {k} x {n}"
    if why is not None:
        raise NmsparseError(f"Sparse kernels cannot run {precision} here: {why}.")
    dtype = DTYPES[precision]
    out = dtype if dtype.itemsize > 1 else DTYPES[BASE]
    weight = torch.randn(n, k, generator=torch.Generator(device).manual_seed(k + n), device=device)
    weight = torch.where(project(weight.abs(), TWO_FOUR), weight, 0.0)
    bias = torch.zeros(n, dtype=out, device=device) if biased else None
    scales = None
    if dtype in MAX_VALUE:
        scale = weight.abs().max() / MAX_VALUE[dtype]
        scales = EightBit(
            scale.reshape(1), torch.full((1,), USUAL / MAX_VALUE[dtype], device=device)
        )
        scaled = (weight / scale).clamp(-MAX_VALUE[dtype], MAX_VALUE[dtype])
        weight = torch.where(
            weight != 0, scaled.round() if dtype == torch.int8 else scaled, 0.0
        ).to(dtype)
    return Twins(make(weight, bias, False, out, scales), make(weight, bias, True, out, scales), out)


@torch.inference_mode()
def time_pair(pair: Twins, rows: int, machine: Machine, rounds: int = ROUNDS) -> Times:
    """Time dense against sparse at one number of rows, with the fastest setting that the library's
    search offers."""
    x, layer = pair.reads(rows), pair.sparse
    alpha = layer.alpha if isinstance(layer, SparseCodes) else None
    settings = kernels().search(
        x, layer.weight, layer.out_features, layer.bias if alpha is None else None, alpha, pair.out
    )
    calls = {
        str(number): _sparse(layer, x, tried_setting)
        for number, tried_setting in enumerate(settings)
    }
    tried = replayed(calls, machine, SEARCH_ROUNDS)
    setting = settings[int(min(tried, key=lambda name: statistics.median(tried[name])))]
    times = replayed(
        {"dense": lambda: _product(pair.dense, x), "sparse": _sparse(layer, x, setting)},
        machine,
        rounds,
    )
    return Times(times["dense"], times["sparse"], setting)


def _sparse(layer: Any, x: torch.Tensor, setting: KernelSetting) -> Call:
    def call() -> torch.Tensor:
        layer.settings[len(x)] = setting
        return _product(layer, x)

    return call


def _product(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Multiply alone: without encoding what is read."""
    y: torch.Tensor = layer.multiply(x) if isinstance(layer, Codes) else layer.rows(x)
    return y


def replayed(calls: Mapping[str, Call], machine: Machine, rounds: int) -> dict[str, list[float]]:
    """Time single products, interleaved, as CUDA graphs where there are any: kernels, not the
    host's work."""
    if machine.graph is None:
        return interleave(calls, rounds, clock=machine.clock())
    recorded = {name: machine.graph(call) for name, call in calls.items()}
    first = interleave(recorded, 1, clock=machine.clock())
    short = {name for name, times in first.items() if times[0] < SHORT_MS}
    recorded |= {name: machine.graph(_repeated(calls[name])) for name in short}
    times = interleave(recorded, rounds, clock=machine.clock())
    return {
        name: [time / (MANY if name in short else 1) for time in measured]
        for name, measured in times.items()
    }


def _repeated(call: Call) -> Call:
    def calls() -> None:
        for _ in range(MANY):
            call()

    return calls
