"""What a prune would cost, from shapes alone: floating-point operations, memory and disk. Predicted, not measured."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from nmsparse_deploy.find.learn.learner import ADAM, BEST, Learned
from nmsparse_deploy.find.learn.memory_budget import Weights, budget
from nmsparse_deploy.find.methods.hessian import FP64_WIDTH
from nmsparse_deploy.find.plan.make_plan import Plan
from nmsparse_deploy.models.adapters.streamed import SHARD
from nmsparse_deploy.models.base import Target
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.pattern import NMPattern
from nmsparse_deploy.recipe import Learn, MaskPro, Prune, Reconstruct, Refit, Training
from nmsparse_deploy.registry import LEARNERS, METHODS, REFINEMENTS
from nmsparse_deploy.system.memory import used_memory

MASK_BITS = 1 / 8


@dataclass(frozen=True)
class Cost:
    """Operations in GFLOP, memory and disk in MB, seconds at the speed this machine showed just now.

    Memory with the whole model loaded; with weights streamed from their files; with hidden states on disk besides.
    """

    tokens: int
    forward_gflop: float
    gram_gflop: float
    factor_gflop: float
    sweep_gflop: float
    refine_gflop: float
    train_gflop: float
    """Of learned masks and of fine-tuning: passes with gradients, teachers and judgements."""
    memory_mb: float
    streamed_memory_mb: float
    on_disk_memory_mb: float
    disk_mb: float
    seconds: float
    status: str = "predicted"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def estimate(loaded: LoadedModel, plan: Plan, spec: Prune, rates: Rates) -> Cost:
    """What the settled prune section `spec` would take on `loaded` under `plan`.

    Formulas: block forwards over T tokens (2·T·P each): one to advance, one for statistics in each stream (two when
    sequential), three per epoch of reconstruction, and four through the head where a block looks so far; passes of
    learned masks and of fine-tuning as `_training` counts them; `2Tn²` per Gram and per cross Gram, `n³` per factor,
    `2Rn²` per sweep and per conjugate-gradient step. Layers that read the same input share the Gram but are factorised
    one by one.
    """
    need = spec.needs
    tokens = spec.walked * spec.calibration.length if need != "none" or spec.learn else 0
    targets = [row.target for row in plan.pruned()]
    inside = sum(row.target.k * row.target.n for row in plan.rows)
    gram, swept = need == "gram", (METHODS[spec.one_shot_method].needs == "gram") + spec.rounds_last
    dense = spec.dense_stream or spec.learn is not None
    widths = {t.fusion: t.k for t in targets}
    once = 2 * tokens * inside
    rebuilt = [step for step in spec.refine if isinstance(step, Reconstruct)]
    trained = sum(step.epochs for step in rebuilt)
    beyond = 2 * tokens * max(0, _multiplied(loaded.module) - inside) if rebuilt else 0
    looks_on = sum(step.epochs * step.outlook(place) for step in rebuilt for place in range(1, len(plan.blocks) + 1))
    training = _training(loaded.module, spec, inside)
    forward = once * (1 + (1 + dense) * (1 + spec.sequential) + 3 * trained) + 4 * beyond * looks_on
    grams = sum(2 * tokens * k**2 for k in widths.values()) * (1 + dense) if gram else 0
    factors = swept * sum(t.experts * t.k**3 for t in targets)
    sweeps = sum(2 * t.n * t.k**2 for t in targets)
    solved = sweeps * sum(step.steps for step in spec.refine if isinstance(step, Refit))
    sweeps *= swept
    seconds = ((forward + training) / rates.compute + (grams + sweeps + solved) / rates.single + factors / rates.double)
    weights = sum(p.numel() * p.itemsize for p in loaded.module.parameters())
    need_memory = footprint(loaded, plan, spec, rates.dtype)
    disk = 2 * weights + MASK_BITS * sum(t.k * t.n for t in targets)
    return Cost(tokens, forward / 1e9, grams / 1e9, factors / 1e9, sweeps / 1e9, solved / 1e9, training / 1e9,
                need_memory.whole / 1e6, need_memory.streamed / 1e6, need_memory.on_disk / 1e6, disk / 1e6, seconds)


def _training(module: nn.Module, spec: Prune, inside: float) -> float:
    """Operations of learning and of fine-tuning, `2·T·P` a forward pass, with `inside` the weights of all blocks.

    A step takes three passes over its tokens, one more for a teacher; what learns from forward passes alone takes one
    for its draw and one for the prior, each with a teacher of its own. Judgements take one pass over the held-out
    batches each. All blocks together are one pass of the blocks; a whole model has its head as well.
    """
    found = 0.0
    sample = spec.calibration.samples * spec.calibration.length
    runs: list[Training | None] = [spec.learn, spec.finetune]
    for run in runs:
        if run is None:
            continue
        learn = run if isinstance(run, Learn) else None
        scope = learn.objective if learn else "global"
        tokens = run.steps * (run.batch or spec.calibration.batch) * spec.calibration.length
        forwards = isinstance(run, MaskPro)  # alone: the draw, and the prior
        taught = scope == "global" and bool(run.distill)
        passes = 2 + 2 * taught if forwards else 3 + taught
        judged = (1 + -(-run.steps // run.evaluate_every)) * run.holdout * sample
        width = inside if scope == "block" else _multiplied(module)
        found += 2 * width * (passes * tokens + judged)
    return found


def _multiplied(module: nn.Module) -> int:
    """Weights that a token is multiplied with in a pass through the whole model; embeddings are only looked up."""
    used = {id(value): value.numel() for part in module.modules() if not isinstance(part, nn.Embedding)
            for value in part.parameters(recurse=False) if value.ndim > 1}
    return sum(used.values())


def _state(module: nn.Module, plan: Plan, spec: Prune, compute: torch.dtype) -> float:
    """Bytes that training holds beside the model; of learning and fine-tuning the larger."""
    sizes: dict[int, list[Weights]] = {}
    for row in plan.pruned():
        if isinstance(row.pattern, NMPattern):
            target = row.target
            sizes.setdefault(target.block, []).append(Weights(target.k * target.n, target.k, target.n, row.pattern))
    every = [one for block in sizes.values() for one in block]
    tokens, found = spec.calibration.batch * spec.calibration.length, [0.0]
    if spec.learn is not None:
        learn = spec.learn
        parts = [every] if learn.objective == "global" else list(sizes.values())
        method: Learned = LEARNERS.load(learn.name)
        found += [budget(part, lambda pattern: method.bytes_per_weight(learn, pattern), tokens, compute,
                         recomputed=learn.gradient_checkpointing).total for part in parts]
    if spec.finetune is not None:
        teacher = sum(value.numel() for value in module.parameters()) * compute.itemsize
        found.append(teacher + budget(every, lambda pattern: ADAM + BEST + 2 * torch.float32.itemsize, tokens, compute,
                                      recomputed=spec.finetune.gradient_checkpointing).total)
    return max(found)


@dataclass(frozen=True)
class Footprint:
    """Predicted peak memory in bytes: with the whole model loaded; with weights streamed from their files; with hidden
    states on disk besides."""

    whole: int
    streamed: int
    on_disk: int


def footprint(loaded: LoadedModel, plan: Plan, spec: Prune, compute: torch.dtype) -> Footprint:
    """What this process will hold at most while it prunes `loaded`.

    A block is held in the checkpoint's dtype. Beside it come, one after the other: copies of it in `compute` and the
    Grams; fp32 rows, masks and new weights of what is pruned, with a factorisation; the same as they are stored.
    Between blocks the hidden states stay: two buffers, five where a dense stream runs beside. At the end come
    a shard, read and written, and then all masks, one bit a weight. What training holds (`_state`) comes on top.
    """
    need = spec.needs
    dense = spec.dense_stream or spec.learn is not None
    parameters = dict(loaded.module.named_parameters())
    weights = {name: p.numel() * p.itemsize for name, p in parameters.items()}
    widths = [row.target.k for row in plan.rows if row.target.block == 0]
    hidden = compute.itemsize * min(widths, default=0) * spec.calibration.length
    batch = hidden * spec.calibration.batch
    states = hidden * spec.walked * (5 if dense else 2) if need != "none" or spec.learn else 0
    blocks = [_of_block(loaded, plan, number, spec, compute) for number in range(len(plan.blocks))]
    inside = tuple(f"{path}." for path in plan.blocks)
    outside = max((size for name, size in weights.items() if not name.startswith(inside)), default=0)
    largest = max((sum(size for name, size in weights.items() if name.startswith(path)) for path in inside), default=0)
    present = sum(size for name, size in weights.items() if not parameters[name].is_meta)
    base = used_memory() - min(present, used_memory()) + int(_state(loaded.module, plan, spec, compute))
    saving = int(sum(row.target.k * row.target.n for row in plan.pruned()) * MASK_BITS)
    working = max(blocks, default=0)

    def peak(resident: int, kept: int) -> int:
        return base + max(resident + kept + working, outside + batch, saving, min(2 * SHARD, sum(weights.values())))

    return Footprint(base + sum(weights.values()) + max(states + working, saving), peak(largest, states),
                     peak(largest, min(states, 2 * batch)))


def _of_block(loaded: LoadedModel, plan: Plan, number: int, spec: Prune, compute: torch.dtype) -> int:
    """Bytes that come and go while a block is pruned, beside its own weights and the hidden states."""
    parameters = list(loaded.module.get_submodule(plan.blocks[number]).parameters())
    values, stored = sum(p.numel() for p in parameters), sum(p.numel() * p.itemsize for p in parameters)
    targets = [row.target for row in plan.pruned(number)]
    if not targets:
        return values * compute.itemsize
    chosen = sum(t.k * t.n for t in targets)
    dense = spec.dense_stream
    moves = METHODS[spec.one_shot_method].updates_weights or bool(spec.refine) or spec.learn is not None
    widest = max(t.k for t in targets)
    need = spec.needs
    grams = _grams(targets) * (1 + dense) if need == "gram" else 0
    factor = 3 * widest**2 * (8 if widest <= FP64_WIDTH else 4) if need == "gram" else 0
    tokens = spec.calibration.batch * spec.calibration.length if need != "none" else 0
    passing = tokens * widest * (4 * compute.itemsize + 4)
    copies = values * compute.itemsize * (1 + spec.sequential) if need != "none" else 0
    ranked = 12 * max(t.k * t.n for t in targets)  # values and int64 places while the largest layer is projected
    rows = chosen * (4 + 1 + 4 * moves) + ranked
    trained = 16 * values if any(REFINEMENTS[step.name].level == "block" for step in spec.refine) else 0
    return max(copies + grams + passing, grams + rows + max(factor, trained + passing, 2 * stored))


def _grams(targets: list[Target]) -> int:
    """Bytes of the Grams of fusion groups, and of one more while it is made symmetric."""
    sizes = {t.fusion: 4 * t.experts * t.k**2 for t in targets}
    return sum(sizes.values()) + max(4 * t.k**2 for t in targets)


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
