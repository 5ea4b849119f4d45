"""Pruning and rounding in one sweep: the grid, the error accounting, and the whole stage with its
scales."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from nmsparse_deploy.cli import app, invoke
from nmsparse_deploy.errors import CheckFailed, UsageError
from nmsparse_deploy.find.methods import group_obs, sparsegpt
from nmsparse_deploy.find.methods.base import Method, prune_matrices, relative_error
from nmsparse_deploy.find.methods.grid import Grid
from nmsparse_deploy.find.methods.hessian import dampen, inverse_factor
from nmsparse_deploy.find.methods.sparsegpt import freezer
from nmsparse_deploy.find.methods.sweep import sweep
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.masks import MaskSet, mask_follows, project
from nmsparse_deploy.models.base import to_rows
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.prove.group_counter import check
from nmsparse_deploy.recipe import Prune, fingerprint, validate
from nmsparse_deploy.registry import METHODS
from tests.find.methods.test_methods import PATTERNS, energy, layer
from tests.find.test_prune import Stop, mask_bytes, spec, stop_at
from tests.fixtures import pico

seeds = st.integers(0, 2**31)
bits = st.sampled_from([4, 8])
widths = st.sampled_from([None, 8, 16])
able = [name for name in METHODS.names() if METHODS[name].quantises]


# --- the grid
# --------------------------------------------------------------------------------------------------------


@given(seeds, bits, widths)
def test_the_grid_is_symmetric_and_spans_the_dense_weight(seed, bits, width):
    weight = layer(seed)[0]
    grid = Grid.of(weight, bits, width)
    codes = grid.codes(weight)
    top = 2 ** (bits - 1) - 1
    assert torch.equal(codes, codes.round()) and int(codes.abs().max()) == top
    assert torch.equal(
        codes.unflatten(1, (-1, width or 32)).abs().amax(-1),
        torch.full(grid.scales.shape, float(top)),
    )
    assert torch.equal(grid.codes(-weight), -codes)
    rounded = codes * grid.scales.repeat_interleave(width or 32, 1)
    assert grid.holds(rounded) and not grid.holds(weight)
    assert float((rounded - weight).abs().max() / grid.scales.max()) <= 0.5 + 1e-5
    assert not grid.holds(2 * rounded)  # beyond the last level


def test_zero_is_a_level_and_has_no_sign():
    weight = torch.tensor([[1.0, -1e-9, 0.0, -0.0], [0.0, 0.0, 0.0, 0.0]])
    grid = Grid.of(weight, 4)
    assert torch.equal(grid.codes(weight)[0], torch.tensor([7.0, 0, 0, 0]))
    assert (
        check(grid.codes(weight), TWO_FOUR).negative_zeros == 0 and grid.scales[1] == 1
    )  # nothing is divided by zero


@given(seeds, bits, st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_the_integers_can_be_read_back_from_what_is_stored(seed, bits, dtype):
    """Storage rounds less than half a level, so scales and stored weights are all that packing
    needs."""
    weight, stats = layer(seed)
    grid = Grid.of(weight, bits)
    pruned = sparsegpt.prune_layer(weight, stats, TWO_FOUR, grid=grid).weight
    assert grid.holds(pruned.to(dtype))
    assert torch.equal(grid.codes(pruned.to(dtype).float()), grid.codes(pruned))


# --- the sweep
# -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", able)
@given(seed=seeds, pattern=st.sampled_from(PATTERNS), bits=bits, width=widths)
def test_kept_weights_are_on_the_grid_and_pruned_ones_are_zero(name, seed, pattern, bits, width):
    """Property 19."""
    weight, stats = layer(seed)
    grid = Grid.of(weight, bits, width)
    result = Method.load(name).prune_layer(weight, stats, pattern, grid=grid)
    assert mask_follows(result.mask, pattern) and result.grid is grid
    assert (result.weight[~result.mask] == 0).all() and check(
        result.weight, pattern
    ).negative_zeros == 0
    levels = result.weight / grid.scales.repeat_interleave(width or 32, 1)
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert float(levels.abs().max()) <= 2 ** (bits - 1) - 1 + 1e-4 and grid.holds(result.weight)


@pytest.mark.parametrize("name", able)
@given(seed=seeds)
def test_sixteen_bits_are_the_unrounded_sweep(name, seed):
    """Property 19. The widest rows have room for what compensation adds, so nothing is clipped."""
    weight, stats = layer(seed)
    fine = Grid(Grid.of(8 * weight, 16).scales, 32, 16)
    plain, joint = (
        Method.load(name).prune_layer(weight, stats, TWO_FOUR, **grid)
        for grid in ({}, {"grid": fine})
    )
    same = (plain.mask == joint.mask).all(1)  # a near tie may fall the other way after a rounding
    assert float(same.float().mean()) > 0.7
    torch.testing.assert_close(
        joint.weight[same], plain.weight[same], rtol=0, atol=0.02 * float(weight.abs().max())
    )


def textbook(weight: torch.Tensor, factor: torch.Tensor, pattern, grid: Grid) -> torch.Tensor:
    """The published loop, one column at a time over whole rows: `q = Q(w · mask)`,
    `e = (w - q)/d`."""
    w, factor = weight.clone().double(), factor.double()
    top = 2 ** (grid.bits - 1) - 1
    for j in range(w.shape[1]):
        if j % pattern.group == 0:
            prices = (
                w[:, j : j + pattern.group] / factor.diagonal()[j : j + pattern.group]
            ).square()
            kept = prices.argsort(dim=1, descending=True)[:, : pattern.keep]
        scale = grid.scales[:, j // grid.width].double()
        q = torch.clamp(torch.round(w[:, j] / scale), -top, top) * scale
        q = torch.where((kept == j % pattern.group).any(1), q, 0.0)
        w[:, j:] -= torch.outer((w[:, j] - q) / factor[j, j], factor[j, j:])
    return w


@given(seeds, st.sampled_from(PATTERNS), widths)
def test_sparsegpt_rounds_as_published(seed, pattern, width):
    """Rounding after the group is frozen gives what rounding column by column gives, but for ties
    of a rounding."""
    weight, stats = layer(seed)
    grid = Grid.of(weight, 8, width)
    got = sparsegpt.prune_layer(weight, stats, pattern, grid=grid).weight.double()
    expected = textbook(weight, inverse_factor(stats.gram, 0.01), pattern, grid)
    assert float(((got - expected).abs().amax(1) < 1e-4).float().mean()) >= 0.75


@given(seeds, st.sampled_from(PATTERNS), bits, widths, st.sampled_from(["sparsegpt", "group-obs"]))
def test_reported_loss_counts_the_rounding(seed, pattern, bits, width, name):
    """Property 4, with rounding: the errors left behind are the damped error of what comes out."""
    weight, stats = layer(seed)
    freeze = freezer(pattern) if name == "sparsegpt" else group_obs.solving(pattern)
    grid = Grid.of(weight, bits, width)
    pruned, _, loss = sweep(weight, inverse_factor(stats.gram, 0.01), pattern, freeze, grid=grid)
    assert loss == pytest.approx(energy(weight - pruned, dampen(stats.gram, 0.01)), rel=1e-3)


@pytest.mark.parametrize("name", able)
@pytest.mark.parametrize("width", [None, 16])
def test_joint_usually_beats_pruning_first_and_rounding_after(name, width):
    """Statistical: lower layer error at 4 bits in most of twenty random correlated layers."""
    method, wins = Method.load(name), 0
    for seed in range(20):
        weight, stats = layer(seed, rows=16, width=64, tokens=256)
        hessian, grid = dampen(stats.gram, 0.01), Grid.of(weight, 4, width)
        after = grid.codes(
            method.prune_layer(weight, stats, TWO_FOUR).weight
        ) * grid.scales.repeat_interleave(grid.width, 1)
        joint = method.prune_layer(weight, stats, TWO_FOUR, grid=grid).weight
        wins += energy(weight - joint, hessian) <= energy(weight - after, hessian)
    assert wins >= 15


# --- the whole stage
# -------------------------------------------------------------------------------------------------


def codes_on_disk(run, axis: int = 1) -> dict[str, torch.Tensor]:
    """Every pruned weight of a run divided by its scales, as rows."""
    with safe_open(run / "scales.safetensors", "pt") as file:
        about, scales = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    state = load_file(run / "model/model.safetensors")
    assert json.loads(about["grid"])["bits"] == 4 and set(scales) == set(
        MaskSet.load(run / "masks.safetensors").masks
    )
    found = {}
    for name, scale in scales.items():
        rows = to_rows(
            state[name.removeprefix("transformer.") if name not in state else name], axis
        ).float()
        assert scale.dtype == torch.float32 and len(scale) == len(rows)
        found[name] = rows / scale.repeat_interleave(rows.shape[1] // scale.shape[1], 1)
    return found


def on_levels(codes: dict[str, torch.Tensor], tolerance: float) -> bool:
    return all(
        float((c - c.round()).abs().max()) <= tolerance and float(c.abs().max()) < 7.1
        for c in codes.values()
    )


def test_end_to_end_and_resume(llama_dir, texts, tmp_path):
    wanted = spec(texts, "sparsegpt", wbits=4, wgroup=32)
    whole = prune(str(llama_dir), wanted, tmp_path / "whole")
    codes = codes_on_disk(whole)
    assert len(codes) == 14 and on_levels(codes, 1e-4)
    with pytest.raises(Stop):
        prune(str(llama_dir), wanted, tmp_path / "broken", progress=stop_at(1))
    resumed = prune(str(llama_dir), wanted, tmp_path / "broken")
    assert mask_bytes(resumed) == mask_bytes(whole)
    for file in ("model/model.safetensors", "scales.safetensors"):
        assert (resumed / file).read_bytes() == (whole / file).read_bytes()


def test_the_command_line_passes_it_on(llama_dir, texts, tmp_path):
    small = [
        "--data",
        str(texts["calibration"]),
        "--samples",
        "6",
        "--length",
        "32",
        "--out",
        str(tmp_path / "run"),
    ]
    assert (
        invoke(lambda: app(["prune", str(llama_dir), *small, "--wbits", "4", "--wgroup", "16"]))
        == 0
    )
    scales = load_file(tmp_path / "run/scales.safetensors")
    assert scales["model.layers.0.mlp.down_proj.weight"].shape == (64, 8)
    assert invoke(lambda: app(["prune", str(llama_dir), *small, "--wbits", "5", "--force"])) == 2
    assert (
        invoke(lambda: app(["prune", str(llama_dir), *small, "--method", "llm-barber", "--force"]))
        == 2
    )


def test_transposed_bf16_weights(texts, tmp_path):
    folder = pico.save(pico.gpt2().to(torch.bfloat16), tmp_path / "gpt2")
    run = prune(str(folder), spec(texts, "group-obs", wbits=4), tmp_path / "run")
    assert on_levels(codes_on_disk(run, axis=0), 7 * 2**-8)


def test_no_scales_without_rounding(llama_dir, texts, tmp_path):
    run = prune(str(llama_dir), spec(texts, "magnitude"), tmp_path / "run")
    assert not (run / "scales.safetensors").exists()


def test_a_method_that_leaves_the_grid_is_caught(llama_dir, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(Grid, "freeze", lambda *_: None)
    with pytest.raises(CheckFailed, match=r"left the 4-bit grid on 'model.layers.0"):
        prune(str(llama_dir), spec(texts, "sparsegpt", wbits=4), tmp_path / "run")


@pytest.mark.parametrize(
    "wrong,sentence",
    [
        (
            {"method": "wanda", "wbits": 4, "refine": [{"name": "finetune"}]},
            "'finetune' would move weights off the 4-bit grid",
        ),
        ({"method": "maskllm", "wbits": 4}, "'maskllm' learned is not rounded to 4 bits"),
        ({"wbits": 4, "wgroup": 6}, "wgroup 6 is not a multiple of 4"),
        ({"wgroup": 16}, "wgroup 16 shares the scales of wbits"),
        ({"wbits": 3}, "wbits"),
    ],
)
def test_what_cannot_be_rounded_is_refused(wrong, sentence):
    with pytest.raises(UsageError) as caught:
        validate(Prune, wrong)
    assert sentence in caught.value.message


@pytest.mark.parametrize("pattern", ["2:4", "unstructured:0.5"])
@pytest.mark.parametrize("steps", [[], ["llm-barber"], ["refit"]], ids=str)
def test_what_does_not_round_while_it_prunes_is_rounded_afterwards_on_its_own_mask(
    llama_dir, texts, tmp_path, steps, pattern
):
    fields = {"refine": [{"name": step} for step in steps], "pattern": pattern}
    plain, rounded = (
        prune(str(llama_dir), spec(texts, "wanda", **fields, **more), tmp_path / name)
        for name, more in (("plain", {}), ("rounded", {"wbits": 4}))
    )
    codes = codes_on_disk(rounded)
    assert len(codes) == 14 and on_levels(codes, 1e-4)
    one, other = (MaskSet.load(run / "masks.safetensors").masks for run in (plain, rounded))
    assert all(
        torch.equal(one[name].unpack(), other[name].unpack()) for name in one if "layers.0." in name
    )
    [report] = rounded.read_json("verify.json")["reports"]
    assert report["ok"]


@pytest.mark.parametrize("seed", range(3))
def test_the_sweep_after_a_mask_loses_less_than_rounding_to_the_nearest(seed):
    weight, stats = layer(seed, rows=24, width=64, tokens=256)
    mask = project((weight.abs() * stats.square_sum.sqrt()), TWO_FOUR)
    kept = torch.where(mask, weight, 0.0)
    grid = Grid.of(kept, 4)
    swept = prune_matrices(Method.load("sparsegpt"), kept, stats, TWO_FOUR, grid, mask)
    nearest = grid.codes(kept) * grid.scales
    assert torch.equal(swept.mask, mask) and grid.holds(swept.weight)
    assert relative_error(kept, swept.weight, stats.gram) < relative_error(
        kept, nearest, stats.gram
    )


def test_a_scale_that_does_not_divide_a_layer_is_refused(llama_dir, texts, tmp_path):
    with pytest.raises(
        UsageError, match=r"wgroup 128 does not divide the 64 inputs of 'model.layers.0.self_attn"
    ):
        prune(str(llama_dir), spec(texts, "sparsegpt", wbits=4, wgroup=128), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_fingerprint_knows_the_grid_and_older_runs_keep_theirs():
    seen = {
        fingerprint("m", validate(Prune, fields))
        for fields in ({}, {"wbits": 4}, {"wbits": 8}, {"wbits": 4, "wgroup": 16})
    }
    assert len(seen) == 4
    assert fingerprint("m", Prune()) == fingerprint(
        "m", validate(Prune, {"wbits": None, "wgroup": None})
    )
    assert fingerprint("m", Prune()) == "0d4c46526d920eab"


def test_plans_with_other_patterns_are_checked_too(texts, llama_dir, tmp_path):
    """A scale must not change inside what one step prunes, and groups must not be asked of methods
    that have none."""
    name = "model.layers.0.mlp.down_proj.weight"
    wanted = validate(
        Prune,
        {
            **spec(texts, "sparsegpt").model_dump(),
            "wbits": 4,
            "wgroup": 4,
            "patterns": {name: "4:8"},
        },
    )
    with pytest.raises(UsageError, match="cuts through what 4:8 prunes"):
        prune(str(llama_dir), wanted, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="'group-obs' works in N:M groups only"):
        validate(Prune, {"method": "group-obs", "patterns": {name: "unstructured:0.5"}})
