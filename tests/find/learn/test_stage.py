"""Learned masks in the prune stage: both objectives end verified, resume to the same bits, and say
when nothing moved."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.find.calibration.block_walk import BlockWalk
from nmsparse_deploy.find.learn import loop
from nmsparse_deploy.find.learn.memory_budget import MemoryBudget
from nmsparse_deploy.find.learn.session import sentence, summary
from nmsparse_deploy.find.learn.whole_model import one_shot, recomputed
from nmsparse_deploy.find.methods.base import Method
from nmsparse_deploy.find.plan.make_plan import make_plan
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.models.discovery import discover
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.prove.group_counter import check
from nmsparse_deploy.recipe import Prune, Recipe, fingerprint, validate
from tests import ROOT
from tests.fixtures import pico

QUICK = {
    "steps": 6,
    "evaluate_every": 2,
    "checkpoint_every": 2,
    "step_size": 20.0,
    "priors": ["magnitude", "wanda"],
}


def spec(texts, objective="block", learn=None, **changes) -> Prune:
    calibration = {"data": str(texts["calibration"]), "samples": 12, "length": 32, "batch": 2}
    return validate(
        Prune,
        {
            "method": "maskllm",
            "calibration": calibration,
            "learn": {"objective": objective, **QUICK, **(learn or {})},
            **changes,
        },
    )


class Killed(Exception):
    pass


def kill_at(text: str):
    def progress(said: str, done: int = 0, total: int = 0) -> None:
        if text in said:
            raise Killed

    return progress


@pytest.mark.parametrize("objective", ["block", "global"])
def test_a_learned_run_is_a_run_like_any_other(objective, llama_dir, texts, tmp_path):
    run = prune(str(llama_dir), spec(texts, objective), tmp_path / "run")
    masks = MaskSet.load(run / "masks.safetensors")
    weights, dense = (
        load_file(folder / "model.safetensors") for folder in (run / "model", llama_dir)
    )
    masks.check_base(dense)
    assert (
        len(masks.masks) == 14 and not (run / "learning").exists() and not (run / "blocks").exists()
    )
    for name, value in weights.items():
        if name in masks.masks:
            assert check(value, TWO_FOUR).bad == 0 and torch.equal(
                value, masks.masks[name].apply(dense[name])
            )
        else:
            assert torch.equal(value, dense[name])
    learned = run.manifest().stages["prune"].learned
    assert learned.objective == objective and learned.parts == (2 if objective == "block" else 1)
    assert learned.best <= learned.prior
    told = run.read_json("refinements.json")
    assert all(row["priors"].keys() == {"magnitude", "wanda"} for row in told)
    assert all(
        row["prior"] == min(row["priors"].values()) for row in told
    )  # the first judgement is the one-shot result
    assert all(row["memory"]["status"] == "predicted" and row["steps"] == 6 for row in told)


@pytest.mark.parametrize(
    "objective,where",
    [
        ("block", "block 0: loss"),
        ("block", "2:4, block 1"),
        ("global", "prior wanda"),
        ("global", "2:4: loss"),
        ("global", "2:4, block 1"),
    ],
)
def test_resume_gives_the_same_bits(objective, where, llama_dir, texts, tmp_path):
    recipe = spec(texts, objective)
    whole = prune(str(llama_dir), recipe, tmp_path / "whole")
    with pytest.raises(Killed):
        prune(str(llama_dir), recipe, tmp_path / "broken", progress=kill_at(where))
    resumed = prune(str(llama_dir), recipe, tmp_path / "broken")
    assert (resumed / "masks.safetensors").read_bytes() == (
        whole / "masks.safetensors"
    ).read_bytes()
    assert (resumed / "model/model.safetensors").read_bytes() == (
        whole / "model/model.safetensors"
    ).read_bytes()
    one, two = (run.read_json("refinements.json") for run in (whole, resumed))
    assert [row["history"] for row in one] == [row["history"] for row in two]


def test_tied_heads_and_conv1d(texts, tmp_path):
    folder = pico.save(pico.llama(tie_word_embeddings=True), tmp_path / "tied")
    run = prune(str(folder), spec(texts, "global"), tmp_path / "run")
    weights, dense = (load_file(place / "model.safetensors") for place in (run / "model", folder))
    assert torch.equal(weights["model.embed_tokens.weight"], dense["model.embed_tokens.weight"])
    gpt2 = prune(str(pico.save(pico.gpt2(), tmp_path / "gpt2")), spec(texts), tmp_path / "run2")
    masks = MaskSet.load(gpt2 / "masks.safetensors").masks
    assert {mask.axis for mask in masks.values()} == {0} and len(masks) == 8


@pytest.mark.parametrize("pattern", ["1:4", "4:8", "2:8"])
def test_other_patterns(pattern, llama_dir, texts, tmp_path):
    run = prune(
        str(llama_dir), spec(texts, pattern=pattern, include=["*layers.0.mlp*"]), tmp_path / "run"
    )
    assert {
        str(mask.pattern) for mask in MaskSet.load(run / "masks.safetensors").masks.values()
    } == {pattern}


@pytest.mark.parametrize("objective", ["block", "global"])
def test_refinements_may_follow(objective, llama_dir, texts, tmp_path):
    run = prune(
        str(llama_dir), spec(texts, objective, refine=[{"name": "refit"}]), tmp_path / "run"
    )
    masks = MaskSet.load(run / "masks.safetensors").masks
    weights, dense = (
        load_file(place / "model.safetensors") for place in (run / "model", llama_dir)
    )
    name = "model.layers.1.mlp.up_proj.weight"
    assert (
        not torch.equal(weights[name], masks[name].apply(dense[name]))
        and check(weights[name], TWO_FOUR).bad == 0
    )


def test_a_rate_of_nothing_hands_back_the_prior_and_says_so(llama_dir, texts, tmp_path):
    recipe = spec(texts, learn={"step_size": 1e-9, "priors": ["magnitude"]})
    run = prune(str(llama_dir), recipe, tmp_path / "run")
    learned = run.manifest().stages["prune"].learned
    assert learned.unmoved == 2 and learned.changed == 0
    assert "no learned mask beat" in sentence(learned)
    other = validate(Prune, {**spec(texts).model_dump(exclude={"learn"}), "method": "magnitude"})
    one_shot_run = prune(str(llama_dir), other, tmp_path / "one")
    masks = [MaskSet.load(r / "masks.safetensors").masks for r in (run, one_shot_run)]
    assert all((masks[0][name].bits == masks[1][name].bits).all() for name in masks[1])


def test_one_shot_priors_are_those_of_the_method(texts):
    """Without touching the model: the walk feeds every block what the pruned ones before it make of
    the data."""
    module = pico.llama()
    before = {name: value.clone() for name, value in module.named_parameters()}
    inputs = {
        "input_ids": torch.randint(
            pico.VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0)
        ),
        "use_cache": False,
    }
    plan = make_plan(discover(module, inputs), TWO_FOUR)
    recipe = validate(Prune, {"method": "wanda"})
    found = one_shot(module, plan, recipe, "wanda", [inputs], torch.float32, lambda *_: None)
    assert all(torch.equal(value, before[name]) for name, value in module.named_parameters())
    walk = BlockWalk(module, plan.blocks, [inputs])
    with torch.no_grad():
        for name, mask in found.items():
            if ".0." in name:
                module.get_parameter(name).mul_(mask)
    walk.advance(0)
    stats = walk.statistics(1, [row.target for row in plan.pruned(1)], "norms")
    [row] = [row for row in plan.pruned(1) if row.target.name.endswith("up_proj.weight")]

    wanted = (
        Method.load("wanda")
        .prune_layer(before[row.target.name], stats[row.target.fusion], TWO_FOUR)
        .mask
    )
    assert torch.equal(found[row.target.name], wanted)


def test_recomputed_blocks_give_the_same_gradient():
    module = pico.llama()
    ids = torch.randint(pico.VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    module.model.layers[0].mlp.up_proj.weight.requires_grad_()

    def gradient():
        module.zero_grad()
        module(input_ids=ids, use_cache=False).logits.square().sum().backward()
        return module.model.layers[0].mlp.up_proj.weight.grad.clone()

    plain = gradient()
    with recomputed(module, ["model.layers.0", "model.layers.1"]):
        assert torch.equal(gradient(), plain)
    assert "forward" not in vars(module.model.layers[0])


def test_gradient_checkpointing_does_not_change_the_result(llama_dir, texts, tmp_path):
    """The noise of the recomputed pass is that of the first."""
    plain = prune(str(llama_dir), spec(texts, "global"), tmp_path / "plain")
    saved = prune(
        str(llama_dir), spec(texts, "global", {"gradient_checkpointing": True}), tmp_path / "saved"
    )
    histories = [run.read_json("refinements.json")[0]["history"] for run in (plain, saved)]
    assert histories[0] == histories[1]


def test_what_cannot_fit_is_refused_before_the_first_step(llama_dir, texts, tmp_path, monkeypatch):
    from nmsparse_deploy.find.learn import memory_budget as budget

    monkeypatch.setattr(budget, "free_memory", lambda device: 1000)
    with pytest.raises(NmsparseError, match=r"Learning needs about .* GB more") as caught:
        prune(str(llama_dir), spec(texts, "global"), tmp_path / "run")
    assert "form: compact takes" in caught.value.hint and "moments: 8 takes" in caught.value.hint
    MemoryBudget(1.0, 1.0, 1.0).check(torch.device("cpu"), "")


def test_six_logits_with_adam_take_24_bytes_per_weight():
    from nmsparse_deploy.find.methods.maskllm import bytes_per_weight
    from nmsparse_deploy.pattern import NMPattern
    from tests.fixtures.toy_learner import settings

    assert bytes_per_weight(settings(), TWO_FOUR) == 24 + 1
    assert (
        bytes_per_weight(settings(form="scores"), TWO_FOUR)
        == bytes_per_weight(settings(), NMPattern(4, 8))
        == 16 + 1
    )


def test_data_for_one_batch_is_too_little(llama_dir, texts, tmp_path):
    calibration = {**spec(texts).calibration.model_dump(), "samples": 2}
    with pytest.raises(UsageError, match="too little data"):
        prune(str(llama_dir), spec(texts, calibration=calibration), tmp_path / "run")


def test_the_section_belongs_to_the_method():
    assert validate(Prune, {"method": "maskllm"}).learn.name == "maskllm"
    assert (
        validate(Prune, validate(Prune, {"method": "maskllm"}).model_dump()).learn.name == "maskllm"
    )
    for settings, sentence_ in (
        ({"method": "wanda", "learn": {"steps": 5}}, "belongs to a learned method"),
        ({"learn": {"steps": 5}}, "'sparsegpt' is none"),
        ({"method": "maskllm", "learn": {"step": 5}}, "learn.maskllm.step"),
        ({"method": "maskllm", "learn": {"priors": ["wandda"]}}, "Did you mean 'wanda'"),
        ({"method": "masklm"}, "Did you mean 'maskllm'"),
        ({"method": "maskllm", "learn": {"batch": 6}}, "not a multiple"),
        ({"method": "maskllm", "pattern": "unstructured:0.5"}, "N:M groups only"),
        ({"method": "maskllm", "wbits": 4}, "is not rounded"),
        (
            {"method": "maskllm", "permute": True, "learn": {"objective": "global"}},
            "a block at a time",
        ),
    ):
        with pytest.raises(UsageError) as caught:
            validate(Prune, settings)
        assert sentence_ in caught.value.message


@pytest.mark.parametrize("objective", ["block", "global"])
def test_a_mask_file_is_a_prior(objective, llama_dir, texts, tmp_path):
    """A run goes on from another one's masks: with a rate of nothing it hands them back."""
    first = prune(str(llama_dir), spec(texts, "block"), tmp_path / "first")
    file = str(first / "masks.safetensors")
    again = prune(
        str(llama_dir),
        spec(texts, objective, {"priors": [file], "step_size": 1e-9}),
        tmp_path / "again",
    )
    one, two = (MaskSet.load(run / "masks.safetensors").masks for run in (first, again))
    assert all((one[name].bits == two[name].bits).all() for name in two)


