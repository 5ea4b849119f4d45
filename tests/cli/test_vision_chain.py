"""Prune, verify, export, evaluate: vision models and encoders of two blocks through the whole
chain."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

import nmsparse_deploy as nms
from nmsparse_deploy import models
from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.prove.group_counter import check
from nmsparse_deploy.recipe import Evaluate, Export, Prune, validate
from tests.fixtures import pico
from tests.fixtures import small_vision as small


def spec(data, method="sparsegpt", **changes) -> Prune:
    calibration = {"data": str(data), "samples": 6, "length": 32, "batch": 2}
    return validate(
        Prune, {"method": method, "calibration": calibration, "compute": "fp32", **changes}
    )


def holds(run, module) -> None:
    masks = MaskSet.load(run / "masks.safetensors").masks
    parameters = dict(module.named_parameters())
    assert masks and masks.keys() <= parameters.keys()
    for name, mask in masks.items():
        assert check(parameters[name], mask.pattern, mask.axis).bad == 0
        assert (parameters[name][~mask.unpack()] == 0).all()


def by_name(data, label):
    return {row["metric"]: row for row in data["results"][label]}


def test_a_vision_transformer(pictures, photos, tmp_path):
    run = prune(str(small.dinov2(tmp_path / "dino")), spec(pictures), tmp_path / "run")
    holds(run, AutoModel.from_pretrained(run / "model"))
    AutoImageProcessor.from_pretrained(run / "model")
    record = run.manifest().stages["prune"]
    assert record.layers == 12 and record.calibration["ids"][0].startswith("colours/train/")
    assert all(row["relative_error"] < 1 for row in run.read_json("layers.json"))
    (row,) = nms.export(run, Export(precisions=("fp32",)))
    assert row.agreement.max_abs < 1e-3 and row.links == 12
    assert all(report.ok for report in nms.verify(run))
    data = nms.evaluate(
        run, Evaluate(data=str(pictures), images=18, probe=30, photos=str(photos), onnx=True)
    )
    dense, pruned = by_name(data, "dense"), by_name(data, "pruned")
    graph = by_name(data, "pruned, ONNX fp32")
    assert dense.keys() < pruned.keys() == graph.keys()
    assert {
        "probe_top1@colours-56px",
        "knn20_top1@colours-56px",
        "token_cosine@photos-56px",
    } <= pruned.keys()
    assert dense["probe_top1@colours-56px"]["value"] > 0.9  # three colours are easy
    for name, result in pruned.items():
        assert graph[name]["value"] == pytest.approx(result["value"], abs=0.02)
        assert (
            result["samples"] == len(result["per_sample"])
            and result["protocol"]["data_fingerprint"]
        )
    assert 0.1 < pruned["token_cosine@photos-56px"]["value"] < 1
    assert data["difference"]["metric"] == "probe_top1@colours-56px"
    assert data["held_out"] == {"images_compared": 22, "overlaps": 0}
    assert json.loads((run / "evaluate.json").read_text())["samples"]["labelled"]["ids"]


def test_evaluation_images_must_not_be_calibrated_on(pictures, photos, tmp_path):
    run = prune(str(small.dinov2(tmp_path / "dino")), spec(pictures, "wanda"), tmp_path / "run")
    with pytest.raises(NmsparseError, match="were calibrated on"):
        nms.evaluate(run, Evaluate(data=str(pictures / "train"), images=36, probe=2, photos=""))
    assert not (run / "evaluate.json").exists()


@pytest.mark.parametrize("onnx", [False, pytest.param(True, marks=pytest.mark.matrix)])
def test_a_classifier_keeps_its_head(pictures, photos, tmp_path, onnx):
    run = prune(str(small.classifier(tmp_path / "vit")), spec(pictures), tmp_path / "run")
    module = AutoModelForImageClassification.from_pretrained(run / "model")
    holds(run, module)
    assert module.config.id2label[0] == "blue"
    if onnx:
        nms.export(run, Export(precisions=("fp32",)))
    data = nms.evaluate(
        run, Evaluate(data=str(pictures), images=18, probe=18, photos=str(photos), onnx=onnx)
    )
    for label in ("pruned", "pruned, ONNX fp32")[: 1 + onnx]:
        assert {"head_top1@colours-32px", "kl@colours-32px", "same_top1@photos-32px"} <= by_name(
            data, label
        ).keys()
    with pytest.raises(UsageError, match="64 x 64"):
        nms.evaluate(run, Evaluate(data=str(pictures), size=64, photos=""))


def test_a_convolutional_network_groups_along_its_input_channels(pictures, photos, tmp_path):
    run = prune(str(small.resnet(tmp_path / "resnet")), spec(pictures), tmp_path / "run")
    module = AutoModel.from_pretrained(run / "model")
    holds(run, module)
    masks = MaskSet.load(run / "masks.safetensors").masks
    kernels = [name for name, mask in masks.items() if len(mask.shape) == 4 and mask.shape[2] == 3]
    assert len(kernels) >= 3 and {mask.axis for mask in masks.values()} == {1}
    weight = module.get_parameter(kernels[0])
    groups = weight.permute(0, 2, 3, 1).reshape(
        -1, 4
    )  # [M, R, S, C]: the channels of one kernel position
    assert int((groups != 0).sum(1).max()) == 2
    (row,) = nms.export(run, Export(precisions=("fp32",)))
    assert row.agreement.max_abs < 1e-3 and all(report.ok for report in nms.verify(run))
    data = nms.evaluate(
        run, Evaluate(data=str(pictures), images=6, probe=12, photos=str(photos), size=32)
    )
    assert "token_cosine@photos-224px" in by_name(data, "pruned")


def test_pictures_without_classes_still_give_agreement(pictures, photos, tmp_path):
    run = prune(str(small.dinov2(tmp_path / "dino")), spec(pictures, "magnitude"), tmp_path / "run")
    data = nms.evaluate(run, Evaluate(data=str(photos), photos=""))
    assert by_name(data, "pruned").keys() == {
        "pooled_cosine@photos-56px",
        "token_cosine@photos-56px",
    }
    assert data["difference"] is None and data["held_out"]["images_compared"] is None


def rated(folder):
    lines = [
        f"{'ab' * n}\t{'ab' * m} c\t{5 - abs(n - m)}" for n in range(3, 8) for m in range(3, 8)
    ]
    file = folder / "pairs.tsv"
    file.write_text("first\tsecond\trating\n" + "\n".join(lines))
    return file


def test_a_text_encoder(texts, tmp_path):
    run = prune(str(small.bert(tmp_path / "bert")), spec(texts["calibration"]), tmp_path / "run")
    holds(run, AutoModel.from_pretrained(run / "model"))
    (row,) = nms.export(run, Export(precisions=("fp32",)))
    assert row.agreement.max_abs < 1e-3 and all(report.ok for report in nms.verify(run))
    data = nms.evaluate(run, Evaluate(data=str(rated(tmp_path)), onnx=True))
    dense, pruned, graph = (
        by_name(data, label) for label in ("dense", "pruned", "pruned, ONNX fp32")
    )
    assert (
        -1 <= dense["sts_spearman@pairs"]["value"] <= 1
        and dense["sts_spearman@pairs"]["standard_error"] > 0
    )
    assert graph["pooled_cosine@pairs"]["value"] == pytest.approx(
        pruned["pooled_cosine@pairs"]["value"], abs=1e-4
    )
    assert (
        data["difference"]["low"] <= data["difference"]["difference"] <= data["difference"]["high"]
    )
    assert data["held_out"]["sentences_compared"] > 0


def test_encoders_are_calibrated_on_whole_sequences(texts, tmp_path):
    from nmsparse_deploy.data.calibration_sample import draw
    from nmsparse_deploy.recipe import Calibration

    loaded = models.load(str(small.bert(tmp_path / "bert")))
    sample = draw(loaded, Calibration(data=str(texts["calibration"]), samples=3, length=999))
    ids, mask = sample.inputs["input_ids"], sample.inputs["attention_mask"]
    assert ids.shape == (3, 64) and bool(
        mask.all()
    )  # no longer than the model reads, and no padding
    assert (ids[:, 0] == 1).all() and (ids[:, -1] == 2).all() and (ids[:, 1:-1] > 2).all()


def test_a_sentence_of_the_calibration_text_is_not_held_out(texts, tmp_path):
    run = prune(str(small.bert(tmp_path / "bert")), spec(texts["calibration"]), tmp_path / "run")
    from safetensors.torch import load_file

    ids = load_file(run / "calibration.safetensors")["ids"][0, 5:25].tolist()
    stolen = "".join(small.tokenizer().convert_ids_to_tokens(ids)).replace("Ġ", " ").strip()
    file = tmp_path / "stolen.tsv"
    file.write_text("\n".join([f"{stolen}\tnew\t1", "one\ttwo\t2", "three\tfour\t3"]))
    with pytest.raises(NmsparseError, match="lies in the calibration text"):
        nms.evaluate(run, Evaluate(data=str(file)))


def test_the_same_bits_after_a_resume(pictures, tmp_path):
    class Stop(Exception):
        pass

    def stop(text, done=0, total=0):
        if "block 1" in text:
            raise Stop

    folder = str(small.dinov2(tmp_path / "dino"))
    whole = prune(folder, spec(pictures), tmp_path / "whole")
    with pytest.raises(Stop):
        prune(folder, spec(pictures), tmp_path / "cut", progress=stop)
    resumed = prune(folder, spec(pictures), tmp_path / "cut")
    assert (resumed / "masks.safetensors").read_bytes() == (
        whole / "masks.safetensors"
    ).read_bytes()


def test_what_a_name_turned_out_to_be_is_said(pictures, tmp_path):
    said = []
    prune(
        str(small.dinov2(tmp_path / "dino")),
        spec(pictures, "magnitude"),
        tmp_path / "run",
        progress=lambda text, *_: said.append(text),
    )
    assert any("local folder" in text and "Dinov2Model" in text for text in said)


def test_text_models_still_refuse_pictures(llama_dir, pictures, tmp_path):
    with pytest.raises(UsageError):
        prune(str(llama_dir), spec(pictures), tmp_path / "run")
    assert pico.VOCABULARY and not (tmp_path / "run").exists()
    assert torch.is_tensor(models.load(str(llama_dir)).sample_inputs()["input_ids"])
