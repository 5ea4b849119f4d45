"""The export stage on a run: int8 with a cache, and what it says where TensorRT-RTX is not
installed."""

from __future__ import annotations

import builtins
import json
from dataclasses import replace

import pytest

import nmsparse_deploy as nms
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.measure.report.build import build_report
from nmsparse_deploy.recipe import Calibration, Export, Prune
from nmsparse_deploy.ship.onnx.record import CompileOutcome

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def exported(llama_dir, texts, tmp_path_factory):
    """A run with an int8 export, made without TensorRT-RTX."""
    calibration = Calibration(data=str(texts["calibration"]), samples=4, length=32)
    run = prune(
        str(llama_dir),
        Prune(method="magnitude", calibration=calibration),
        tmp_path_factory.mktemp("runs") / "run",
    )
    real = builtins.__import__

    def without(name, *rest):
        if name == "tensorrt_rtx":
            raise ImportError(name)
        return real(name, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "__import__", without)
        (row,) = nms.export(run, Export(precisions=("int8",), cache=True))
    return run, row


def test_the_graphs_share_one_data_file_and_all_of_them_are_verified(exported):
    run, row = exported
    names = {file.name for file in (run / "onnx/int8").iterdir()}
    assert names == {
        "model.onnx.data",
        *(f"{n}{end}" for n in ("model", "prefill", "decode") for end in (".onnx", ".link.json")),
    }
    reports = json.loads((run / "verify.json").read_text())["reports"]
    assert [(r["place"], r["checked"], r["ok"]) for r in reports] == [
        ("file", 14, True),
        *3 * [("onnx", 14, True)],
    ]
    assert {c["dtype"] for r in reports[1:] for c in r["checks"] if c["skipped"] is None} == {"I8"}
    assert row.files["model.onnx.data"] == (run / "onnx/int8/model.onnx.data").stat().st_size


def test_eight_bits_stay_close_to_the_model_in_one_pass_and_in_steps(exported):
    _, row = exported
    for same in (row.agreement, row.cached.agreement):
        assert 0 < same.relative < 0.1 and same.argmax_share > 0.8
    assert (row.quantisation.gemms, row.quantisation.requantised, row.quantisation.scales) == (
        14,
        14,
        "channel",
    )


def test_a_compiler_that_is_not_here_is_told_with_the_command_that_brings_it(exported):
    run, row = exported
    assert row.tensorrt_rtx.keys() == {"model", "prefill", "decode"}
    assert any("not checked here: TensorRT-RTX (pip install" in line for line in row.lines("x"))
    build_report(run)
    report = json.loads((run / "report/report.json").read_text())
    assert "TensorRT-RTX compile" in {item["place"] for item in report["not_checked"]}
    assert any("14 GEMMs multiply int8" in note for note in report["graphs"][0]["notes"])


def test_what_the_compiler_said_is_told_per_graph(exported):
    _, row = exported
    found = {
        "model": CompileOutcome("compiles", facts={"version": "1.7"}),
        "decode": CompileOutcome(refused="no such operator"),
    }
    assert found["model"].to_json()["version"] == "1.7" and found["decode"].to_json() == {
        "refused": "no such operator"
    }
    assert replace(row, tensorrt_rtx=found).lines("x")[-2:] == [
        "  model: compiles",
        "  decode: no such operator",
    ]
