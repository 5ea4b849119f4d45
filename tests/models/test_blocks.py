"""Blocks of networks that keep no list of them, and of networks whose blocks share weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AlbertConfig, AlbertForMaskedLM, Zamba2Config, Zamba2ForCausalLM

from nmsparse_deploy import models
from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.find.calibration.block_walk import BlockWalk
from nmsparse_deploy.find.plan.make_plan import make_plan
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.models.discovery import discover, find_blocks
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.recipe import Prune, validate
from tests.find.calibration.test_hidden_states import entrances
from tests.fixtures import pico

PIXELS = 64
NETWORKS = {
    "regnetx_002": (13, "s4.b7"),
    "densenet121": (7, "features.denseblock4"),
    "dla46_c": (8, "level5.root.conv"),
    "dpn68": (22, "features.conv5_3"),
    "repvit_m0_9": (23, "stages.3.blocks.1"),
}
"""timm's name -> how many blocks there are, and one of the last."""


def network(name: str) -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    module = timm.create_model(name, pretrained=False, num_classes=8).eval()
    return module, [{"x": torch.randn(2, 3, PIXELS, PIXELS)}]


@pytest.mark.parametrize("name", NETWORKS)
def test_convolutional_networks_have_blocks(name):
    module, (batch,) = network(name)
    found = discover(module, batch)
    count, _ = NETWORKS[name]
    assert len(found.blocks) == count
    dense = {s.reason.partition(" (")[0] for s in found.skipped if s.gemm}
    assert dense <= {
        "patch embedding or stem outside the repeated blocks",
        "head or projection outside the repeated blocks",
        "grouped or depthwise convolution",
        "reads one row per sample",
    }
    plan = make_plan(found, TWO_FOUR)
    every = sum(t.k * t.n for t in found.targets)
    assert sum(row.target.k * row.target.n for row in plan.pruned()) > 0.97 * every


@pytest.mark.parametrize("name", ["regnetx_002", "densenet121", "dpn68"])
@torch.no_grad()
def test_the_stream_is_what_the_network_feeds_its_blocks(name):
    module, batches = network(name)
    blocks = discover(module, batches[0]).blocks
    walk = BlockWalk(module, blocks, batches)
    wanted = entrances(module, blocks, batches[0])
    for index in range(len(blocks)):
        torch.testing.assert_close(walk.hidden[0], wanted[index])
        if index + 1 < len(blocks):
            walk.advance(index)


def test_the_layers_of_a_plain_chain_are_blocks():
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
    module = nn.Sequential(nn.Conv2d(3, 8, 3), *layers, nn.Flatten(), nn.Linear(8 * 14 * 14, 5))
    found = discover(module, {"input": torch.randn(2, 3, 16, 16)})
    assert found.blocks == ("1", "3", "5", "7")
    assert [t.name for t in found.targets] == [f"{n}.weight" for n in (1, 3, 5, 7)]
    walk = BlockWalk(module, found.blocks, [{"input": torch.randn(2, 3, 16, 16)}])
    stats = walk.statistics(0, found.of_block(0), "gram")
    assert stats["1"].gram.shape == (72, 72)


def test_a_pointwise_convolution_along_one_axis_is_a_matrix():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.point, self.wide = nn.Conv1d(8, 16, 1), nn.Conv1d(16, 8, 3, padding=1)

        def forward(self, x):
            return x + self.wide(self.point(x))

    torch.manual_seed(0)
    module = nn.Sequential(Block(), Block())
    x = torch.randn(2, 8, 12)
    found = discover(module, {"input": x})
    assert [(t.name, t.axis, t.k, t.n, t.experts) for t in found.of_block(0)] == [
        ("0.point.weight", 1, 8, 16, 1)
    ]
    assert {s.reason for s in found.skipped} == {
        "convolution along one axis over several steps, or along three"
    }
    walk = BlockWalk(module, found.blocks, [{"input": x}])
    rows = x.transpose(1, 2).reshape(-1, 8)
    gram = walk.statistics(0, found.of_block(0), "gram")["0.point"].gram
    torch.testing.assert_close(gram, rows.T @ rows)


def test_attention_that_packs_its_projections_is_pruned():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x):
            return x + self.attention(x, x, x, need_weights=False)[0]

    module = nn.Sequential(Block(), Block())
    found = discover(module, {"input": torch.randn(2, 6, 16)})
    assert {t.name.partition(".")[2] for t in found.targets} == {
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    }


SMALL = {"vocab_size": pico.VOCABULARY, "hidden_size": 32, "num_attention_heads": 4}


def zamba2() -> Zamba2ForCausalLM:
    torch.manual_seed(0)
    config = Zamba2Config(
        **SMALL,
        num_hidden_layers=4,
        num_key_value_heads=4,
        intermediate_size=64,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        num_mem_blocks=1,
        mamba_d_state=8,
        mamba_ngroups=1,
        n_mamba_heads=4,
        mamba_headdim=16,
        adapter_rank=8,
        use_mem_rope=True,
    )
    return Zamba2ForCausalLM(config).eval()


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_blocks_that_share_weights_are_pruned_once(method, texts, tmp_path):
    folder = pico.save(zamba2(), tmp_path / "model")
    calibration = {"data": str(texts["calibration"]), "samples": 4, "length": 32, "batch": 2}
    spec = validate(Prune, {"method": method, "calibration": calibration, "compute": "fp32"})
    run = prune(str(folder), spec, tmp_path / "run")
    masks = MaskSet.load(run / "masks.safetensors").masks
    shared = [name for name in masks if "shared_transformer" in name]
    assert shared and {name.split(".")[2] for name in shared} == {"1"}
    saved = models.load(str(run / "model")).module
    for name in shared:
        other = saved.get_parameter(name.replace("layers.1", "layers.3"))
        assert not other[~masks[name].unpack()].any()
    assert {"0", "1", "2", "3"} == {name.split(".")[2] for name in masks}


def test_a_block_that_runs_several_times_needs_a_method_without_data(texts, tmp_path):
    torch.manual_seed(0)
    config = AlbertConfig(
        **SMALL, embedding_size=16, num_hidden_layers=3, intermediate_size=64, pad_token_id=0
    )
    folder = pico.save(AlbertForMaskedLM(config).eval(), tmp_path / "model")
    run = prune(str(folder), Prune(method="magnitude"), tmp_path / "run")
    assert len(MaskSet.load(run / "masks.safetensors").masks) == 6
    spec = validate(Prune, {"method": "wanda", "calibration": {"length": 32}})
    with pytest.raises(NmsparseError, match="runs several times") as caught:
        prune(str(folder), spec, tmp_path / "other")
    assert "magnitude" in caught.value.hint and not (tmp_path / "other").exists()


def test_a_list_in_a_corner_is_not_taken_for_the_network():
    class Corner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)])
            self.large = nn.ModuleList([nn.Sequential(nn.Linear(64, 64)), Wide()])

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    assert "large.1" in find_blocks(Corner())
