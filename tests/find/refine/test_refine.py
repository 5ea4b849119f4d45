"""Refit on a fixed mask: the witness is the exact optimum, row by row."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from nmsparse_deploy.find.calibration.layer_stats import LayerStats
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.find.refine.refit import refit
from nmsparse_deploy.masks import MaskSet, project
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.recipe import Prune, validate
from tests.find.test_prune import Stop, mask_bytes, spec, stop_at

seeds = st.integers(0, 2**31)


def problem(seed: int, rows: int = 6, width: int = 16, tokens: int = 64):
    """A weight, a mask, dense inputs, and sparse inputs that drifted from them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    dense = torch.randn(tokens, width, generator=generator) @ torch.randn(
        width, width, generator=generator
    )
    drifted = dense + 0.3 * torch.randn(tokens, width, generator=generator)
    gram = drifted.T @ drifted
    stats = LayerStats(tokens, gram.diagonal().clone(), gram, dense.T @ drifted)
    return weight, project(weight.abs(), TWO_FOUR), stats, dense, drifted


def exact(weight, mask, stats, blend, damping):
    """The normal equations of every row, solved on its support in fp64."""
    scale = stats.gram.double().diagonal().sqrt()
    outer = scale.outer(scale)
    hessian = stats.gram.double() / outer
    target = (1 - blend) * hessian + blend * stats.cross.double() / outer
    ridge = damping * torch.eye(len(scale), dtype=torch.float64)
    wanted = (weight.double() * scale) @ (target + ridge)
    best = torch.zeros_like(weight, dtype=torch.float64)
    for row, kept in enumerate(mask):
        keep = kept.nonzero().flatten()
        best[row, keep] = (
            torch.linalg.solve((hessian + ridge)[keep][:, keep], wanted[row, keep]) / scale[keep]
        )
    return best


@given(seeds, st.sampled_from([0.0, 0.25, 1.0]))
def test_enough_steps_reach_the_optimum(seed, blend):
    """Property 17."""
    weight, mask, stats, *_ = problem(seed)
    got = refit(weight, weight, mask, stats, blend=blend, residual=0.0, steps=60, damping=0.01)
    assert (got[~mask] == 0).all()
    torch.testing.assert_close(
        got.double(), exact(weight, mask, stats, blend, 0.01), rtol=2e-2, atol=2e-2
    )


@given(seeds)
def test_error_falls_step_by_step(seed):
    """Monotone in the quadratic that it minimises, and never worse than the masked weights it
    starts from."""
    weight, mask, stats, *_ = problem(seed)
    scale = stats.gram.diagonal().sqrt()
    hessian = (stats.gram / scale.outer(scale) + 0.01 * torch.eye(16)).double()

    def loss(w):
        d = ((weight - w) * scale).double()
        return float(((d @ hessian) * d).sum())

    losses = [loss(torch.where(mask, weight, 0))]
    losses += [
        loss(refit(weight, weight, mask, stats, blend=0.0, residual=0.0, steps=n, damping=0.01))
        for n in (1, 2, 4, 8, 16)
    ]
    assert all(after <= before * (1 + 1e-4) for before, after in pairwise(losses))


@given(seeds)
@example(
    506153
)  # rows were solved to the last bit here, and the ratio of two underflowing norms was not a number
def test_full_blend_is_the_best_answer_to_the_dense_stream(seed):
    """Property 13: no perturbation on the support comes closer to `W X_d` (up to the ridge)."""
    weight, mask, stats, dense, drifted = problem(seed)
    best = refit(weight, weight, mask, stats, blend=1.0, residual=0.0, steps=200, damping=1e-6)

    def error(w):
        return float((dense @ weight.T - drifted @ w.T).double().square().sum())

    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        nudge = torch.where(mask, torch.randn(weight.shape, generator=generator), 0.0)
        assert error(best) <= error(best + 0.05 * nudge) * (1 + 1e-4)


@pytest.mark.parametrize("exponent", [-90, -60, -41, -20, 0, 40, 61])
@pytest.mark.parametrize("seed", [0, 1476])
def test_weights_of_any_size_are_refitted_to_the_same_bits(seed, exponent):
    """Squares of tiny weights are no normal numbers, and a step too far turned them into NaN."""
    weight, mask, stats, *_ = problem(seed)
    settings = {"blend": 0.25, "residual": 0.0, "steps": 600, "damping": 0.01}
    small, power = weight.clone(), 2.0**exponent
    small[1:] *= power  # the sizes of other rows change nothing
    fitted = refit(weight, weight, mask, stats, **settings)
    scaled = refit(small, small, mask, stats, **settings)
    assert torch.equal(scaled[0], fitted[0]) and torch.equal(scaled[1:], fitted[1:] * power)
    assert not refit(weight * 1e-38, weight * 1e-38, mask, stats, **settings).isnan().any()


