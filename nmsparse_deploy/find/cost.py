"""The cost of a prune, from shapes alone: floating-point operations, memory and disk. Predicted,
not measured.

Each term of the estimate is a function with its formula: `P` are weights, `T` tokens, `n` the
inputs and `R` the outputs of a matrix.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import torch
from torch import nn

from nmsparse_deploy.find.facts import Json
from nmsparse_deploy.find.footprint import MASK_BYTES, footprint
from nmsparse_deploy.find.plan.make_plan import Plan
from nmsparse_deploy.models.base import Target
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.recipe import Learn, MaskPro, Prune, Reconstruct, Refit, Training
from nmsparse_deploy.registry import METHODS


@dataclass(frozen=True)
class Cost:
    """Operations in GFLOP, memory and disk in MB, seconds at the speed this machine showed just
    now.

    Memory with the whole model loaded; with weights streamed from their files; with hidden states
    on disk besides.
    """

    tokens: int
    forward_gflop: float
    gram_gflop: float
    factor_gflop: float
    sweep_gflop: float
    refine_gflop: float
    train_gflop: float
    """Of learned masks and of fine-tuning: passes with gradients, teachers and evaluations."""
    memory_mb: float
    streamed_memory_mb: float
    on_disk_memory_mb: float
    disk_mb: float
    seconds: float
    status: str = "predicted"

    def to_json(self) -> Json:
        return asdict(self)


def estimate(loaded: LoadedModel, plan: Plan, spec: Prune, rates: Rates) -> Cost:
    """Predict what the settled prune section `spec` would take on `loaded` under `plan`."""
    module, targets = loaded.module, [row.target for row in plan.pruned()]
    forward = forward_passes(module, plan, spec, again=spec.sequential and loaded.streamed)
    training = training_passes(module, plan, spec)
    grams, factors = statistics(targets, spec), factorisations(targets, spec)
    swept, refitted = sweeps(targets, spec), refits(targets, spec)
    seconds = (
        (forward + training) / rates.compute
        + (grams + swept + refitted) / rates.single
        + factors / rates.double
    )
    memory = footprint(loaded, plan, spec, rates.dtype)
    return Cost(
        _tokens(spec),
        forward / 1e9,
        grams / 1e9,
        factors / 1e9,
        swept / 1e9,
        refitted / 1e9,
        training / 1e9,
        memory.whole / 1e6,
        memory.streamed / 1e6,
        memory.on_disk / 1e6,
        disk(module, targets) / 1e6,
        seconds,
    )


def forward_passes(module: nn.Module, plan: Plan, spec: Prune, again: bool) -> int:
    """Count passes through the blocks without learning: `2·T·P` each.

    One advances the stream; each stream takes one for its statistics, two where they are sequential
    and what was computed before is computed `again`; an epoch of reconstruction takes three. Where
    a block looks at the model's output, an epoch takes three through what is not in the blocks, and
    one for the dense model's output.
    """
    tokens, inside = _tokens(spec), _inside(plan)
    streams = 1 + (spec.dense_stream or spec.learn is not None)
    steps = [step for step in spec.refine if isinstance(step, Reconstruct)]
    passes = 1 + streams * (1 + again) + 3 * sum(step.epochs for step in steps)
    outside = max(0, _multiplied(module) - inside) if steps else 0
    blocks = range(1, len(plan.blocks) + 1)
    looking = sum(step.epochs * step.outlook(left) for step in steps for left in blocks)
    return 2 * tokens * (inside * passes + outside * (3 + 1) * looking)


def statistics(targets: list[Target], spec: Prune) -> int:
    """Count what Grams take: `2·T·n²` for every fusion group, whose members share one, and as much
    for a cross Gram."""
    if spec.needs != "gram":
        return 0
    widths = {target.fusion: target.k for target in targets}
    crossed = spec.dense_stream or spec.learn is not None
    return sum(2 * _tokens(spec) * k**2 for k in widths.values()) * (1 + crossed)


def factorisations(targets: list[Target], spec: Prune) -> int:
    """Count what factors of Grams take: `n³` for every matrix in every sweep."""
    return _sweeps_each(spec) * sum(target.experts * target.k**3 for target in targets)


def sweeps(targets: list[Target], spec: Prune) -> int:
    """Count what sweeps take: `2·R·n²` for every matrix."""
    return _sweeps_each(spec) * sum(2 * target.n * target.k**2 for target in targets)


def refits(targets: list[Target], spec: Prune) -> int:
    """Count what least squares take: `2·R·n²` for every matrix and conjugate-gradient step."""
    steps = sum(step.steps for step in spec.refine if isinstance(step, Refit))
    return steps * sum(2 * target.n * target.k**2 for target in targets)


def training_passes(module: nn.Module, plan: Plan, spec: Prune) -> float:
    """Count what learning and fine-tuning take, `2·T·P` a forward pass."""
    runs: list[Training | None] = [spec.learn, spec.finetune]
    return sum((_training_run(module, plan, spec, run) for run in runs if run is not None), 0.0)


def _training_run(module: nn.Module, plan: Plan, spec: Prune, run: Training) -> float:
    """Count the passes of one run.

    A step takes three passes over its tokens, one more for a teacher; what learns from forward
    passes alone takes one for its draw and one for the prior, each with a teacher of its own. An
    evaluation takes one pass over the held-out batches. All blocks together are one pass of the
    blocks; a whole model has its head as well.
    """
    scope = run.scope if isinstance(run, Learn) else "global"
    tokens = run.steps * (run.batch or spec.calibration.batch) * spec.calibration.length
    taught = scope == "global" and bool(run.distill)
    passes = 2 + 2 * taught if isinstance(run, MaskPro) else 3 + taught
    held_out = run.holdout * (spec.calibration.samples * spec.calibration.length)
    evaluations = 1 + -(-run.steps // run.evaluate_every)
    weights = _inside(plan) if scope == "block" else _multiplied(module)
    return 2 * weights * (passes * tokens + evaluations * held_out)


def disk(module: nn.Module, targets: list[Target]) -> float:
    """Return the bytes of the saved model, of as much again for finished blocks, and of masks of
    one bit a weight."""
    stored = sum(value.numel() * value.itemsize for value in module.parameters())
    return 2 * stored + MASK_BYTES * sum(target.k * target.n for target in targets)


def _tokens(spec: Prune) -> int:
    """Return the tokens that the blocks are walked with."""
    return spec.walked * spec.calibration.length if spec.needs != "none" or spec.learn else 0


def _inside(plan: Plan) -> int:
    """Return the weights of the matrices in all blocks."""
    return sum(row.target.k * row.target.n for row in plan.rows)


def _sweeps_each(spec: Prune) -> int:
    """Return how many sweeps each matrix takes: one of a method with a Gram, one that rounds in the
    end."""
    return (METHODS[spec.one_shot_method].needs == "gram") + spec.rounds_last


def _multiplied(module: nn.Module) -> int:
    """Return the weights that a token is multiplied with in a pass through the model; embeddings
    are only looked up."""
    used = {
        id(value): value.numel()
        for part in module.modules()
        if not isinstance(part, nn.Embedding)
        for value in part.parameters(recurse=False)
        if value.ndim > 1
    }
    return sum(used.values())


@dataclass(frozen=True)
class Rates:
    """Floating-point operations per second of matrix products: in the dtype of the forwards, in
    fp32, in fp64."""

    dtype: torch.dtype
    compute: float
    single: float
    double: float

    @classmethod
    def measure(cls, dtype: torch.dtype) -> Rates:
        """Time products on this machine."""
        return cls(dtype, _rate(dtype), _rate(torch.float32), _rate(torch.float64))


def _rate(dtype: torch.dtype, size: int = 1024) -> float:
    """Return the speed of a square product on this machine, the best of five."""
    a = torch.randn(size, size).to(dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
