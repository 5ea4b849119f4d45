"""Top-1 and top-5 as timm's validation prints them, on pictures made here."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import nmsparse_deploy as nms
from nmsparse_deploy.cli import app, invoke
from nmsparse_deploy.errors import MissingExtra, NmsparseError, UsageError
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.measure.evaluate.imagenet import class_numbers, printed
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.recipe import Evaluate, Prune, validate
from nmsparse_deploy.registry import ADAPTERS
from tests.fixtures import small_vision as small

timm = pytest.importorskip("timm")
FIELDS = [
    "model",
    "top1",
    "top1_err",
    "top5",
    "top5_err",
    "param_count",
    "img_size",
    "crop_pct",
    "interpolation",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """train/CLASS and val/CLASS, as ImageNet is laid out."""
    folder = tmp_path_factory.mktemp("imagenet") / "colours"
    small.labelled(folder)
    (folder / "test").rename(folder / "val")
    return folder


@pytest.fixture(scope="module")
def timm_run(images, tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("timm") / "weights.safetensors"
    save_file(timm.create_model("test_vit", num_classes=3).state_dict(), file)
    spec = validate(
        Prune,
        {
            "method": "wanda",
            "compute": "fp32",
            "calibration": {"data": str(images), "samples": 4, "batch": 2},
        },
    )
    return prune(f"timm:test_vit?checkpoint={file}", spec, file.parent / "run")


def by_hand(module, images, settings) -> list[list[int]]:
    """Ranks of the classes for every picture, through timm's transform alone."""
    transform = timm.data.create_transform(
        input_size=settings["input_size"],
        interpolation=settings["interpolation"],
        mean=settings["mean"],
        std=settings["std"],
        crop_pct=settings["crop_pct"],
        crop_mode=settings["crop_mode"],
        is_training=False,
    )
    rows = []
    for number, name in enumerate(small.CLASSES):
        for file in sorted((images / "val" / name).iterdir()):
            with torch.inference_mode():
                logits = module(transform(Image.open(file).convert("RGB"))[None])[0]
            rows.append([number, *logits.argsort(descending=True).tolist()])
    return rows


def test_the_figures_are_those_of_timms_pipeline(timm_run, images, capfd):
    code = invoke(
        lambda: app(
            [
                "--json",
                "evaluate",
                str(timm_run.path),
                "--protocol",
                "imagenet",
                "--data",
                str(images),
            ]
        )
    )
    data = json.loads(capfd.readouterr().out)
    assert code == 0 and list(data["timm"]["pruned"]) == FIELDS
    module = timm.create_model(
        "test_vit", num_classes=3, checkpoint_path=str(timm_run / "model/model.safetensors")
    )
    rows = by_hand(module.eval(), images, timm.data.resolve_model_data_config(module))
    top1 = sum(row[1] == row[0] for row in rows) / len(rows)
    told = data["timm"]["pruned"]
    assert told["top1"] == round(100 * top1, 4) and told["top1_err"] == round(100 - 100 * top1, 4)
    assert told["top5"] == 100.0 and told["top5_err"] == 0.0  # three classes
    count = sum(parameter.numel() for parameter in module.parameters())
    assert told["param_count"] == round(count / 1e6, 2) and told["img_size"] == 160
    assert (
        told["crop_pct"] == module.pretrained_cfg["crop_pct"] and told["interpolation"] == "bicubic"
    )
    row = data["results"]["pruned"][0]
    assert (
        row["metric"] == "imagenet_top1"
        and row["samples"] == 18
        and row["value"] == pytest.approx(top1)
    )
    assert data["held_out"] == {"images_compared": 18, "overlaps": 0}
    assert data["difference"]["metric"] == "imagenet_top1"


def test_fewer_images_are_spread_and_named(timm_run, images):
    data = nms.evaluate(timm_run, Evaluate(protocols=("imagenet",), data=str(images), limit=6))
    row = data["results"]["dense"][0]
    assert row["metric"] == "imagenet_top1-of6" and row["samples"] == 6
    (pictures,) = {found["protocol"]["images"] for found in data["results"]["dense"]} | {6}
    assert pictures == 6


