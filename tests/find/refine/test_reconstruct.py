"""Reconstruction of a block: it can only help on held-out batches, never moves a zero, and knows
its halves."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from nmsparse_deploy.find.calibration.block_walk import BlockWalk
from nmsparse_deploy.find.methods.base import Method
from nmsparse_deploy.find.plan.make_plan import make_plan
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.find.prune_block import prune_block
from nmsparse_deploy.find.refine import reconstruct
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.models.discovery import discover
from nmsparse_deploy.models.residual_stream import (
    EXIT,
    find_middle,
    parameters_before,
    residual_writers,
)
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.prove.group_counter import check
from nmsparse_deploy.recipe import Prune, validate
from tests.find.test_prune import Stop, mask_bytes, spec, stop_at
from tests.fixtures import pico

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": pico.VOCABULARY,
}


def opt() -> OPTForCausalLM:
    return OPTForCausalLM(
        OPTConfig(**SMALL, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=64)
    ).eval()


def neox() -> GPTNeoXForCausalLM:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(**SMALL, intermediate_size=128, max_position_embeddings=64)
    ).eval()


def bert() -> BertModel:
    return BertModel(BertConfig(**SMALL, intermediate_size=128, max_position_embeddings=64)).eval()


def blocks(model, monkeypatch, step=None):
    """The `Block` that a reconstruction of block 0 is given, and what it returned."""
    inputs = {
        "input_ids": torch.randint(
            pico.VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0)
        )
    }
    plan = make_plan(discover(model, inputs), TWO_FOUR)
    quiet = {} if model.base_model_prefix == "bert" else {"use_cache": False}
    batches = [
        {
            "input_ids": torch.randint(
                pico.VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(i)
            ),
            **quiet,
        }
        for i in range(10)
    ]
    walk = BlockWalk(model, plan.blocks, batches, torch.float32, both=True)
    seen = []
    original = reconstruct.refine

    def refine(block, settings):
        seen.append(
            (
                block,
                {n: v.clone() for n, v in block.module.named_parameters()},
                original(block, settings),
            )
        )
        return seen[-1][2]

    monkeypatch.setattr(reconstruct, "refine", refine)
    recipe = validate(
        Prune, {"method": "wanda", "refine": [{"name": "reconstruct", **(step or {})}]}
    )
    pruned = prune_block(model, plan, 0, recipe, Method.load("wanda"), walk)
    return *seen[0], pruned


@pytest.mark.parametrize(
    "make,middle",
    [
        (pico.llama, "post_attention_layernorm"),
        (pico.gpt2, "ln_2"),
        (opt, "final_layer_norm"),
        (bert, "attention.output.LayerNorm"),
        (neox, None),
    ],
    ids=["llama", "gpt2", "opt", "bert", "parallel"],
)
def test_halves_are_found_by_watching(make, middle, monkeypatch):
    """Attention before the middle, MLP after it; blocks that run both side by side have none."""
    block, *_ = blocks(make(), monkeypatch)
    run = partial(lambda batch, m: block.run(m, 0, batch), block.inputs[0])
    assert find_middle(block.dense, run, block.inputs[0]) == middle
    if middle is not None:
        first = parameters_before(block.dense, run, middle)
        names = {name for name, _ in block.module.named_parameters()}
        assert first < names and not any(name.startswith(middle) for name in first)
        assert {n for n in first if "attn" in n or "attention" in n} and not {
            n for n in first if "mlp" in n or "fc" in n
        }


@pytest.mark.parametrize(
    "make,writers",
    [
        (pico.llama, {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": EXIT}),
        (pico.gpt2, {"attn.c_proj": "ln_2", "mlp.c_proj": EXIT}),
        (opt, {"self_attn.out_proj": "final_layer_norm", "fc2": EXIT}),
        (
            bert,
            {"attention.output.dense": "attention.output.LayerNorm"},
        ),  # the MLP's sum goes through a norm
        (neox, {"attention.dense": EXIT, "mlp.dense_4h_to_h": EXIT}),
    ],
    ids=["llama", "gpt2", "opt", "bert", "parallel"],
)
def test_who_writes_to_the_residual_stream(make, writers, monkeypatch):
    block, *_ = blocks(make(), monkeypatch)
    found = residual_writers(
        block.dense, partial(lambda x, m: block.run(m, 0, x), block.inputs[0]), block.inputs[0]
    )
    assert found == writers


@pytest.mark.parametrize("unit", ["half", "block"])
def test_held_out_loss_falls_and_zeros_stay(unit, monkeypatch):
    block, before, result, pruned = blocks(pico.llama(), monkeypatch, {"unit": unit, "rate": 2e-3})
    losses = [fact for name, fact in result.facts.to_json().items() if name.startswith("unit")]
    assert len(losses) == (2 if unit == "half" else 1)
    assert all(loss["after"] < loss["before"] for loss in losses)
    for name, layer in block.layers.items():
        moved = result.layers[name]
        assert torch.equal(moved.mask, layer.result.mask) and (moved.weight[~moved.mask] == 0).all()
        assert not torch.equal(moved.weight, before[name])
    assert any("norm" in name for name in result.others)
    assert set(pruned.others) == {f"model.layers.0.{name}" for name in result.others}
    assert pruned.refinements[0].block == 0 and pruned.refinements[0].name == "reconstruct"


@pytest.mark.parametrize("make", [pico.llama, pico.gpt2, bert], ids=["llama", "gpt2", "bert"])
def test_the_last_block_may_be_judged_by_the_output_of_the_model(make, monkeypatch):
    """Block 0 of 2 with `through` 2: the distance is that of whole models, with the block behind it
    dense."""
    model = make()
    block, start, result, pruned = blocks(model, monkeypatch, {"through": 2, "epochs": 3})
    output = "last_hidden_state" if make is bert else "logits"

    def judged(weights, number):
        batch = {
            "input_ids": torch.randint(
                pico.VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(number)
            )
        }
        dense = model(**batch)[output].detach()
        path = next(name for name in pruned.layers).split(".0.")[0] + ".0."
        held = {path + name: value for name, value in weights.items()}
        found = torch.func.functional_call(model, held, (), batch)[output].detach()
        if make is bert:
            return float(
                (
                    (found - dense).flatten(1).square().sum(1) / dense.flatten(1).square().sum(1)
                ).mean()
            )
        p, q = dense.log_softmax(-1), found.log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    facts = result.facts.to_json()["unit 0"]
    assert facts["before"] == pytest.approx(judged(start, 9), rel=1e-3)
    after = {name: value.detach() for name, value in block.module.named_parameters()}
    assert (
        facts["after"] == pytest.approx(judged(after, 9), rel=1e-3)
        and facts["after"] < facts["before"]
    )
    assert all(parameter.grad is None for parameter in model.parameters())


def test_blocks_before_the_outlook_are_reconstructed_as_ever(monkeypatch):
    *_, near = blocks(pico.llama(), monkeypatch, {"through": 1})
    *_, never = blocks(pico.llama(), monkeypatch)
    assert near.refinements[0].facts["unit 0"] == never.refinements[0].facts["unit 0"]


def test_a_useless_training_is_thrown_away(monkeypatch):
    """With a rate that destroys the block, the held-out batches keep the start, bit for bit."""
    _, before, result, _ = blocks(pico.llama(), monkeypatch, {"rate": 10.0, "epochs": 1})
    assert not result.others
    for name, found in result.layers.items():
        assert torch.equal(found.weight, before[name])


def test_the_error_is_relative_to_each_token():
    target = torch.tensor([[1.0, 0.0], [1000.0, 0.0]])
    assert float(reconstruct.relative_error(2 * target, target)) == pytest.approx(1.0)
    assert (
        float(reconstruct.relative_error(target, torch.zeros(2, 2))) > 1e30
    )  # never a division by zero


def test_end_to_end_and_resume(texts, llama_dir, tmp_path):
    """Norms travel with the block files: the saved model has them, and a resumed run has the same
    bits."""
    recipe = validate(
        Prune,
        {**spec(texts, "wanda").model_dump(), "refine": [{"name": "reconstruct", "rate": 2e-3}]},
    )
    whole = prune(str(llama_dir), recipe, tmp_path / "whole")
    with pytest.raises(Stop):
        prune(str(llama_dir), recipe, tmp_path / "broken", progress=stop_at(1))
    resumed = prune(str(llama_dir), recipe, tmp_path / "broken")
    assert mask_bytes(resumed) == mask_bytes(whole)
    assert (resumed / "model/model.safetensors").read_bytes() == (
        whole / "model/model.safetensors"
    ).read_bytes()
    told = whole.read_json("refinements.json")
    assert [row["block"] for row in told] == [0, 1] and told[0]["unit 0"]["after"] <= told[0][
        "unit 0"
    ]["before"]
    weights, dense = (
        load_file(folder / "model.safetensors") for folder in (whole / "model", llama_dir)
    )
    masks = MaskSet.load(whole / "masks.safetensors").masks
    assert all(check(weights[name], TWO_FOUR).bad == 0 for name in masks)
    norms = [name for name in weights if "norm" in name and "layers" in name]
    assert any(not torch.equal(weights[name], dense[name]) for name in norms)
