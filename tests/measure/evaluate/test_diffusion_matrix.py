"""The benchmark on the small diffusion transformer, hardly trained: every figure is there (slow,
`make matrix`)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests import ROOT

pytestmark = pytest.mark.matrix


def test_the_benchmark_writes_figures_and_pictures(tmp_path):
    out = tmp_path / "dit.json"
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "benchmarks/small_dit.py"),
            "--out",
            str(out),
            "--runs",
            str(tmp_path / "runs"),
            "--steps",
            "30",
            "--seeds",
            "1",
            "--drawn",
            "20",
            "--held-out",
            "60",
        ],
        check=True,
        cwd=ROOT,
    )
    found = json.loads(out.read_text())
    table = {line["method"]: line for line in found["table"]}
    assert list(table) == ["dense", "magnitude", "wanda", "sparsegpt", "closed-form"]
    for name, line in table.items():
        assert line["frechet"] > 0 and 0 <= line["recognised"] <= 1
        assert (line["prediction_shift"] is None) == (name == "dense")
    assert all(row["layers"] == 36 for row in found["rows"] if row["method"] != "dense")
    for name in ("dit.png", "dit-timesteps.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
