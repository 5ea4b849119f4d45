"""Loading diffusion transformers, finding what can be pruned in them, and walking their blocks."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch

from nmsparse_deploy import models
from nmsparse_deploy.errors import MissingExtra, NmsparseError, UsageError
from nmsparse_deploy.find.calibration.block_walk import BlockWalk
from nmsparse_deploy.find.calibration.layer_stats import StatsAccumulator
from nmsparse_deploy.models.adapters import diffusers as diffusion
from nmsparse_deploy.models.discovery import discover
from tests.fixtures import small_diffusion as small

NAMES = tuple(small.ARGUMENTS)
HIDDEN = "hidden_states"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        name: models.load(str(small.family(name, folder / str(number))))
        for number, name in enumerate(NAMES)
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_forward_pass_is_fed_from_signature_and_settings(loaded, name):
    model = loaded[name]
    inputs = model.sample_inputs(3, 7)
    assert set(inputs) == {HIDDEN, "timestep", *small.ARGUMENTS[name]}
    assert {len(value) for value in inputs.values()} == {3}
    with torch.no_grad():
        assert model.module(**inputs).sample.shape[0] == 3
    assert (model.family, model.adapter.library, model.input_name) == (
        "diffusion",
        "diffusers",
        HIDDEN,
    )


@pytest.mark.parametrize("name", NAMES)
def test_what_reads_one_row_a_sample_stays_dense(loaded, name):
    """Modulation, timestep and label embedding have one row a sample; final projection and patches
    are outside."""
    found = discover(loaded[name].module, loaded[name].sample_inputs())
    assert len(found.blocks) == 2
    kinds = {target.name.split(".", 2)[2] for target in found.targets}
    assert not [kind for kind in kinds if "norm" in kind or "emb" in kind]
    reasons = {skipped.name: skipped.reason for skipped in found.skipped}
    inside = [reason for path, reason in reasons.items() if "norm1.linear" in path]
    assert all("one row per sample" in reason for reason in inside) and (inside or name == "PixArt")
    assert "outside" in reasons["pos_embed.proj.weight"]
    fused = {}
    for target in found.targets:
        fused.setdefault(target.fusion, set()).add(target.name.split(".", 2)[2])
    first = "attn.to_{}.weight" if name.startswith("SD3") else "attn1.to_{}.weight"
    assert {first.format(letter) for letter in "qkv"} in fused.values()
    if name.startswith("SD3"):
        assert {f"attn.add_{letter}_proj.weight" for letter in "qkv"} in fused.values()
    if name == "PixArt":
        assert {"attn2.to_k.weight", "attn2.to_v.weight"} in fused.values()


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_stream_is_what_the_last_block_reads(loaded, name):
    model, seen = loaded[name], []
    inputs = model.sample_inputs(4, 7)
    blocks = discover(model.module, inputs).blocks
    handle = model.module.get_submodule(blocks[-1]).register_forward_pre_hook(
        lambda _m, args, named: seen.append(args[0] if args else named[HIDDEN]), with_kwargs=True
    )
    model.module(**inputs)
    handle.remove()
    walk = BlockWalk(model.module, blocks, [inputs])
    walk.advance(0)
    assert torch.equal(walk.hidden[0], seen[0])
    wanted = walk._stream.wiring.place
    assert wanted == (1 if name.startswith("SD3") else 0)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_those_of_the_whole_model(loaded, name):
    """Every fusion group of the last block, of both streams, against hooks in a plain forward
    pass."""
    model = loaded[name]
    inputs = model.sample_inputs(4, 7)
    found = discover(model.module, inputs)
    targets = found.of_block(1)
    totals = {target.fusion: StatsAccumulator("gram") for target in targets}
    readers = {target.fusion: target for target in targets}
    handles = [
        model.module.get_submodule(target.module).register_forward_pre_hook(
            lambda layer, args, fusion=fusion: totals[fusion].update(layer, args[0])
        )
        for fusion, target in readers.items()
    ]
    model.module(**inputs)
    for handle in handles:
        handle.remove()
    for both in (False, True):
        walk = BlockWalk(model.module, found.blocks, [inputs], both=both)
        walk.statistics(0, found.of_block(0), "gram")
        walk.advance(0)
        stats = walk.statistics(1, targets, "gram")
        for fusion, total in totals.items():
            wanted = total.finish()
            assert stats[fusion].tokens == wanted.tokens
            assert torch.allclose(stats[fusion].gram, wanted.gram, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_only_the_last_block_of_two_streams_can_be_finished(loaded):
    model = loaded["SD3 (MMDiT)"]
    inputs = model.sample_inputs(4, 7)
    walk = BlockWalk(model.module, discover(model.module, inputs).blocks, [inputs], both=True)
    walk.statistics(0, discover(model.module, inputs).of_block(0), "norms")
    with pytest.raises(NmsparseError, match="two streams"):
        walk.finish(0, 0, walk.hidden[0])
    walk.advance(0)
    walk.statistics(1, discover(model.module, inputs).of_block(1), "norms")
    block = model.module.get_submodule(walk.blocks[1])
    whole = walk.finish(1, 0, walk.run(block, 1, 0, walk.hidden[0]))
    assert torch.allclose(whole.sample, model.module(**inputs).sample, atol=1e-5)


def test_a_pipeline_brings_scheduler_and_autoencoder(tmp_path):
    folder = small.pipeline(tmp_path / "pipeline")
    model = models.load(f"diffusers:{folder}", torch.bfloat16)
    assert (
        type(model.module).__name__ == "DiTTransformer2DModel"
        and model.module.dtype == torch.bfloat16
    )
    assert (
        type(model.processor.scheduler).__name__ == "DDIMScheduler" and not model.processor.assumed
    )
    assert model.name == "pipeline" and models.short_name(model.source) == "pipeline"
    assert "a local folder" in models.described(model.source, model)
    alone = models.load(
        f"{folder}/transformer?vae={folder}/vae".replace(str(folder), f"diffusers:{folder}", 1)
    )
    assert alone.processor.assumed and alone.processor.preprocess == model.processor.preprocess


def test_the_stored_dtype_is_kept_and_saving_keeps_every_bit(tmp_path):
    small.family("DiT", tmp_path / "dit")
    module = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "dit").to(torch.float16)
    module.save_pretrained(tmp_path / "half")
    model = models.load(str(tmp_path / "half"))
    assert model.module.dtype == torch.float16 and model.processor.assumed
    model.save(tmp_path / "saved")
    again = diffusers.DiTTransformer2DModel.from_pretrained(
        tmp_path / "saved", torch_dtype=torch.float16
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.module.state_dict().values(), again.state_dict().values())
    )
    assert not (tmp_path / "saved/scheduler").exists()


def test_bad_input_is_one_sentence(tmp_path, monkeypatch):
    folder = small.family("DiT", tmp_path / "dit")
    cases = [
        (f"diffusers:{tmp_path}/nowhere", "no diffusion model"),
        (f"diffusers:{tmp_path}", "no config.json"),
        (f"diffusers:{folder}?vae={tmp_path}", "no autoencoder"),
        (f"diffusers:{folder}?size=3", "not understood"),
    ]
    for source, said in cases:
        with pytest.raises(UsageError, match=said):
            models.load(source)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "_class_name": "os"}))
    with pytest.raises(UsageError, match="knows no model 'os'"):
        models.load(str(folder))
    (folder / "config.json").write_text(json.dumps(settings))
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(UsageError, match=r"damaged|truncated"):
        models.load(str(folder))
    monkeypatch.setattr(diffusion, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra) as caught:
        models.load(str(folder))
    assert "[diffusion]" in caught.value.hint


def test_arguments_that_nothing_can_fill_in_are_named(tmp_path):
    torch.manual_seed(0)
    diffusers.FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        in_channels=4,
        axes_dims_rope=(4, 4, 8),
    ).save_pretrained(tmp_path / "flux")
    with pytest.raises(NmsparseError, match="img_ids"):
        models.load(str(tmp_path / "flux"))
