"""The calibration walk: faithful replay, one Gram per distinct input, statistics as computed by
hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, GPTNeoXConfig

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.find.calibration import block_walk as walk_module
from nmsparse_deploy.find.calibration.block_walk import BlockWalk
from nmsparse_deploy.find.calibration.layer_stats import StatsAccumulator
from nmsparse_deploy.models.base import from_rows, to_rows
from nmsparse_deploy.models.discovery import discover
from tests.fixtures import pico

IDS = torch.randint(0, 64, (6, 16), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": part, "use_cache": False} for part in IDS.split(2)]
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "intermediate_size": 64,
}
MODELS = {
    "llama": pico.llama,
    "gpt2": pico.gpt2,
    # every second block of Gemma 2 gets another attention mask
    "gemma2": lambda: AutoModelForCausalLM.from_config(
        Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=16, sliding_window=4)
    ).eval(),
    "gpt_neox": lambda: AutoModelForCausalLM.from_config(GPTNeoXConfig(**SMALL)).eval(),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_walking_without_pruning_is_the_model_itself(name):
    """Property 20: the stream after the last block is bit for bit what the model computes there."""
    module = MODELS[name]()
    found = discover(module, {"input_ids": IDS[:2]})
    seen = []
    handle = module.get_submodule(found.blocks[-1]).register_forward_hook(
        lambda _m, _a, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    for batch in BATCHES:
        module(**batch)
    handle.remove()
    walk = BlockWalk(module, found.blocks, BATCHES)
    for index in range(len(found.blocks)):
        walk.advance(index)
    for got, expected in zip(walk.hidden, seen):
        assert torch.equal(got, expected)


def test_statistics_are_those_of_the_inputs():
    module = pico.llama()
    found = discover(module, {"input_ids": IDS[:2]})
    inputs = []
    layer = module.get_submodule("model.layers.0.mlp.down_proj")
    handle = layer.register_forward_pre_hook(
        lambda _m, args: inputs.append(args[0].reshape(-1, 128))
    )
    with torch.no_grad():
        for batch in BATCHES:
            module(**batch)
    handle.remove()
    x = torch.cat(inputs)
    targets = found.of_block(0)
    stats = BlockWalk(module, found.blocks, BATCHES).statistics(0, targets, "gram")
    down = stats["model.layers.0.mlp.down_proj"]
    assert down.tokens == len(x) == IDS.numel()
    torch.testing.assert_close(down.gram, x.T @ x)
    assert torch.equal(down.gram, down.gram.T)
    norms = BlockWalk(module, found.blocks, BATCHES).statistics(0, targets, "norms")[
        "model.layers.0.mlp.down_proj"
    ]
    assert norms.gram is None
    torch.testing.assert_close(norms.rms, x.square().mean(0).sqrt())
    torch.testing.assert_close(norms.square_sum, down.square_sum)


def test_one_gram_per_distinct_input(monkeypatch):
    """Siblings (q/k/v, gate/up) share one accumulation: 4 inputs x 3 batches, not 7 layers x 3
    batches."""
    calls = []
    original = StatsAccumulator.update

    def update(self, layer, *inputs):
        calls.append(layer)
        original(self, layer, *inputs)

    monkeypatch.setattr(walk_module.StatsAccumulator, "update", update)
    module = pico.llama()
    found = discover(module, {"input_ids": IDS[:2]})
    stats = BlockWalk(module, found.blocks, BATCHES).statistics(0, found.of_block(0), "gram")
    assert len(calls) == 4 * len(BATCHES) and len(stats) == 4


def test_batch_order_does_not_change_statistics():
    module = pico.llama()
    found = discover(module, {"input_ids": IDS[:2]})
    one = BlockWalk(module, found.blocks, BATCHES).statistics(0, found.of_block(0), "gram")
    two = BlockWalk(module, found.blocks, BATCHES[::-1]).statistics(0, found.of_block(0), "gram")
    for fusion, stats in one.items():
        torch.testing.assert_close(stats.gram, two[fusion].gram)


def test_statistics_stay_fp32_under_autocast():
    """A Gram accumulated inside an autocast region must not be rounded to bf16."""
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    total = StatsAccumulator("gram")
    with torch.autocast("cpu", torch.bfloat16):
        total.update(nn.Linear(16, 4), x)
    assert torch.equal(total.finish().gram, (x.T @ x + (x.T @ x).T) / 2)


def test_bf16_walk_keeps_fp32_statistics_and_leaves_the_model_alone():
    module = pico.llama()
    before = {name: p.clone() for name, p in module.named_parameters()}
    found = discover(module, {"input_ids": IDS[:2]})
    walk = BlockWalk(module, found.blocks, BATCHES, torch.bfloat16)
    stats = walk.statistics(0, found.of_block(0), "gram")
    walk.advance(0)
    assert all(s.gram.dtype == torch.float32 for s in stats.values())
    assert walk.hidden[0].dtype == torch.bfloat16
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert not any(m._forward_pre_hooks for m in module.modules())


@pytest.mark.parametrize(
    "settings", [{}, {"stride": 2}, {"padding": 1}, {"dilation": 2}, {"kernel_size": 1}]
)
@torch.no_grad()
def test_convolution_statistics_match_its_matrix_form(settings):
    """Property 21: the unfolded inputs times the rows of the weight give the convolution."""
    conv = nn.Conv2d(8, 5, **({"kernel_size": 3, "bias": False} | settings))
    x = torch.randn(2, 8, 9, 9)
    rows = to_rows(conv.weight, 1)
    assert torch.equal(from_rows(rows, conv.weight.shape, 1), conv.weight)
    total = StatsAccumulator("gram")
    total.update(conv, x)
    stats = total.finish()
    energy = float(((rows @ stats.gram) * rows).sum())
    assert energy == pytest.approx(float(conv(x).square().sum()), rel=1e-4)
    assert stats.tokens == conv(x).numel() // 5


@torch.no_grad()
def test_both_streams():
    """Before anything is pruned the dense stream is the stream; after, it is what the dense model
    computes."""
    module = pico.llama()
    found = discover(module, {"input_ids": IDS[:2]})
    walk = BlockWalk(module, found.blocks, BATCHES, both=True)
    stats = walk.statistics(0, found.of_block(0), "gram")
    for entry in stats.values():
        if entry.wanted is None:
            torch.testing.assert_close(entry.cross, entry.gram)
    dense_output = [x.clone() for x in walk.dense]
    for target in found.of_block(0):
        module.get_parameter(target.name).mul_(0.5)
    walk.advance(0)
    assert not torch.equal(walk.hidden[0], dense_output[0])
    fed = []
    layer = module.get_submodule("model.layers.1.mlp.down_proj")
    block = module.get_submodule("model.layers.1")
    handle = layer.register_forward_pre_hook(lambda _m, args: fed.append(args[0].reshape(-1, 128)))
    for number in range(len(BATCHES)):
        call = walk._stream.call(1, number)
        call(block, walk.hidden[number])
        call(block, dense_output[number])
    handle.remove()
    sparse, dense = torch.cat(fed[0::2]), torch.cat(fed[1::2])
    entry = walk.statistics(1, found.of_block(1), "gram")["model.layers.1.mlp.down_proj"]
    assert entry.cross is None  # it has fewer outputs than inputs
    torch.testing.assert_close(entry.wanted, layer.weight @ dense.T @ sparse)
    torch.testing.assert_close(entry.gram, sparse.T @ sparse)


def halved(module, path):
    """A pruned stand-in for a weight: half of it."""
    return {f"{path}.weight": module.get_parameter(f"{path}.weight").detach() / 2}


def test_later_layers_see_what_is_pruned_before_them():
    """With `weights`, statistics are those of a model that has them; the model itself stays as it
    is."""
    module, changed = pico.llama(), pico.llama()
    found = discover(module, {"input_ids": IDS[:2]})
    name = "model.layers.0.self_attn.v_proj"
    weights = halved(module, name)
    with torch.no_grad():
        changed.get_parameter(f"{name}.weight").copy_(weights[f"{name}.weight"])
    mine = BlockWalk(module, found.blocks, BATCHES).statistics(
        0, found.of_block(0), "gram", weights
    )
    wanted = BlockWalk(changed, found.blocks, BATCHES).statistics(0, found.of_block(0), "gram")
    plain = BlockWalk(module, found.blocks, BATCHES).statistics(0, found.of_block(0), "gram")
    for fusion, stats in mine.items():
        torch.testing.assert_close(stats.gram, wanted[fusion].gram)
        assert torch.equal(stats.gram, plain[fusion].gram) == (
            fusion == "model.layers.0.self_attn.q_proj"
        )


def test_drift_of_the_residual_stream():
    """Witness: hidden states of whole models, with the layer's own share taken off."""
    module, changed = pico.llama(), pico.llama()
    found = discover(module, {"input_ids": IDS[:2]})
    with torch.no_grad():
        for target in found.of_block(0):
            changed.get_parameter(target.name).mul_(0.9)
    walk = BlockWalk(module, found.blocks, BATCHES, both=True)
    walk.statistics(0, found.of_block(0), "gram")
    for target in found.of_block(0):
        with torch.no_grad():
            module.get_parameter(target.name).mul_(0.9)
    walk.advance(0)
    stats = walk.statistics(1, found.of_block(1), "gram")
    assert {fusion.rpartition(".")[2] for fusion, s in stats.items() if s.drift is not None} == {
        "o_proj",
        "down_proj",
    }
    seen: dict[str, torch.Tensor] = {}
    layer = changed.model.layers[1].self_attn.o_proj
    layer.register_forward_pre_hook(lambda _m, args: seen.update(x=args[0]))
    with torch.no_grad():
        dense = (
            pico.llama()
            .model(input_ids=IDS, output_hidden_states=True, use_cache=False)
            .hidden_states[1]
        )
        sparse = changed.model(
            input_ids=IDS, output_hidden_states=True, use_cache=False
        ).hidden_states[1]
    wanted = (dense - sparse).reshape(-1, 64).T @ seen["x"].reshape(-1, 64)
    torch.testing.assert_close(
        stats["model.layers.1.self_attn.o_proj"].drift, wanted, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("need", ["norms", "gram"])
def test_overflowing_activations_are_one_sentence(need):
    module = pico.llama()
    with torch.no_grad():
        module.model.layers[0].self_attn.v_proj.weight[3] = float("inf")
    found = discover(pico.llama(), {"input_ids": IDS[:2]})
    with pytest.raises(NmsparseError, match="activations overflow"):
        BlockWalk(module, found.blocks, BATCHES).statistics(0, found.of_block(0), need)
