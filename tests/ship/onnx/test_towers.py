"""A vision-language model becomes two graphs; each holds the weights of its tower, and what is in
none is counted."""

from __future__ import annotations

import json

import pytest

import nmsparse_deploy as nms
from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.ship.onnx import LinkMap
from nmsparse_deploy.ship.verify_run import not_checked
from tests.fixtures import small_vlm


def exported(name, folder, precisions=("fp16",), **settings):
    small_vlm.MODELS[name](folder / "model")
    run = nms.prune(
        str(folder / "model"), nms.Prune(method="magnitude", **settings), folder / "run"
    )
    return run, nms.export(run, nms.Export(precisions=precisions))


@pytest.mark.parametrize(
    "name",
    [
        "LLaVA",
        *(pytest.param(n, marks=pytest.mark.matrix) for n in ("Gemma 3 (vision)", "Idefics3")),
    ],
)
def test_each_tower_has_its_graph(name, tmp_path):
    run, (row,) = exported(name, tmp_path)
    masks = MaskSet.load(run / "masks.safetensors").masks.keys()
    links = {p.name: LinkMap.load(p) for p in (run / "onnx/fp16").glob("*.link.json")}
    here = {key: set(link.by_parameter()) for key, link in links.items()}
    assert here.keys() == {"model.link.json", "vision.link.json"}
    text, vision = here["model.link.json"], here["vision.link.json"]
    between = masks - text - vision  # what leads from one tower to the other
    assert all("projector" in name or "connector" in name for name in between)
    assert not text & vision and {*text, *vision} <= masks
    assert set(links["model.link.json"].elsewhere) == vision | between
    assert set(links["vision.link.json"].elsewhere) == text | between
    assert row.vision.links == 12 and row.vision.agreement.relative < 0.02
    assert "vision.onnx" in "\n".join(row.lines("x"))
    assert [report.ok for report in nms.verify(run)] == [True] * 3
    left = [place["why"] for place in not_checked(run) if place["place"] == "onnx"]
    assert bool(left) == bool(between) and all(str(len(between)) in why for why in left)


def test_a_tower_that_cannot_be_traced_is_said_and_not_hidden(tmp_path, capfd):
    run, (row,) = exported("Qwen2-VL", tmp_path)
    assert "def forward" not in "".join(capfd.readouterr())
    assert (
        "no graph of the tower that sees pictures: the sizes in it follow from the values of"
        in ("\n".join(row.lines("x")))
    )
    assert json.loads((run.path / "export.json").read_text())["files"][0]["vision"]["not_exported"]
    assert all(report.ok for report in nms.verify(run))
    left = [place["why"] for place in not_checked(run) if place["place"] == "onnx"]
    assert left == ["10 weights that only pictures reach are in no fp16 graph"]


def test_a_language_tower_alone_needs_one_graph(tmp_path):
    run, (row,) = exported("LLaVA", tmp_path, include=("*language_model*",))
    assert row.vision is None and "vision" not in row.to_json()
    assert [path.name for path in run.graphs()] == ["model.onnx"]


def test_eight_bits(tmp_path, pictures, texts):
    small_vlm.MODELS["LLaVA"](tmp_path / "model")
    data = f"{pictures}+{texts['calibration']}"
    spec = nms.Prune(
        method="magnitude", calibration=nms.Calibration(data=data, samples=4, length=16)
    )
    run = nms.prune(str(tmp_path / "model"), spec, tmp_path / "run")
    (row,) = nms.export(run, nms.Export(precisions=("int8",)))
    assert row.vision.links == 12 and all(report.ok for report in nms.verify(run))


def test_a_dense_weight_in_the_vision_graph_is_found(tmp_path):
    run, _ = exported("LLaVA", tmp_path)
    data = run / "onnx/fp16/vision.onnx.data"
    content = bytearray(data.read_bytes())
    link = LinkMap.load(run / "onnx/fp16/vision.link.json")
    data.write_bytes(bytes(byte or 0x11 for byte in content))
    assert link.rows and not all(report.ok for report in nms.verify(run))


@pytest.mark.parametrize("elsewhere", ["model", [1], {"a": 1}])
def test_a_damaged_list_is_refused(elsewhere, tmp_path):
    path = tmp_path / "x.link.json"
    LinkMap("x.onnx", ()).save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "elsewhere": elsewhere}))
    with pytest.raises(UsageError, match="is damaged"):
        LinkMap.load(path)
