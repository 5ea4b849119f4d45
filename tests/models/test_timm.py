"""timm models: loaded from a checkpoint, pruned, saved so that timm loads them; strangers' files
are refused."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import nmsparse_deploy as nms
from nmsparse_deploy import models
from nmsparse_deploy.errors import MissingExtra, NmsparseError, UsageError
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.prove.group_counter import check
from nmsparse_deploy.recipe import Evaluate, Export, Prune, validate


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtra, match="timm") as caught:
        models.load("timm:vit_tiny_patch16_224")
    assert "nmsparse-deploy[vision]" in caught.value.hint


def test_names():
    assert models.short_name("timm:vit_tiny?checkpoint=/a/b.safetensors") == "vit_tiny"
    assert (
        models.adapter_for("timm:x").library == "timm"
        and models.adapter_for("x").library == "transformers"
    )


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm")


@pytest.fixture(scope="module")
def checkpoint(timm, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("timm") / "weights.safetensors"
    save_file(timm.create_model("test_vit", num_classes=7).state_dict(), file)
    return file


@pytest.fixture(scope="module")
def folder(timm, tmp_path_factory) -> Path:
    """Two blocks, another input size: what save_for_hf has to remember."""
    torch.manual_seed(0)
    module = timm.create_model(
        "vit_tiny_patch16_224",
        depth=2,
        embed_dim=64,
        num_heads=2,
        img_size=32,
        patch_size=8,
        num_classes=0,
    )
    place = tmp_path_factory.mktemp("timm") / "tiny"
    timm.models.save_for_hf(module, str(place), safe_serialization=True)
    return place


def spec(data, method="sparsegpt") -> Prune:
    calibration = {"data": str(data), "samples": 4, "batch": 2}
    return validate(Prune, {"method": method, "calibration": calibration, "compute": "fp32"})


def test_a_checkpoint_is_pruned_and_timm_loads_the_run(timm, checkpoint, pictures, tmp_path):
    run = prune(f"timm:test_vit?checkpoint={checkpoint}", spec(pictures), tmp_path / "run")
    module = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True)
    assert module.num_classes == 7
    masks = MaskSet.load(run / "masks.safetensors").masks
    names = {name.split(".", 2)[2] for name in masks}
    assert names == {"attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}
    for name, mask in masks.items():
        assert check(module.get_parameter(name), mask.pattern, mask.axis).bad == 0
    again = timm.create_model(
        "test_vit", num_classes=7, checkpoint_path=str(run / "model/model.safetensors")
    )
    assert torch.equal(
        again.get_parameter("blocks.0.attn.qkv.weight"),
        module.get_parameter("blocks.0.attn.qkv.weight"),
    )
    assert json.loads((run / "model/config.json").read_text())["architecture"] == "test_vit"


def test_a_folder_through_the_whole_chain(folder, pictures, photos, tmp_path):
    run = prune(str(folder), spec(pictures), tmp_path / "run")
    (row,) = nms.export(run, Export(precisions=("fp32",)))
    assert row.agreement.max_abs < 1e-3 and all(report.ok for report in nms.verify(run))
    data = nms.evaluate(
        run, Evaluate(data=str(pictures), images=9, probe=12, photos=str(photos), onnx=True)
    )
    found = {r["metric"]: r["value"] for r in data["results"]["pruned"]}
    graph = {r["metric"]: r["value"] for r in data["results"]["pruned, ONNX fp32"]}
    assert "token_cosine@photos-32px" in found and graph.keys() == found.keys() - {
        "token_cosine@photos-32px"
    }
    assert graph["pooled_cosine@photos-32px"] == pytest.approx(
        found["pooled_cosine@photos-32px"], abs=1e-4
    )


def test_convolutions_of_timm(timm, pictures, tmp_path):
    torch.manual_seed(0)
    file = tmp_path / "resnet.pth"
    torch.save({"state_dict": timm.create_model("test_resnet", num_classes=3).state_dict()}, file)
    run = prune(f"timm:test_resnet?checkpoint={file}", spec(pictures, "wanda"), tmp_path / "run")
    module = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True)
    masks = MaskSet.load(run / "masks.safetensors").masks
    assert any(mask.shape[2:] == (3, 3) for mask in masks.values())
    assert all(check(module.get_parameter(n), m.pattern, 1).bad == 0 for n, m in masks.items())


def test_a_bare_name_is_tried_as_a_timm_model(timm):
    with pytest.raises(NmsparseError, match="hub cannot be reached"):
        models.load("test_vit")
    with pytest.raises(UsageError, match="no model 'vit_tny'"):
        models.load("timm:vit_tny")
    with pytest.raises(UsageError, match="not understood"):
        models.load("timm:test_vit?weights=x")


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('code from a checkpoint ran')",)


def test_checkpoints_of_strangers(timm, checkpoint, tmp_path):
    cases = {
        "evil.pth": pickle.dumps({"model": Evil()}),
        "cut.safetensors": checkpoint.read_bytes()[:-50],
        "text.pth": b"hello",
        "empty.safetensors": b"",
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UsageError, match=name) as caught:
            models.load(f"timm:test_vit?checkpoint={tmp_path / name}")
        assert "\n" not in caught.value.message
    torch.save({"model": Evil()}, tmp_path / "evil2.pth")
    with pytest.raises(UsageError, match="never run"):
        models.load(f"timm:test_vit?checkpoint={tmp_path / 'evil2.pth'}")
    save_file({"other": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match="does not fit timm:test_vit"):
        models.load(f"timm:test_vit?checkpoint={tmp_path / 'other.safetensors'}")
    with pytest.raises(UsageError, match="no checkpoint"):
        models.load("timm:test_vit?checkpoint=nowhere.pth")
