"""Minus zeros in kept places, from other pruning tools or from rounding, are baked as +0.0 and
counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from nmsparse_deploy.find.import_masks import import_result
from nmsparse_deploy.find.learn import finetune_model
from nmsparse_deploy.find.methods.base import LayerResult
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.find.refine.base import PrunedLayer
from nmsparse_deploy.masks import MaskSet, normalise_zeros
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.prove import verify_checkpoint
from nmsparse_deploy.prove.group_counter import check
from nmsparse_deploy.recipe import Prune, validate
from nmsparse_deploy.registry import REFINEMENTS
from tests.fixtures import pico

LAYER = "model.layers.0.self_attn.q_proj"
UNTOUCHED = (f"{LAYER}.bias", "model.layers.0.input_layernorm.weight", "lm_head.weight")
DTYPES = (torch.float32, torch.bfloat16)


def negative_zeros(values: torch.Tensor) -> torch.Tensor:
    return (values == 0) & torch.signbit(values)


@pytest.fixture(scope="module", params=DTYPES, ids=["fp32", "bf16"])
def dense(request, tmp_path_factory):
    """A model with -0.0 in whole groups and in groups that have two other values, in a norm, a bias
    and the head."""
    module = pico.llama(attention_bias=True).to(request.param)
    with torch.no_grad():
        weight = module.get_parameter(f"{LAYER}.weight")
        weight[:8, :4] = -0.0
        weight[8:16, 1:3] = -0.0
        for name in UNTOUCHED:
            module.get_parameter(name).view(-1)[:3] = -0.0
    return pico.save(module, tmp_path_factory.mktemp("dense"))


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def spec(texts, method="magnitude", refine=()):
    calibration = {"data": str(texts["calibration"]), "samples": 10, "length": 32, "batch": 2}
    return validate(Prune, {"method": method, "calibration": calibration, "refine": list(refine)})


def agrees(run, dense, kept_negative=None):
    """The run verifies, holds no minus zero in its pruned weights, and says how many there were in
    each layer."""
    masks = MaskSet.load(run / "masks.safetensors")
    before, after = weights_of(dense), weights_of(run / "model")
    assert verify_checkpoint(run / "model", masks).ok
    assert all(
        check(after[name], mask.pattern, mask.axis).negative_zeros == 0
        for name, mask in masks.masks.items()
    )
    for name in UNTOUCHED:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8))
    counts = {row["name"]: row["negative_zeros_normalised"] for row in run.read_json("layers.json")}
    assert run.manifest().stages["prune"].negative_zeros_normalised == sum(counts.values())
    if kept_negative is None:
        kept_negative = {
            name: int((negative_zeros(before[name]) & mask.unpack()).sum())
            for name, mask in masks.masks.items()
        }
    assert counts == kept_negative and sum(counts.values()) > 0
    return masks


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_minus_zeros_of_the_dense_weight_are_normalised_where_they_are_kept(
    method, dense, texts, tmp_path
):
    masks = agrees(prune(str(dense), spec(texts, method), tmp_path / "run"), dense)
    kept = masks.masks[f"{LAYER}.weight"].unpack()
    assert kept[:8, :4].sum() == 16 and not kept[8:16, 1:3].any()  # both kinds of place were there
    masks.check_base(weights_of(dense))  # the identity of the dense weight is that of its own bits


def test_the_method_that_sweeps_ends_verified(dense, texts, tmp_path):
    run = prune(str(dense), spec(texts, "sparsegpt"), tmp_path / "run")
    assert verify_checkpoint(run / "model", MaskSet.load(run / "masks.safetensors")).ok


def _shrink(layer: PrunedLayer, step) -> LayerResult:
    """A refinement that leaves -0.0 in the first kept column, and in the second what bf16 rounds to
    it."""
    weight = layer.weight.clone()
    weight[:, 0], weight[:, 1] = -0.0, -1e-45
    return LayerResult(layer.result.mask, weight)


def test_minus_zeros_of_a_refinement_are_normalised(dense, texts, tmp_path, monkeypatch):
    monkeypatch.setitem(
        REFINEMENTS.own,
        "refit",
        replace(REFINEMENTS.own["refit"], code=f"{__name__}:_shrink", needs="none"),
    )
    run = prune(str(dense), spec(texts, refine=[{"name": "refit"}]), tmp_path / "run")
    masks = MaskSet.load(run / "masks.safetensors").masks
    rounded = 2 if weights_of(dense)[UNTOUCHED[0]].dtype == torch.bfloat16 else 1
    extra = {name: int(mask.unpack()[:, :rounded].sum()) for name, mask in masks.items()}
    rest = negative_zeros(weights_of(dense)[f"{LAYER}.weight"])
    rest[:, :2] = False
    extra[f"{LAYER}.weight"] += int((rest & masks[f"{LAYER}.weight"].unpack()).sum())
    agrees(run, dense, extra)


def test_minus_zeros_of_fine_tuning_are_normalised(llama_dir, texts, tmp_path, monkeypatch):
    honest = finetune_model.refine_model

    def refine_model(checkpoints, loaded, plan, *rest):
        rows, facts = honest(checkpoints, loaded, plan, *rest)
        for name, kept in rows.items():
            with torch.no_grad():
                loaded.module.get_parameter(name)[0, kept[0]] = -0.0
        return rows, facts

    monkeypatch.setattr(finetune_model, "refine_model", refine_model)
    step = {"name": "finetune", "steps": 2, "warmup": 0, "evaluate_every": 1, "holdout": 0.2}
    run = prune(str(llama_dir), spec(texts, refine=[step]), tmp_path / "run")
    assert verify_checkpoint(run / "model", MaskSet.load(run / "masks.safetensors")).ok
    rows = run.read_json("layers.json")
    assert all(row["negative_zeros_normalised"] == row["shape"][1] // 2 for row in rows)


@pytest.mark.parametrize("source", ["masks", "sparse", "own zeros"])
def test_imported_results_are_normalised(source, dense, texts, tmp_path):
    """`torch.nn.utils.prune` multiplies by the mask, which leaves -0.0 for every negative weight it
    prunes."""
    found = MaskSet.load(
        prune(str(dense), spec(texts), tmp_path / "found") / "masks.safetensors"
    ).masks
    bits = {name: mask.unpack() for name, mask in found.items()}
    options = {}
    if source == "masks":
        save_file(
            {name: mask.to(torch.uint8) for name, mask in bits.items()},
            tmp_path / "masks.safetensors",
        )
        options, base = {"masks": tmp_path / "masks.safetensors"}, dense
    else:
        module = pico.llama(attention_bias=True).to(weights_of(dense)[UNTOUCHED[0]].dtype)
        module.load_state_dict(weights_of(dense))
        with torch.no_grad():
            for name, mask in bits.items():
                weight = module.get_parameter(name)
                weight.copy_(weight * mask)
        base = pico.save(module, tmp_path / "sparse")
        options = {"sparse": str(base)} if source == "sparse" else {}
    run = import_result(
        str(base if source == "own zeros" else dense), out=tmp_path / "run", **options
    ).run
    agrees(run, base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_minus_zeros_change(dtype):
    weight = torch.tensor(
        [0.0, -0.0, 1.0, -1.0, -0.0, torch.finfo(dtype).smallest_normal], dtype=dtype
    )
    wanted = weight.abs().where(weight == 0, weight)
    assert normalise_zeros(weight) == 2 and normalise_zeros(weight) == 0
    assert torch.equal(weight, wanted) and not torch.signbit(weight[[0, 1, 4]]).any()
    assert check(weight[:4], TWO_FOUR).negative_zeros == 0
