"""Six families through export, verification, ONNX Runtime and TensorRT-RTX's compiler, as the
documentation shows it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests import ROOT

pytestmark = pytest.mark.matrix


def test_the_deployment_table_is_what_the_script_writes(tmp_path):
    out = tmp_path / "deploy.json"
    subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/deploy.py"), str(out)], check=True, cwd=ROOT
    )
    found = json.loads(out.read_text())
    published = {
        (r["family"], r["opset"], r["precision"], r["scales"]): r
        for r in json.loads((ROOT / "results/deploy-cpu.json").read_text())["rows"]
    }
    assert found["rows"]
    for row in found["rows"]:
        told = published[row["family"], row["opset"], row["precision"], row["scales"]]
        assert row["verified"] == told["verified"] and "failed" not in row["agreement"]
        assert row["agreement"]["relative"] < (2e-3 if row["precision"] == "fp16" else 0.1)
        if row["rtx"].get("version") == told["rtx"]["version"]:
            assert row["rtx"] == told["rtx"]
    for row in found["steps"]:
        assert row["agreement"]["max_abs"] < 1e-5
