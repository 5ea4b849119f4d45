"""Every learned method in the prune stage: both objectives, exact masks on untouched weights, other
patterns."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.pattern import NMPattern
from nmsparse_deploy.prove.group_counter import check
from nmsparse_deploy.recipe import Prune, validate
from nmsparse_deploy.registry import LEARNERS
from tests.fixtures import pico

SPEED = {
    "maskllm": {"step_size": 20.0},
    "maskpro": {"step_size": 1.0},
    "proxsparse": {"reach": 5.0},
}
"""What makes masks move within a few steps."""


def spec(texts, method, pattern, objective) -> Prune:
    calibration = {"data": str(texts["calibration"]), "samples": 8, "length": 32, "batch": 2}
    learn = {
        "objective": objective,
        "steps": 6,
        "evaluate_every": 1,
        "priors": ["magnitude"],
        "holdout": 0.25,
        **SPEED[method],
    }
    return validate(
        Prune, {"method": method, "pattern": pattern, "calibration": calibration, "learn": learn}
    )


def test_every_learned_method_is_tried_here():
    assert set(SPEED) == set(LEARNERS.names())


@pytest.mark.parametrize("objective", ["block", "global"])
@pytest.mark.parametrize(
    ("name", "pattern"),
    [("maskpro", "2:4"), ("proxsparse", "2:4"), ("maskpro", "4:8"), ("proxsparse", "1:4")],
)
def test_masks_on_untouched_weights(name, pattern, objective, llama_dir, texts, tmp_path):
    run = prune(str(llama_dir), spec(texts, name, pattern, objective), tmp_path / "run")
    masks = MaskSet.load(run / "masks.safetensors").masks
    weights, dense = (
        load_file(run / "model" / "model.safetensors"),
        load_file(llama_dir / "model.safetensors"),
    )
    assert len(masks) == 14
    for key, value in weights.items():
        if key in masks:
            kept = masks[key].unpack().sum(-1)
            assert (kept == value.shape[1] * NMPattern.parse(pattern).density).all()
            assert (
                check(value, NMPattern.parse(pattern)).bad == 0
                and (value[masks[key].unpack()] == dense[key][masks[key].unpack()]).all()
            )
        else:
            assert (value == dense[key]).all()
    learned = run.manifest().stages["prune"].learned
    assert learned.best <= learned.prior


def test_three_fused_projections_in_a_conv1d(texts, tmp_path):
    model = pico.save(pico.gpt2(), tmp_path / "gpt2")
    run = prune(str(model), spec(texts, "proxsparse", "2:4", "block"), tmp_path / "run")
    masks = MaskSet.load(run / "masks.safetensors").masks
    weights = load_file(run / "model" / "model.safetensors")
    for key, mask in masks.items():
        name = key if key in weights else key.removeprefix("transformer.")
        assert mask.axis == 0 and check(weights[name], NMPattern(2, 4), axis=0).bad == 0
