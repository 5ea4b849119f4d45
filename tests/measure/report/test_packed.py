"""Packed models and GPU arms in the report: the figures of the run, the reasons, and nothing where
there is nothing."""

from __future__ import annotations

import json

import pytest

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.measure.bench.result import AmdahlBound, GpuBenchResult, Phase
from nmsparse_deploy.measure.report.build import build_report
from nmsparse_deploy.ship.evidence import EngineEvidence
from nmsparse_deploy.ship.torch_sparse.kernel_choice import Times, decide
from nmsparse_deploy.system.timing import SpeedUp, summarise
from tests.fixtures.run_folder import Page, make_run

STEADY = [2.0 + 0.001 * (i % 3) for i in range(9)]
FACTS = {
    "precision": "fp16",
    "path": "torch/fp16",
    "weights": 4,
    "packed_bytes": 9_000_000,
    "dense_bytes": 16_000_000,
    "verified": 4,
}


def written(run, made=None, why="there was <no> GPU"):
    run.write_json(
        "torch.json",
        {"artefacts": [{**FACTS, "decisions": made, "not_checked": None if made else why}]},
    )
    build_report(run)
    return (
        (run / "report/index.html").read_text(),
        (run / "report/report.md").read_text(),
        json.loads((run / "report/report.json").read_text()),
    )


def decisions(dry=False):
    times = {
        4096: Times(STEADY, [t / 1.5 for t in STEADY]),
        128: Times(STEADY, [t / 0.7 for t in STEADY]),
    }
    both = [
        decide((64, 32), "fp16", ["a", "b"], {4096: times[4096]}),
        decide((32, 64), "fp16", ["c"], times),
    ]
    return {
        "gpu": "NVIDIA H9000",
        "dry": dry,
        "gemms": [json.loads(json.dumps(one.to_json())) for one in both],
    }


def test_every_decision_is_shown_with_its_times(tmp_path):
    html, markdown, data = written(make_run(tmp_path / "run"), decisions())
    assert [(one["keep"], one["rows"], one["word"]) for one in data["packed"][0]["decisions"]] == [
        ("sparse", 4096, "wins"),
        ("dense", 128, "loses"),
        ("dense", 4096, "wins"),
    ]
    for text in (Page(html).text, markdown.replace("\\", "")):
        assert (
            "NVIDIA H9000" in text
            and "1.50 (1.50 to 1.50)" in text
            and "sparse is slower at 128 rows (0.70x)" in text
        )
        assert "no measurement" not in text


def test_a_dry_run_and_a_missing_gpu_are_said(tmp_path):
    run = make_run(tmp_path / "run")
    html, markdown, _ = written(run)
    for text in (Page(html).text, markdown.replace("\\", "")):
        assert "No GEMM was timed: there was <no> GPU" in text.replace("&lt;", "<").replace(
            "&gt;", ">"
        )
    html, _, _ = written(run, decisions(dry=True))
    assert "no measurement" in html


def test_nothing_is_said_about_what_is_not_there(tmp_path):
    build_report(run := make_run(tmp_path / "run"))
    data = json.loads((run / "report/report.json").read_text())
    assert data["packed"] is None and data["gpu_arms"] is None
    assert "Packed for PyTorch" not in (run / "report/index.html").read_text()


@pytest.mark.parametrize(
    "name,data", (("torch.json", {"artefacts": [{}]}), ("bench-gpu.json", {"phases": [{}]}))
)
def test_a_damaged_file_names_the_command(tmp_path, name, data):
    run = make_run(tmp_path / "run")
    run.write_json(name, data)
    with pytest.raises(UsageError, match=f"{name}' is damaged") as told:
        build_report(run)
    assert told.value.hint.startswith("nmsparse-deploy ")


def test_arms_on_a_gpu_are_shown_beside_their_evidence(tmp_path):
    run = make_run(tmp_path / "run")
    ratio = {"pruned-sparse": SpeedUp(1.25, 1.2, 1.3)}
    arms = tuple(summarise(name, "a kernel", [2.0] * 9) for name in ("dense", "pruned-sparse"))
    evidence = {
        "prefill": {"pruned-sparse": EngineEvidence("e", "torch", True, (), "input shapes")}
    }
    result = GpuBenchResult(
        "measured",
        "fp16",
        8,
        1,
        4,
        {"dense": 1},
        {"prefill": {"dense": None}},
        10,
        0.5,
        {"prefill": AmdahlBound(0.5, 2, 1.3)},
        {"prefill": ()},
        (Phase("prefill", True, {"batch": 8}, arms, ratio, ratio),),
        {"decode": "a reason"},
        evidence,
        "4 of 4 GEMMs ran sparse.",
        {"device": "NVIDIA H9000"},
    )
    run.write_json("bench-gpu.json", result.to_json())
    build_report(run)
    html, markdown = (run / "report/index.html").read_text(), (run / "report/report.md").read_text()
    for text in (Page(html).text, markdown.replace("\\", "")):
        assert (
            "4 of 4 GEMMs ran sparse." in text
            and "1.25 (1.20 to 1.30)" in text
            and "decode: a reason" in text
        )