def test_a_prior_that_does_not_fit_is_refused(llama_dir, texts, tmp_path):
    run = prune(str(llama_dir), spec(texts, include=["*layers.0.mlp*"]), tmp_path / "run")
    learn = {"priors": [str(run / "masks.safetensors")]}
    other = pico.save(pico.llama(seed=1), tmp_path / "other")
    for model, changes, sentence_ in (
        (other, {"include": ["*layers.0.mlp*"]}, "belong to another model"),
        (llama_dir, {"include": ["*layers.0.mlp*"], "pattern": "1:4"}, "is 2:4 on"),
        (llama_dir, {}, "has no mask for"),
    ):
        with pytest.raises(NmsparseError, match=sentence_):
            prune(str(model), spec(texts, learn=learn, **changes), tmp_path / "no")
        assert not (tmp_path / "no").exists()
    with pytest.raises(UsageError, match="no mask file"):
        prune(str(llama_dir), spec(texts, learn={"priors": ["none.safetensors"]}), tmp_path / "no")


def test_recipes_without_learning_keep_their_fingerprint():
    """As it was before there were learned methods."""
    assert fingerprint("demo", Prune()) == "edf1a4427d127e58"
    seen = {
        fingerprint("demo", validate(Prune, {"method": "maskllm", "learn": {"steps": n}}))
        for n in (5, 6)
    }
    assert len(seen) == 2


