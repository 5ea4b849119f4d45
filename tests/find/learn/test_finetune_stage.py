"""Fine-tuning as the last step of a recipe: verified on disk, resumed to the same bits, refused
where it cannot be."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.find.learn.finetune_model import in_fp32
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.prove import verify_checkpoint
from nmsparse_deploy.prove.group_counter import check
from nmsparse_deploy.recipe import Calibration, Prune, fingerprint, validate
from tests.fixtures import pico

WAYS = ["fixed", "sr-ste", "s-ste", "adapters"]


def spec(texts, how="fixed", method="wanda", before=(), prior_samples=0, **changes) -> Prune:
    calibration = {"data": str(texts["calibration"]), "samples": 10, "length": 32, "batch": 2}
    step = {
        "name": "finetune",
        "how": how,
        "steps": 6,
        "warmup": 0,
        "rate": 3e-3,
        "evaluate_every": 2,
        "checkpoint_every": 2,
        "refresh": 1,
        "frozen": 0.34,
        "holdout": 0.2,
        "prior_samples": prior_samples,
    }
    return validate(
        Prune, {"method": method, "calibration": calibration, "refine": [*before, step], **changes}
    )


def files(run):
    return load_file(run / "model" / "model.safetensors"), MaskSet.load(
        run / "masks.safetensors"
    ).masks


@pytest.mark.parametrize("how", WAYS)
def test_it_ends_verified_and_better(how, llama_dir, texts, tmp_path):
    run = prune(str(llama_dir), spec(texts, how, before=[{"name": "bias"}]), tmp_path / "run")
    plain = prune(str(llama_dir), spec(texts).model_copy(update={"refine": ()}), tmp_path / "plain")
    (weights, masks), (before, old) = files(run), files(plain)
    facts = run.read_json("refinements.json")[-1]
    assert facts["name"] == "finetune" and facts["best"] < facts["prior"] and facts["steps"] == 6
    assert verify_checkpoint(run / "model", MaskSet.load(run / "masks.safetensors")).ok
    assert masks.keys() == old.keys() and len(masks) == 14
    moved = [name for name in masks if (masks[name].unpack() != old[name].unpack()).any()]
    assert bool(moved) == (how in ("sr-ste", "s-ste"))
    for name, value in weights.items():
        if name in masks:
            assert (
                check(value, masks[name].pattern).bad == 0
                and check(value, masks[name].pattern).negative_zeros == 0
            )
            assert (value[~masks[name].unpack()] == 0).all() and not torch.equal(
                value, before[name]
            )
            assert masks[name].dense_hash == old[name].dense_hash
        else:
            assert torch.equal(value, before[name]) == (
                value.ndim > 1
            )  # norms and biases learn, embeddings do not
    assert all(row["relative_error"] is None for row in run.read_json("layers.json"))
    assert not (run / "learning").exists()


def test_what_comes_before_may_see_fewer_samples(llama_dir, texts, tmp_path):
    """As if a run had been calibrated on those alone; training reads all of them."""
    asked = spec(texts, prior_samples=4)
    run = prune(str(llama_dir), asked, tmp_path / "run")
    all_of_them = load_file(run / "calibration.safetensors")["ids"]
    assert len(all_of_them) == 10 and asked.walked == 4 and spec(texts).walked == 10
    few = all_of_them[[0, 3, 6, 9]].long()
    save_file({"input_ids": few}, tmp_path / "few.inputs.safetensors")
    update = {
        "calibration": Calibration(
            data=str(tmp_path / "few.inputs.safetensors"), samples=4, batch=2
        ),
        "refine": (),
    }
    plain = prune(str(llama_dir), asked.model_copy(update=update), tmp_path / "plain")
    whole = prune(str(llama_dir), spec(texts).model_copy(update={"refine": ()}), tmp_path / "whole")
    mine, same, other = (files(one)[1] for one in (run, plain, whole))
    assert all(torch.equal(mine[name].unpack(), same[name].unpack()) for name in mine)
    assert not all(torch.equal(mine[name].unpack(), other[name].unpack()) for name in mine)
    assert (
        fingerprint("m", spec(texts))
        == fingerprint("m", spec(texts, prior_samples=0))
        != fingerprint("m", asked)
    )


def test_after_a_learned_mask_and_on_a_conv1d_in_bf16(texts, tmp_path):
    model = pico.save(pico.gpt2().bfloat16(), tmp_path / "gpt2")
    run = prune(
        str(model),
        spec(
            texts,
            "sr-ste",
            method="proxsparse",
            learn={"objective": "block", "steps": 3, "priors": ["magnitude"], "holdout": 0.2},
        ),
        tmp_path / "run",
    )
    weights = load_file(run / "model" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert run.read_json("verify.json")["reports"]
    assert run.read_json("refinements.json")[-1]["best_step"] > 0


def test_an_interrupted_run_ends_with_the_same_bits(llama_dir, texts, tmp_path):
    class Killed(Exception):
        pass

    def progress(said: str, done: int = 0, total: int = 0) -> None:
        if said.startswith("fine-tuning") and done == 4:
            raise Killed

    whole = prune(str(llama_dir), spec(texts, "sr-ste"), tmp_path / "whole")
    with pytest.raises(Killed):
        prune(str(llama_dir), spec(texts, "sr-ste"), tmp_path / "run", progress=progress)
    assert (tmp_path / "run" / "learning" / "finetune.safetensors").is_file()
    again = prune(str(llama_dir), spec(texts, "sr-ste"), tmp_path / "run")
    for name in ("masks.safetensors", "model/model.safetensors"):
        assert (again / name).read_bytes() == (whole / name).read_bytes()


def test_an_unstructured_mask_stays(llama_dir, texts, tmp_path):
    run = prune(str(llama_dir), spec(texts, pattern="unstructured:0.5"), tmp_path / "run")
    weights, masks = files(run)
    assert all((weights[name][~mask.unpack()] == 0).all() for name, mask in masks.items())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"refine": [{"name": "finetune"}, {"name": "bias"}]}, "after all other refinements"),
        ({"refine": [{"name": "finetune"}, {"name": "finetune"}]}, "after all other refinements"),
        (
            {"refine": [{"name": "finetune", "how": "sr-ste"}], "pattern": "unstructured:0.5"},
            "within groups",
        ),
        ({"refine": [{"name": "finetune", "how": "s-ste"}], "permute": True}, "permuting moves"),
        ({"refine": [{"name": "finetune"}], "wbits": 4}, "would move weights off"),
        ({"refine": [{"name": "finetune", "frozen": 1.0}]}, "less than 1"),
        (
            {"refine": [{"name": "finetune", "batch": 3}], "calibration": {"batch": 2}},
            "not a multiple",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(changes, reason):
    with pytest.raises(UsageError, match=reason):
        validate(Prune, {"method": "wanda" if "wbits" not in changes else "sparsegpt", **changes})


def test_too_little_data_is_said(llama_dir, texts, tmp_path):
    calibration = {"data": str(texts["calibration"]), "samples": 2, "length": 32, "batch": 2}
    with pytest.raises(UsageError, match="too little data"):
        prune(str(llama_dir), spec(texts, calibration=calibration), tmp_path / "run")


def test_dtypes_come_back():
    module = pico.llama().bfloat16()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with in_fp32(module):
        assert {value.dtype for value in module.parameters()} == {torch.float32}
    assert all(
        torch.equal(value, before[name]) and value.dtype == before[name].dtype
        for name, value in module.state_dict().items()
    )
