"""Vision-language models: both towers are calibrated on pictures and text, and pruned."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import nmsparse_deploy as nms
from nmsparse_deploy import models
from nmsparse_deploy.data.calibration_sample import draw
from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.find.calibration.block_walk import BlockWalk
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.recipe import Calibration
from tests.fixtures import small_vlm

SEEN = ("vision_tower.", "visual.", "vision_model.")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("vlm")
    for name, build in small_vlm.MODELS.items():
        build(place / name)
    return {name: place / name for name in small_vlm.MODELS}


@pytest.fixture(scope="module")
def data(pictures, texts):
    return f"{pictures}+{texts['calibration']}"


def spec(data, method="wanda", **settings):
    calibration = Calibration(data=data, samples=8, length=24)
    return nms.Prune(method=method, calibration=calibration, compute="fp32", **settings)


def in_vision(name):
    return any(part in name for part in SEEN)


@pytest.mark.parametrize("name", small_vlm.MODELS)
def test_both_towers_are_pruned_verified_and_loaded_again(name, folders, data, tmp_path):
    run = nms.prune(str(folders[name]), spec(data), tmp_path / "run")
    masks = MaskSet.load(run / "masks.safetensors").masks
    assert any(map(in_vision, masks)) and not all(map(in_vision, masks))
    assert all(report.ok for report in nms.verify(run))
    plan = json.loads((run.path / "plan.json").read_text())
    assert not [row for row in plan["skipped"] if "did not run" in row["reason"]]
    again = models.load(str(run / "model"))
    assert again.image_text is not None and again.provenance.get("pictures") is None
    with torch.no_grad():
        assert torch.isfinite(again.module(**again.trial_inputs()).logits).all()


@pytest.mark.parametrize("name", small_vlm.MODELS)
def test_statistics_are_those_of_a_plain_forward_pass(name, folders, data):
    """Block by block through both towers, every layer reads what it reads in the whole model."""
    loaded = models.load(str(folders[name]), torch.float32)
    found = loaded.discover()
    sample = draw(loaded, Calibration(data=data, samples=4, length=24))
    batches = loaded.batches(sample.inputs, 2)
    squares: dict[str, torch.Tensor] = {}

    def add(path):
        def hook(_layer, args):
            rows = args[0].detach().float().flatten(0, -2)
            squares[path] = squares.get(path, 0) + rows.square().sum(0)

        return hook

    layers = {t.module for t in found.targets}
    hooks = [loaded.module.get_submodule(p).register_forward_pre_hook(add(p)) for p in layers]
    with torch.no_grad():
        for batch in batches:
            loaded.module(**batch)
    for hook in hooks:
        hook.remove()
    walk = BlockWalk(loaded.module, found.blocks, batches)
    for index in range(len(found.blocks)):
        targets = found.of_block(index)
        statistics = walk.statistics(index, targets, "norms")
        for target in targets:
            sums = statistics[target.fusion].square_sum
            assert torch.allclose(sums, squares[target.module], rtol=1e-3), target.name
        if index + 1 < len(found.blocks):
            walk.advance(index)


def test_one_tower_is_chosen_by_name(folders, data, tmp_path):
    chosen = spec(data, include=("model.visual*",))
    run = nms.prune(str(folders["Qwen2-VL"]), chosen, tmp_path / "run")
    masks = MaskSet.load(run / "masks.safetensors").masks
    assert len(masks) == 10 and all(map(in_vision, masks))


@pytest.mark.parametrize("method", ["sparsegpt", "maskllm"])
def test_other_kinds_of_methods(method, folders, data, tmp_path):
    learn = {"learn": {"steps": 2, "evaluate_every": 2, "priors": ["magnitude"]}}
    settings = learn if method == "maskllm" else {"sequential": True}
    chosen = nms.Prune.model_validate(
        {**spec(data).model_dump(exclude_unset=True), "method": method, **settings}
    )
    run = nms.prune(str(folders["LLaVA"]), chosen, tmp_path / "run")
    assert all(report.ok for report in nms.verify(run))


def test_pictures_have_captions_and_both_kinds_of_data_are_recorded(folders, data):
    loaded = models.load(str(folders["LLaVA"]))
    sample = draw(loaded, Calibration(data=data, samples=6, length=40))
    ids = sample.inputs["input_ids"][:, 0]
    words = loaded.processor.batch_decode(ids)
    for text, label in zip(words, sample.images.labels):
        assert f"Describe the picture.A picture of: {label}.\n" in text
    assert (ids == loaded.module.config.image_token_id).sum(1).tolist() == [16] * 6
    assert sample.record().keys() == {"ids", "image_sha256"}
    assert sample.to_json()["images"]["samples"] == 6 and sample.to_json()["text"]["length"] == 40
    again = draw(loaded, Calibration(data=data, samples=6, length=40))
    assert all(torch.equal(value, again.inputs[name]) for name, value in sample.inputs.items())


def test_what_is_not_named_is_packaged(pictures, texts):
    from nmsparse_deploy.data.image_text import sources

    text = str(texts["calibration"])
    assert sources("", "P", "T") == ("P", "T")
    assert sources(str(pictures), "P", "T") == (str(pictures), "T")
    assert sources(text, "P", "T") == ("P", text)
    assert sources(f"{text}+fashion-mnist+bbc", "P", "T") == ("fashion-mnist", f"{text}+bbc")


def without_a_processor(folder):
    (folder / "processor_config.json").unlink()


def with_another_models_processor(folder):
    config = json.loads((folder / "config.json").read_text()) | {"image_token_index": 9}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "spoil,reason",
    [(without_a_processor, "want of a processor"), (with_another_models_processor, "not match")],
)
def test_the_language_tower_alone_is_pruned_on_text(spoil, reason, folders, texts, tmp_path):
    folder = shutil.copytree(folders["LLaVA"], tmp_path / "model")
    spoil(folder)
    said = []
    run = nms.prune(
        str(folder),
        spec(str(texts["calibration"])),
        tmp_path / "run",
        progress=lambda text, *_: said.append(text),
    )
    masks = MaskSet.load(run / "masks.safetensors").masks
    assert masks and not any(map(in_vision, masks))
    (note,) = [text for text in said if text.startswith("only text is calibrated")]
    assert reason in note and run.manifest().stages["prune"].provenance["pictures"] == note
    assert "\n" not in note


def test_a_processor_that_fails_is_one_sentence(folders, data, monkeypatch):
    loaded = models.load(str(folders["LLaVA"]))

    def fails(**_):
        raise RuntimeError("no kernels\nfor this")

    monkeypatch.setattr(type(loaded.image_text.processor), "__call__", lambda _self, **_: fails())
    with pytest.raises(NmsparseError, match="LlavaProcessor does not take a picture: no kernels"):
        draw(loaded, Calibration(data=data, samples=4, length=24))


def test_too_little_data_and_too_long_samples(folders, data, texts, pictures):
    loaded = models.load(str(folders["LLaVA"]))
    with pytest.raises(UsageError, match="images, not 900"):
        draw(loaded, Calibration(data=f"{pictures}+{texts['calibration']}", samples=900, length=8))
    with pytest.raises(UsageError, match="longer than the 1024"):
        draw(loaded, Calibration(data=data, samples=4, length=1020))


def test_a_streamed_model_gets_the_same_masks(folders, data, tmp_path):
    whole = nms.prune(str(folders["Gemma 3 (vision)"]), spec(data), tmp_path / "whole")
    streamed = nms.prune(
        str(folders["Gemma 3 (vision)"]), spec(data), tmp_path / "streamed", max_memory=2 << 30
    )
    masks = [MaskSet.load(run / "masks.safetensors").masks for run in (whole, streamed)]
    assert masks[0].keys() == masks[1].keys()
    assert all((mask.bits == masks[1][name].bits).all() for name, mask in masks[0].items())


def test_evaluation_reads_text(folders, data, texts, tmp_path):
    run = nms.prune(str(folders["LLaVA"]), spec(data), tmp_path / "run")
    nms.evaluate(
        run, nms.Evaluate(data=str(texts["held_out"]), tokens=256, context=64, continuation=0)
    )
    assert json.loads((run.path / "evaluate.json").read_text())["results"]