def test_paper_recipes_say_what_the_paper_says():
    recipe = Recipe.load(ROOT / "recipes/maskllm-paper.yaml").prune
    learn = recipe.learn
    assert (learn.steps, learn.batch, recipe.calibration.length) == (2000, 256, 4096)
    assert (
        learn.step_size / learn.kappa[1] == pytest.approx(5e-4)
        and learn.decay == 0.1
        and learn.clip == 1.0
    )
    held_out = (
        round(learn.holdout * recipe.calibration.samples / recipe.calibration.batch)
        * recipe.calibration.batch
    )
    assert recipe.calibration.samples - held_out == 2000 * 256


def test_the_command_line(llama_dir, texts, tmp_path):
    from nmsparse_deploy.cli import app

    command = [
        "--json",
        "prune",
        str(llama_dir),
        "--method",
        "maskllm",
        "--steps",
        "2",
        "--objective",
        "block",
        "--data",
        str(texts["calibration"]),
        "--samples",
        "12",
        "--length",
        "32",
        "--out",
        str(tmp_path / "run"),
        "--include",
        "*layers.0.mlp*",
    ]
    result = CliRunner().invoke(app, command, catch_exceptions=False, env={**os.environ})
    data = json.loads(result.stdout)
    assert (
        data["layers"] == 3
        and data["learned"]["steps"] == 2
        and data["learned"]["objective"] == "block"
    )


def test_a_summary_needs_something_learned():
    with pytest.raises(NmsparseError):
        summary([])
    assert loop.QUIET > 0