@given(seeds, st.sampled_from([1e-18, 1.0, 1e12]))
def test_solved_rows_stay_solved(seed, size):
    """Hundreds of steps past the optimum, at any scale of the weights, change nothing and never
    leave the numbers."""
    weight, mask, stats, *_ = problem(seed)
    few, many = (
        refit(
            weight * size,
            weight * size,
            mask,
            stats,
            blend=0.25,
            residual=0.0,
            steps=n,
            damping=0.01,
        )
        for n in (60, 600)
    )
    assert torch.isfinite(many).all()
    torch.testing.assert_close(many / size, few / size, rtol=2e-2, atol=2e-2)


@given(seeds)
def test_residual_share_is_part_of_the_target(seed):
    """Full shares answer `W X_d + R_d - R_s`: no perturbation on the support comes closer (up to
    the ridge)."""
    weight, mask, stats, dense, drifted = problem(seed)
    generator = torch.Generator().manual_seed(seed)
    away = 0.5 * torch.randn(len(dense), len(weight), generator=generator)
    stats = replace(stats, drift=away.T @ drifted)
    best = refit(weight, weight, mask, stats, blend=1.0, residual=1.0, steps=200, damping=1e-6)

    def error(w):
        return float((dense @ weight.T + away - drifted @ w.T).double().square().sum())

    for _ in range(5):
        nudge = torch.where(mask, torch.randn(weight.shape, generator=generator), 0.0)
        assert error(best) <= error(best + 0.05 * nudge) * (1 + 1e-4)


def test_dead_columns_and_empty_rows():
    weight, mask, stats, *_ = problem(0)
    stats.gram[3] = stats.gram[:, 3] = stats.cross[3] = stats.cross[:, 3] = 0
    weight[2] = 0
    got = refit(weight, weight, mask, stats, blend=0.25, residual=0.0, steps=20, damping=0.01)
    assert torch.isfinite(got).all() and (got[2] == 0).all()


@pytest.fixture
def refined(texts) -> Prune:
    return validate(
        Prune,
        {**spec(texts, "group-obs").model_dump(), "refine": [{"name": "refit", "blend": 0.25}]},
    )


def test_end_to_end_and_resume(refined, llama_dir, texts, tmp_path):
    """The mask is that of the first block's method, errors fall where the stream is the dense one,
    bits resume."""
    plain = prune(str(llama_dir), spec(texts, "group-obs"), tmp_path / "plain")
    whole = prune(str(llama_dir), refined, tmp_path / "whole")
    first = "model.layers.0.self_attn.q_proj.weight"
    masks = [
        MaskSet.load(run / "masks.safetensors").masks[first].unpack() for run in (plain, whole)
    ]
    assert torch.equal(*masks)
    errors = [
        {r["name"]: r["relative_error"] for r in run.read_json("layers.json")}
        for run in (plain, whole)
    ]
    assert errors[1][first] < errors[0][first]
    with pytest.raises(Stop):
        prune(str(llama_dir), refined, tmp_path / "broken", progress=stop_at(1))
    resumed = prune(str(llama_dir), refined, tmp_path / "broken")
    assert mask_bytes(resumed) == mask_bytes(whole)
    assert (resumed / "model/model.safetensors").read_bytes() == (
        whole / "model/model.safetensors"
    ).read_bytes()


def test_sequential_and_resume(texts, llama_dir, tmp_path):
    """Statistics after the first layers of a block differ, masks of the first do not, and a resumed
    run has the same bits."""
    steps = [{"name": "refit", "blend": 0.5, "residual": 0.5}]
    plain, recipe = (
        validate(
            Prune, {**spec(texts, "group-obs").model_dump(), "refine": steps, "sequential": flag}
        )
        for flag in (False, True)
    )
    runs = [
        prune(str(llama_dir), wanted, tmp_path / name)
        for name, wanted in (("plain", plain), ("whole", recipe))
    ]
    masks = [MaskSet.load(run / "masks.safetensors").masks for run in runs]
    same = {
        name for name in masks[0] if torch.equal(masks[0][name].unpack(), masks[1][name].unpack())
    }
    assert (
        "model.layers.0.self_attn.q_proj.weight" in same
        and "model.layers.0.mlp.down_proj.weight" not in same
    )
    with pytest.raises(Stop):
        prune(str(llama_dir), recipe, tmp_path / "broken", progress=stop_at(1))
    resumed = prune(str(llama_dir), recipe, tmp_path / "broken")
    assert mask_bytes(resumed) == mask_bytes(runs[1])


def test_refinement_of_a_method_that_needs_no_data(texts, llama_dir, tmp_path):
    """Magnitude plus refit reads the calibration text that magnitude alone would not."""
    run = prune(
        str(llama_dir),
        validate(Prune, {**spec(texts, "magnitude").model_dump(), "refine": [{"name": "refit"}]}),
        tmp_path / "r",
    )
    assert (run / "calibration.safetensors").is_file()
