"""A router is a layer with one output for each expert beside it; a convolution's weight is no stack
of experts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    JambaConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    Qwen3_5TextConfig,
    RecurrentGemmaConfig,
)

from nmsparse_deploy.find.plan.make_plan import make_plan
from nmsparse_deploy.models.discovery import discover
from nmsparse_deploy.models.experts import is_router
from nmsparse_deploy.pattern import TWO_FOUR

IDS = {"input_ids": torch.arange(32).view(2, 16), "use_cache": False}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
ROUTER = "router of a mixture of experts"
MODELS = {
    "qwen3.5": (
        Qwen3_5TextConfig(
            **SMALL,
            **HEADS,
            head_dim=16,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
        ),
        "linear_attn.in_proj_qkv",
    ),
    "lfm2": (Lfm2Config(**SMALL, **HEADS, layer_types=["conv", "full_attention"]), "conv.out_proj"),
    "recurrent gemma": (
        RecurrentGemmaConfig(
            **SMALL,
            **HEADS,
            head_dim=16,
            lru_width=32,
            block_types=["recurrent", "attention"],
            attention_window_size=16,
        ),
        "temporal_block.linear_out",
    ),
    "mamba": (
        MambaConfig(**SMALL, state_size=8, intermediate_size=64, time_step_rank=8),
        "mixer.dt_proj",
    ),
    "jamba": (
        JambaConfig(
            **SMALL,
            **HEADS,
            mamba_dt_rank=8,
            mamba_d_state=8,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=4,
            num_experts_per_tok=2,
            use_mamba_kernels=False,
        ),
        "mamba.dt_proj",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_beside_a_convolution_is_no_router(name):
    config, layer = MODELS[name]
    torch.manual_seed(0)
    module = (Lfm2ForCausalLM if name == "lfm2" else AutoModelForCausalLM.from_config)(config)
    found = discover(module.eval(), IDS)
    assert any(layer in target.name for target in found.targets)
    routers = [s.name for s in found.skipped if s.reason == ROUTER]
    assert len(routers) == (1 if name == "jamba" else 0)
    dense = {s.reason for s in found.skipped if s.gemm}
    assert dense <= {
        ROUTER,
        "head or projection outside the repeated blocks",
        "grouped or depthwise convolution",
    }


class Stack(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


class Wrapped(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(8, outputs)


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


@pytest.mark.parametrize(
    ("beside", "expected"),
    [
        ({"experts": Stack(4, 8, 8)}, True),
        ({"experts": nn.ModuleList([two_layers() for _ in range(4)])}, True),
        ({"experts": nn.ModuleList([two_layers() for _ in range(3)])}, False),
        ({"experts": nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])}, False),
        ({"conv": nn.Conv1d(4, 4, 3, groups=4)}, False),
        ({"conv": nn.Conv1d(8, 4, 3)}, False),
        ({"table": Stack(4, 1, 8)}, False),
        ({"other": nn.Linear(8, 4)}, False),
    ],
)
@pytest.mark.parametrize("gate", [nn.Linear(8, 4), Wrapped(4), Stack(4, 8)])
def test_only_experts_beside_it_make_a_router(gate, beside, expected):
    block = nn.ModuleDict({"gate": gate, **beside})
    module = nn.ModuleList([block])
    path = "0.gate.layer" if isinstance(gate, Wrapped) else "0.gate"
    weight = module.get_submodule(path).weight
    assert is_router(module, path, weight) is expected


def test_the_summary_counts_every_weight_that_is_multiplied():
    module = AutoModelForCausalLM.from_config(MODELS["jamba"][0]).eval()
    plan = make_plan(discover(module, IDS), TWO_FOUR)
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    added = {"A_log"}  # state matrices are no factors of a product
    every = sum(
        p.numel()
        for name, p in module.named_parameters()
        if p.ndim > 1 and id(p) not in tables and name.rpartition(".")[2] not in added
    )
    chosen = sum(row.target.k * row.target.n for row in plan.pruned())
    summary = plan.summary()
    assert f"of {every / 1e6:.1f} M weights that are multiplied ({chosen / every:.1%})" in summary
    head = module.lm_head.weight.numel() / every
    assert f"{head:.1%} head or projection outside the repeated blocks" in summary
    assert ROUTER in summary
