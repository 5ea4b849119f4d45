"""Structure discovery on two-block models of several families, and what is never pruned."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPTNeoXConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
)

from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.find.plan.make_plan import make_plan
from nmsparse_deploy.models.discovery import discover, find_blocks
from nmsparse_deploy.pattern import TWO_FOUR, NMPattern
from tests.fixtures import pico

IDS = {"input_ids": torch.arange(32).view(2, 16)}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
FAMILIES = {
    "opt": (
        OPTConfig,
        {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
        6,
    ),
    "qwen2": (Qwen2Config, {"intermediate_size": 64, "num_key_value_heads": 1}, 7),
    "gemma2": (
        Gemma2Config,
        {"intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 16},
        7,
    ),
    "gpt_neox": (GPTNeoXConfig, {"intermediate_size": 64}, 4),
    "bloom": (BloomConfig, {"n_layer": 2, "n_head": 2}, 4),
}


def groups(found):
    table: dict[str, list[str]] = {}
    for target in found.targets:
        table.setdefault(target.fusion, []).append(target.name.split(".")[-2])
    return list(table.values())


def test_llama():
    found = discover(pico.llama(), IDS)
    assert found.blocks == ("model.layers.0", "model.layers.1")
    assert (
        groups(found)
        == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 2
    )
    down = next(t for t in found.targets if t.name == "model.layers.1.mlp.down_proj.weight")
    assert (down.block, down.axis, down.k, down.n) == (1, 1, 128, 64)
    assert {s.name: s.reason for s in found.skipped} == {
        "model.embed_tokens.weight": "embedding table",
        "lm_head.weight": "head or projection outside the repeated blocks",
    }


def test_tied_head_is_said_to_be_tied():
    found = discover(pico.llama(tie_word_embeddings=True), IDS)
    assert {s.name: s.reason for s in found.skipped}[
        "lm_head.weight"
    ] == "tied to model.embed_tokens.weight"


def test_gpt2_groups_along_the_first_axis():
    found = discover(pico.gpt2(), IDS)
    fc = next(t for t in found.targets if t.name.endswith("0.mlp.c_fc.weight"))
    assert (fc.axis, fc.k, fc.n) == (0, 32, 128)
    assert [s.reason for s in found.skipped][:2] == ["embedding table", "embedding table"]


@pytest.mark.parametrize("name", FAMILIES)
def test_families_need_no_code(name):
    config, extra, per_block = FAMILIES[name]
    module = AutoModelForCausalLM.from_config(config(**(SMALL | extra)))
    found = discover(module, IDS)
    assert len(found.blocks) == 2 and len(found.targets) == 2 * per_block
    assert all(t.k in (32, 64, 128) for t in found.targets)
    assert not any("head" in t.name.rsplit(".", 2)[-2] and t.n == 64 for t in found.targets)


def test_routers_stay_dense():
    module = AutoModelForCausalLM.from_config(
        MixtralConfig(
            **SMALL,
            intermediate_size=64,
            num_key_value_heads=1,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
    )
    reasons = {s.name: s.reason for s in discover(module, IDS).skipped}
    router = [name for name in reasons if name.endswith("gate.weight")]
    assert len(router) == 2
    assert {reasons[name] for name in router} == {"router of a mixture of experts"}


class Modulated(nn.Module):
    """A block with a modulation layer that reads one row per sample, and an inner width of 6."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(8, 16)
        self.inner = nn.Linear(8, 6)
        self.outer = nn.Linear(6, 8)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift, scale = self.modulation(c).chunk(2, -1)
        return x + self.outer(self.inner(x * scale[:, None] + shift[:, None]))


class Net(nn.Module):
    def __init__(self, block=Modulated) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block(), block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, x.mean(1))
        return x


def test_modulation_and_widths_that_do_not_divide():
    module = Net()
    found = discover(module, {"x": torch.randn(2, 5, 8)})
    reasons = {s.name: s.reason for s in found.skipped}
    assert "one row per sample" in reasons["blocks.0.modulation.weight"]
    plan = make_plan(found, TWO_FOUR)
    rows = {row.target.name: row for row in plan.rows}
    assert rows["blocks.0.outer.weight"].reason == "reduction length 6 is not divisible by 4"
    assert [row.target.name for row in plan.pruned()] == [
        "blocks.0.inner.weight",
        "blocks.1.inner.weight",
    ]


def test_fusion_groups_are_all_or_nothing():
    found = discover(pico.llama(), IDS)
    plan = make_plan(found, TWO_FOUR, exclude=["*layers.0*k_proj*"])
    rows = {
        row.target.name.removeprefix("model.layers.0.self_attn."): row
        for row in plan.rows
        if row.target.block == 0
    }
    assert rows["k_proj.weight"].reason == "excluded by '*layers.0*k_proj*'"
    for name in ("q_proj.weight", "v_proj.weight"):
        assert rows[name].pattern is None
        assert rows[name].reason.startswith(
            "reads the same input as model.layers.0.self_attn.k_proj.weight"
        )
    assert rows["o_proj.weight"].pattern == TWO_FOUR
    assert len(plan.pruned()) == 11


def test_globs_that_match_nothing_and_empty_plans():
    found = discover(pico.llama(), IDS)
    with pytest.raises(UsageError, match="matches no prunable parameter"):
        make_plan(found, TWO_FOUR, include=["*fc1*"])
    with pytest.raises(NmsparseError, match="Nothing can be pruned"):
        make_plan(found, TWO_FOUR, exclude=["*"])
    with pytest.raises(NmsparseError, match="not divisible by 7"):
        make_plan(found, NMPattern(3, 7))


def test_no_blocks():
    assert find_blocks(nn.Sequential(nn.Linear(4, 4), nn.ReLU())) == ()
    with pytest.raises(NmsparseError, match="no repeated blocks"):
        discover(nn.Linear(4, 4), {"input": torch.ones(2, 4)})


def test_hooks_are_gone_and_mode_is_restored():
    module = pico.llama().train()
    discover(module, IDS)
    assert module.training and not any(m._forward_pre_hooks for m in module.modules())
