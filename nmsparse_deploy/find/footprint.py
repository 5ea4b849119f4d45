"""The memory that a prune will hold at most, predicted from shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nmsparse_deploy.find.learn import learner
from nmsparse_deploy.find.learn.memory_budget import TrainedMatrix, memory_budget
from nmsparse_deploy.find.methods.hessian import FP64_WIDTH
from nmsparse_deploy.find.plan.make_plan import Plan
from nmsparse_deploy.models.adapters.streamed import SHARD
from nmsparse_deploy.models.base import Target
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.pattern import NMPattern
from nmsparse_deploy.recipe import Prune
from nmsparse_deploy.registry import LEARNERS, METHODS, REFINEMENTS
from nmsparse_deploy.system.memory import used_memory

MASK_BYTES = 1 / 8
"""Of a packed mask, per weight."""


@dataclass(frozen=True)
class Footprint:
    """Predicted peak memory in bytes: with the whole model loaded; with weights streamed from their
    files; with hidden states on disk besides."""

    whole: int
    streamed: int
    on_disk: int


def footprint(loaded: LoadedModel, plan: Plan, spec: Prune, compute: torch.dtype) -> Footprint:
    """Predict what this process will hold at most while it prunes `loaded`.

    A block is held in the checkpoint's dtype, with what pruning it takes (`_working`) and the
    hidden states between blocks (`_hidden_states`). At the end come a shard, read and written, and
    then all masks, one bit a weight. What the process holds already and what training holds
    (`_training_state`) come on top.
    """
    parameters = dict(loaded.module.named_parameters())
    sizes = {name: value.numel() * value.itemsize for name, value in parameters.items()}
    total, present = (
        sum(sizes.values()),
        sum(size for name, size in sizes.items() if not parameters[name].is_meta),
    )
    base = (
        used_memory()
        - min(present, used_memory())
        + int(_training_state(loaded.module, plan, spec, compute))
    )
    states, batch = _hidden_states(plan, spec, compute)
    masks = int(sum(row.target.k * row.target.n for row in plan.pruned()) * MASK_BYTES)
    working = max(
        (_working(loaded, plan, number, spec, compute) for number in range(len(plan.blocks))),
        default=0,
    )
    inside = tuple(f"{path}." for path in plan.blocks)
    outside = max((size for name, size in sizes.items() if not name.startswith(inside)), default=0)
    block = max(
        (sum(size for name, size in sizes.items() if name.startswith(path)) for path in inside),
        default=0,
    )

    def streamed(states: int) -> int:
        return base + max(block + states + working, outside + batch, masks, min(2 * SHARD, total))

    return Footprint(
        base + total + max(states + working, masks),
        streamed(states),
        streamed(min(states, 2 * batch)),
    )


def _hidden_states(plan: Plan, spec: Prune, compute: torch.dtype) -> tuple[int, int]:
    """Return the bytes of the hidden states between blocks, and of one batch of them.

    There are two buffers, five where a dense stream runs beside.
    """
    widths = [row.target.k for row in plan.rows if row.target.block == 0]
    sample = compute.itemsize * min(widths, default=0) * spec.calibration.length
    buffers = 5 if spec.dense_stream or spec.learn is not None else 2
    walked = spec.walked if spec.needs != "none" or spec.learn else 0
    return sample * walked * buffers, sample * spec.calibration.batch


def _working(
    loaded: LoadedModel, plan: Plan, number: int, spec: Prune, compute: torch.dtype
) -> int:
    """Return the bytes that come and go while a block is pruned, beside its own weights and the
    hidden states.

    These are, one after the other: copies of the block in `compute`, Grams, and what passes through
    a layer; Grams, fp32 rows, masks and new weights of what is pruned, with the largest of a
    factorisation, training, and the block as it is stored.
    """
    parameters = list(loaded.module.get_submodule(plan.blocks[number]).parameters())
    values, stored = (
        sum(p.numel() for p in parameters),
        sum(p.numel() * p.itemsize for p in parameters),
    )
    targets = [row.target for row in plan.pruned(number)]
    if not targets:
        return values * compute.itemsize
    chosen = sum(t.k * t.n for t in targets)
    moves = (
        METHODS[spec.one_shot_method].updates_weights or bool(spec.refine) or spec.learn is not None
    )
    widest = max(t.k for t in targets)
    grams = _grams(targets) * (1 + spec.dense_stream) if spec.needs == "gram" else 0
    factor = 3 * widest**2 * (8 if widest <= FP64_WIDTH else 4) if spec.needs == "gram" else 0
    tokens = spec.calibration.batch * spec.calibration.length if spec.needs != "none" else 0
    passing = tokens * widest * (4 * compute.itemsize + 4)
    copies = values * compute.itemsize * (1 + spec.sequential) if spec.needs != "none" else 0
    ranked = 12 * max(
        t.k * t.n for t in targets
    )  # values and int64 places while the largest layer is projected
    rows = chosen * (4 + 1 + 4 * moves) + ranked
    trained = (
        16 * values if any(REFINEMENTS[step.name].level == "block" for step in spec.refine) else 0
    )
    return max(copies + grams + passing, grams + rows + max(factor, trained + passing, 2 * stored))


def _grams(targets: Sequence[Target]) -> int:
    """Return the bytes of the Grams of fusion groups, and of one more while it is made
    symmetric."""
    sizes = {t.fusion: 4 * t.experts * t.k**2 for t in targets}
    return sum(sizes.values()) + max(4 * t.k**2 for t in targets)


def _training_state(module: nn.Module, plan: Plan, spec: Prune, compute: torch.dtype) -> float:
    """Return the bytes that training holds beside the model; of learning and fine-tuning the
    larger."""
    blocks: dict[int, list[TrainedMatrix]] = {}
    for row in plan.pruned():
        if isinstance(row.pattern, NMPattern):
            target = row.target
            matrix = TrainedMatrix(target.k * target.n, target.k, target.n, row.pattern)
            blocks.setdefault(target.block, []).append(matrix)
    model = [matrix for block in blocks.values() for matrix in block]
    tokens, states = spec.calibration.batch * spec.calibration.length, [0.0]
    if spec.learn is not None:
        learn = spec.learn
        parts = [model] if learn.scope == "global" else list(blocks.values())
        method: learner.LearnedMethod = LEARNERS.load(learn.name)
        states += [
            memory_budget(
                part,
                lambda pattern: method.bytes_per_weight(learn, pattern),
                tokens,
                compute,
                recomputed=learn.gradient_checkpointing,
            ).total
            for part in parts
        ]
    if spec.finetune is not None:
        teacher = sum(value.numel() for value in module.parameters()) * compute.itemsize
        weight = learner.ADAM_BYTES + learner.MASK_BYTES + 2 * torch.float32.itemsize
        states.append(
            teacher
            + memory_budget(
                model,
                lambda pattern: weight,
                tokens,
                compute,
                recomputed=spec.finetune.gradient_checkpointing,
            ).total
        )
    return max(states)