def test_a_transformers_classifier_by_its_labels(images, tmp_path):
    run = prune(
        str(small.classifier(tmp_path / "model")),
        validate(Prune, {"method": "magnitude"}),
        tmp_path / "run",
    )
    data = nms.evaluate(run, Evaluate(protocols=("imagenet",), data=str(images)))
    told = data["timm"]["pruned"]
    assert told["img_size"] == 32 and told["model"] == "model" and 0 <= told["top1"] <= 100


def test_pictures_that_were_calibrated_on_are_refused(timm_run, images, tmp_path):
    shutil.copytree(images, tmp_path / "mixed")
    for split in ("train",):
        for file in (images / split / "red").iterdir():
            shutil.copy(file, tmp_path / "mixed/val/red" / f"again-{file.name}")
        for name in ("blue", "green"):
            for file in (images / split / name).iterdir():
                shutil.copy(file, tmp_path / "mixed/val" / name / f"again-{file.name}")
    with pytest.raises(NmsparseError, match="were calibrated on"):
        nms.evaluate(timm_run, Evaluate(protocols=("imagenet",), data=str(tmp_path / "mixed")))


def test_a_damaged_picture_is_not_replaced_by_the_next(timm_run, images, tmp_path):
    shutil.copytree(images, tmp_path / "broken")
    next((tmp_path / "broken/val/red").iterdir()).write_bytes(b"no picture")
    with pytest.raises(NmsparseError, match="is damaged"):
        nms.evaluate(timm_run, Evaluate(protocols=("imagenet",), data=str(tmp_path / "broken")))


def test_folders_that_are_not_the_models_classes(timm_run, images, tmp_path):
    shutil.copytree(images / "val" / "red", tmp_path / "two/val/red")
    shutil.copytree(images / "val" / "blue", tmp_path / "two/val/blue")
    with pytest.raises(UsageError, match="2 folders of images, the model's head has 3 classes"):
        nms.evaluate(timm_run, Evaluate(protocols=("imagenet",), data=str(tmp_path / "two")))
    with pytest.raises(UsageError, match="no folder of images"):
        nms.evaluate(timm_run, Evaluate(protocols=("imagenet",), data=str(tmp_path / "nothing")))
    with pytest.raises(UsageError, match="needs a folder"):
        nms.evaluate(timm_run, Evaluate(protocols=("imagenet",)))
    with pytest.raises(UsageError, match="does not suit"):
        nms.evaluate(timm_run, Evaluate(protocols=("c4",)))
    with pytest.raises(UsageError, match="for language models"):
        nms.evaluate(timm_run, Evaluate(tasks=("piqa",)))


def test_wordnet_ids_are_known_to_an_imagenet_head():
    module = timm.create_model("test_vit", num_classes=1000)
    model = LoadedModel(module, "x", "x", "vision", ADAPTERS.load("timm"))
    assert class_numbers(model, ["n01440764", "n01443537", "n15075141"]) == {
        "n01440764": 0,
        "n01443537": 1,
        "n15075141": 999,
    }
    assert model.adapter.image_pipeline(model)["input_size"] == (3, 160, 160)


def test_rounding_is_timms():
    from nmsparse_deploy.measure.evaluate.result import mean_result

    rows = [
        mean_result("t", [1.0, 0.0, 0.0], "cpu", {}),
        mean_result("t", [1.0, 1.0, 0.0], "cpu", {}),
    ]
    told = printed(
        "m",
        rows,
        86_567_656,
        {"input_size": (3, 224, 224), "crop_pct": 0.9, "interpolation": "bicubic"},
    )
    assert asdict(told) == {
        "model": "m",
        "top1": 33.3333,
        "top1_err": 66.6667,
        "top5": 66.6667,
        "top5_err": 33.3333,
        "param_count": 86.57,
        "img_size": 224,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
    }


def test_without_timm_the_extra_is_named(timm_run, images, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "timm.data", None)
    with pytest.raises(MissingExtra, match="imagenet"):
        from nmsparse_deploy.measure.evaluate.imagenet import _dataset

        _dataset(str(images), {"input_size": (3, 8, 8)}, None, None)
