"""The stream through models in which something lies between blocks: it is what the whole pruned
model computes there."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.find.calibration.block_runner import BlockRunner
from nmsparse_deploy.find.calibration.block_walk import BlockWalk
from nmsparse_deploy.find.calibration.block_wiring import find_wiring
from nmsparse_deploy.models.discovery import discover, find_blocks

TEXT = {"vocab_size": 64, "d_model": 32}
SMALL = {"d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4, "decoder_start_token_id": 0}
SPEECH = {
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
WHISPER = {
    **TEXT,
    **SPEECH,
    "num_mel_bins": 8,
    "max_source_positions": 8,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "decoder_start_token_id": 0,
}
STAGES = {
    "image_size": 32,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 2],
    "patch_size": 2,
    "window_size": 4,
}
CONV = {"hidden_sizes": [16, 32], "depths": [2, 1], "num_stages": 2}
LIBRARY = {
    "t5": ("T5ForConditionalGeneration", "T5Config", {**TEXT, **SMALL}, 6, {0, 1, 3, 4}),
    "bart": ("BartForConditionalGeneration", "BartConfig", {**TEXT, **SPEECH}, 5, {0, 2}),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER, 5, {0, 2}),
    "swin": ("SwinModel", "SwinConfig", STAGES, 5, {0}),
    "convnext": ("ConvNextModel", "ConvNextConfig", CONV, 4, {0, 2}),
}


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, hidden, other=None):
        moved = self.linear(self.norm(hidden)) + (
            0 if other is None else other.mean(1, keepdim=True)
        )
        return hidden + moved


class Named(nn.Module):
    """Hidden states by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Inner() for _ in range(3)])

    def forward(self, x):
        for block in self.blocks:
            x = block(hidden=x)
        return x


class Skip(Named):
    """The last block reads what left the first, and hidden states are scaled on the way."""

    def forward(self, x):
        first = x = self.blocks[0](x)
        x = self.blocks[1](x) * 0.5
        return self.blocks[2](x, first)


class Double(nn.Module):
    """Blocks with two streams that read each other, and another class of them behind."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, y):
            return x + self.one(x + y), y + self.two(y * x)

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.ModuleList([Double.Pair() for _ in range(3)])
        self.singles = nn.ModuleList([Inner() for _ in range(2)])

    def forward(self, x):
        y = x.flip(1)
        for pair in self.pairs:
            x, y = pair(x, y)
        x = torch.cat([x, y], 1)
        for single in self.singles:
            x = single(x)
        return x


class Swapped(nn.Module):
    """Lists that run in another order than they were made in."""

    def __init__(self) -> None:
        super().__init__()
        self.after = nn.ModuleList([Inner(), Inner()])
        self.before = nn.ModuleList([Inner(), Inner()])

    def forward(self, x):
        for block in (*self.before, *self.after):
            x = block(x)
        return x


TOYS = {
    "named": (Named, 3, {0}),
    "skip": (Skip, 3, {0, 1, 2}),
    "double": (Double, 5, {0, 1, 2, 3}),
    "swapped": (Swapped, 4, {0}),
}


def case(name):
    torch.manual_seed(0)
    if name in TOYS:
        make, blocks, starts = TOYS[name]
        return make().eval(), [{"x": torch.randn(2, 5, 8)} for _ in range(2)], blocks, starts
    kind, config, settings, blocks, starts = LIBRARY[name]
    module = getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()
    ids = torch.randint(0, 64, (2, 2, 8))
    if name == "whisper":
        return (
            module,
            [
                {
                    "input_features": torch.randn(2, 8, 16),
                    "decoder_input_ids": i,
                    "use_cache": False,
                }
                for i in ids
            ],
            blocks,
            starts,
        )
    if name in ("t5", "bart"):
        return (
            module,
            [{"input_ids": i, "decoder_input_ids": i.flip(1), "use_cache": False} for i in ids],
            blocks,
            starts,
        )
    return module, [{"pixel_values": torch.randn(2, 3, 32, 32)} for _ in range(2)], blocks, starts


@torch.no_grad()
def entrances(module, blocks, batch):
    """What every block is fed in a forward pass of the whole model."""
    seen = {}
    handles = [
        module.get_submodule(path).register_forward_pre_hook(
            lambda _m, args, named, path=path: seen.update(
                {path: args[0] if args else next(iter(named.values()))}
            ),
            with_kwargs=True,
        )
        for path in blocks
    ]
    module(**batch)
    for handle in handles:
        handle.remove()
    return [seen[path] for path in blocks]


@pytest.mark.parametrize("name", [*LIBRARY, *TOYS])
@torch.no_grad()
def test_both_streams_are_what_whole_models_compute(name):
    """Before every block the pruned stream is what the model pruned so far feeds it, the dense one
    what the dense does."""
    module, batches, count, _ = case(name)
    found = discover(module, batches[0])
    blocks = found.blocks
    assert len(blocks) == count
    dense = [entrances(module, blocks, batch) for batch in batches]
    walk = BlockWalk(module, blocks, batches, both=True)
    for index, path in enumerate(blocks):
        for number, batch in enumerate(batches):
            assert torch.equal(walk.hidden[number], entrances(module, blocks, batch)[index])
            assert torch.equal(walk.dense[number], dense[number][index])
        if index % 2:
            walk.pass_dense(index)
        else:
            walk.statistics(index, found.of_block(index), "gram")
        for parameter in module.get_submodule(path).parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.7)
        if index + 1 < len(blocks):
            walk.advance(index)
    assert not torch.equal(walk.hidden[0], dense[0][-1])


@pytest.mark.parametrize("name", [*LIBRARY, *TOYS])
def test_the_model_is_asked_only_where_it_has_to_be(name):
    module, batches, _, starts = case(name)
    assert (
        find_wiring(
            BlockRunner(module, discover(module, batches[0]).blocks, torch.float32), batches[0]
        ).starts
        == starts
    )


@torch.no_grad()
def test_statistics_behind_the_encoder_see_the_pruned_encoder():
    """Witness: the cross attention's key input in a whole model with a pruned encoder."""
    module, batches, _, _ = case("t5")
    found = discover(module, batches[0])
    walk = BlockWalk(module, found.blocks, batches)
    for index in range(4):
        if index < 3:
            for target in found.of_block(index):
                module.get_parameter(target.name).mul_(0.5)
        walk.advance(index)
    key = "decoder.block.1.layer.1.EncDecAttention.k"
    fusion = next(t.fusion for t in found.targets if t.module == key)
    got = walk.statistics(4, found.of_block(4), "gram")[fusion]
    rows = []
    handle = module.get_submodule(key).register_forward_pre_hook(
        lambda _m, args: rows.append(args[0].reshape(-1, 32))
    )
    for batch in batches:
        module(**batch)
    handle.remove()
    torch.testing.assert_close(got.gram, torch.cat(rows).T @ torch.cat(rows))


