"""What learning and fine-tuning would cost is counted: against the operations that PyTorch counts,
and the memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nmsparse_deploy.find.cost import Rates, estimate
from nmsparse_deploy.find.plan.make_plan import make_plan
from nmsparse_deploy.models import load
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.recipe import Prune, validate

SLOW = Rates(torch.float32, compute=1e9, single=1e9, double=1e9)
CALIBRATION = {"samples": 40, "length": 16, "batch": 4}


@pytest.fixture(scope="module")
def loaded(llama_dir):
    return load(str(llama_dir))


def cost(loaded, **section):
    plan = make_plan(loaded.discover(), TWO_FOUR)
    return estimate(loaded, plan, validate(Prune, {"calibration": CALIBRATION, **section}), SLOW)


def forward(module) -> float:
    """Operations of the matrix products of a token, without attention's own."""
    ids = torch.zeros(1, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(input_ids=ids, use_cache=False)
    return (
        sum(
            count
            for name, count in counter.get_flop_counts()["Global"].items()
            if "mm" in str(name) and "bmm" not in str(name)
        )
        / 16
    )


@pytest.mark.parametrize(
    ("section", "passes"),
    [
        ({"method": "maskllm", "learn": {"objective": "global", "steps": 30}}, 4),
        (
            {"method": "proxsparse", "learn": {"objective": "global", "steps": 30, "distill": 0.0}},
            3,
        ),
        ({"method": "maskpro", "learn": {"objective": "global", "steps": 30, "distill": 0.0}}, 2),
        ({"method": "magnitude", "refine": [{"name": "finetune", "steps": 30}]}, 4),
    ],
)
def test_passes_are_counted(section, passes, loaded):
    settings = {"evaluate_every": 10, "holdout": 0.1, "batch": 8}
    for place in (section.get("learn"), *section.get("refine", [])):
        if place:
            place.update(settings)
    tokens, judged = 30 * 8 * 16, 4 * 0.1 * 40 * 16
    wanted = forward(loaded.module) * (passes * tokens + judged) / 1e9
    assert cost(loaded, **section).train_gflop == pytest.approx(wanted, rel=1e-6)


def test_blocks_are_cheaper_than_the_model(loaded):
    block, whole = (
        cost(loaded, method="maskllm", learn={"objective": scope, "steps": 30})
        for scope in ("block", "global")
    )
    assert 0 < block.train_gflop < whole.train_gflop and block.memory_mb < whole.memory_mb
    assert (
        block.seconds > cost(loaded, method="wanda").seconds
        and cost(loaded, method="wanda").train_gflop == 0
    )


def test_memory_follows_the_form(loaded, monkeypatch):
    monkeypatch.setattr(
        "nmsparse_deploy.find.footprint.used_memory", lambda: 100_000_000
    )  # of this process, which grows
    sizes = [
        cost(loaded, method="maskllm", learn={"objective": "global", **form}).memory_mb
        for form in ({}, {"form": "compact"}, {"form": "compact", "moments": 8})
    ]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[2]
    weights = sum(
        row.target.k * row.target.n for row in make_plan(loaded.discover(), TWO_FOUR).pruned()
    )
    assert sizes[0] - sizes[1] == pytest.approx(8 * weights / 1e6, rel=1e-3)
