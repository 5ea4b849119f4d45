"""What a prune would cost, from shapes alone: floating-point operations, memory and disk. Predicted, not measured."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .block import needs
from .learn import one_shot_method, resolved
from .memory import peak_memory_mb
from .methods.base import Method
from .methods.hessian import FP64_WIDTH
from .models.base import LoadedModel
from .plan import Plan
from .recipe import Prune
from .registry import METHODS
from .steps import Reconstruct, Refit

MASK_BITS = 1 / 8


@dataclass(frozen=True)
class Cost:
    """Operations in GFLOP, memory and disk in MB, seconds at the speed this machine showed just now."""

    tokens: int
    forward_gflop: float
    gram_gflop: float
    factor_gflop: float
    sweep_gflop: float
    refine_gflop: float
    memory_mb: float
    disk_mb: float
    seconds: float
    status: str = "predicted"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def estimate(loaded: LoadedModel, plan: Plan, spec: Prune, rates: Rates) -> Cost:
    """What the prune section `spec` would take on `loaded` under `plan`.

    Formulas: block forwards over T tokens (2·T·P each): one to advance, one for statistics in each stream (two when
    sequential), three per epoch of reconstruction; `2Tn²` per Gram and per cross Gram, `n³` per factor, `2Rn²` per
    sweep and per conjugate-gradient step. Layers that read the same input share the Gram but are factorised one by one.
    """
    method: Method = METHODS.load(one_shot_method(spec))
    need = needs(spec, method)
    tokens = spec.calibration.samples * spec.calibration.length if need != "none" or spec.learn else 0
    targets = [row.target for row in plan.pruned()]
    inside = sum(row.target.k * row.target.n for row in plan.rows)
    gram, swept = need == "gram", method.needs == "gram"
    dense = any(step.dense_stream for step in spec.refine) or spec.learn is not None
    widths = {t.fusion: t.k for t in targets}
    once = 2 * tokens * inside
    trained: float = sum(step.epochs for step in spec.refine if isinstance(step, Reconstruct))
    if spec.learn is not None:
        settled = spec.learn.settled(resolved(spec.learn.objective, spec.permute))
        batch = settled.batch or spec.calibration.batch
        trained += settled.steps * batch / max(1, spec.calibration.samples)
    forward = once * (1 + (1 + dense) * (1 + spec.sequential) + 3 * trained)
    grams = sum(2 * tokens * k**2 for k in widths.values()) * (1 + dense) if gram else 0
    factors = sum(t.k**3 for t in targets) if swept else 0
    sweeps = sum(2 * t.n * t.k**2 for t in targets)
    solved = sweeps * sum(step.steps for step in spec.refine if isinstance(step, Refit))
    sweeps = sweeps if swept else 0
    seconds = (forward / rates.compute + (grams + sweeps + solved) / rates.single + factors / rates.double)
    weights = sum(p.numel() * p.itemsize for p in loaded.module.parameters())
    return Cost(tokens, forward / 1e9, grams / 1e9, factors / 1e9, sweeps / 1e9, solved / 1e9,
                _memory(loaded, plan, tokens * (1 + dense + bool(trained)), gram, rates.dtype) / 1e6,
                (2 * weights + MASK_BITS * sum(t.k * t.n for t in targets)) / 1e6, seconds)


def _memory(loaded: LoadedModel, plan: Plan, tokens: int, gram: bool, compute: torch.dtype) -> float:
    """What this process holds with the model loaded, a working copy of the largest block, two activation buffers, and
    the Grams of a block."""
    loaded_now = peak_memory_mb() * 1e6
    blocks = [sum(p.numel() for p in loaded.module.get_submodule(path).parameters()) for path in plan.blocks]
    widths = {row.target.fusion: row.target.k for row in plan.rows if row.target.block == 0}
    hidden = min(widths.values(), default=0)
    widest = max(widths.values(), default=0)
    statistics = 4 * sum(k**2 for k in widths.values()) if gram else 0
    factor = 3 * widest**2 * (8 if widest <= FP64_WIDTH else 4) if gram else 0  # three copies while factorising
    return loaded_now + compute.itemsize * (max(blocks) + 2 * tokens * hidden) + statistics + factor


@dataclass(frozen=True)
class Rates:
    """Floating-point operations per second of matrix products: in the dtype of the forwards, in fp32, in fp64."""

    dtype: torch.dtype
    compute: float
    single: float
    double: float

    @classmethod
    def measure(cls, dtype: torch.dtype) -> Rates:
        return cls(dtype, _rate(dtype), _rate(torch.float32), _rate(torch.float64))


def _rate(dtype: torch.dtype, size: int = 1024) -> float:
    """A square product on this machine, the best of five."""
    a = torch.randn(size, size).to(dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