def test_nothing_of_the_model_is_changed_by_the_survey():
    module, batches, _, _ = case("swin")
    blocks = discover(module, batches[0]).blocks
    find_wiring(BlockRunner(module, blocks, torch.float32), batches[0])
    assert not any(
        "forward" in vars(m) or m._forward_pre_hooks or m._forward_hooks for m in module.modules()
    )


def test_a_stage_is_not_a_block_but_experts_are_not_blocks_either():
    assert find_blocks(case("swin")[0]) == tuple(
        f"encoder.layers.{s}.blocks.{n}" for s in range(2) for n in range(2)
    )
    assert find_blocks(case("convnext")[0])[-1] == "encoder.stages.1.layers.0"


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("swin", "encoder.layers.0.downsample"),
        ("convnext", "encoder.stages.1.downsampling_layer.1"),
    ],
)
def test_what_runs_between_two_blocks_is_a_block(name, beside):
    module, batches, _, _ = case(name)
    found = discover(module, batches[0])
    assert found.blocks[2] == beside and set(found.blocks) == {*find_blocks(module), beside}
    assert [target.module.startswith(beside) for target in found.of_block(2)] == [True]


class Shared(Named):
    def forward(self, x):
        for _ in range(2):
            x = super().forward(x)
        return x


def test_a_block_that_runs_several_times_is_discovered_and_said_to():
    found = discover(Shared(), {"x": torch.randn(2, 5, 8)})
    assert found.shared == found.blocks


class Random(Named):
    def forward(self, x):
        for block in self.blocks:
            x = block(x + torch.randn_like(x))
        return x


def test_a_model_that_never_computes_the_same_twice_is_refused():
    module = Random()
    with pytest.raises(NmsparseError, match="cannot be followed"):
        BlockWalk(module, find_blocks(module), [{"x": torch.randn(2, 5, 8)}])


def test_mixed_blocks_are_found_where_there_are_no_others():
    class Other(Inner):
        pass

    class Mixed(Named):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Inner(), Other(), Inner()])

    assert find_blocks(Mixed()) == ("blocks.0", "blocks.1", "blocks.2")
