"""Every program of examples/ runs on a two-block model, in a process of its own as a reader would
start it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import nmsparse_deploy as nms
from tests import ROOT

EXAMPLES = ROOT / "examples"


def run(script: str, *arguments: object, cwd: Path, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        cwd=cwd,
        text=True,
        capture_output=True,
    )
    assert done.returncode == code, done.stderr
    return done.stdout


def test_prune_and_verify(llama_dir, texts, tmp_path):
    printed = run(
        "prune_and_verify.py",
        llama_dir,
        "--data",
        texts["calibration"],
        "--held-out",
        texts["held_out"],
        "--samples",
        8,
        "--length",
        32,
        "--out",
        tmp_path / "run",
        cwd=tmp_path,
    )
    assert "14 tensors checked, 0 failed" in printed
    scores = json.loads((tmp_path / "run/evaluate.json").read_text())["results"]
    assert scores["dense"] and scores["pruned"]
    assert Path(printed.splitlines()[-1].rpartition(": ")[2]).is_file()


@pytest.mark.parametrize("folder", ["llama_dir", "gpt2_dir"])
def test_import_mask(folder, tmp_path, request):
    printed = run(
        "import_mask.py", request.getfixturevalue(folder), "--out", "imported", cwd=tmp_path
    )
    assert "masks imported and verified" in printed
    assert all(report.ok for report in nms.verify(nms.RunDir.open(tmp_path / "imported")))


@pytest.mark.parametrize("how", [[], ["--full"]])
@pytest.mark.parametrize("kept", [True, False])
def test_finetune(how, kept, llama_dir, texts, tmp_path):
    forget = [] if kept else ["--forget"]
    data = ["--data", texts["calibration"], "--steps", 3, "--length", 32]
    out = ["--out", tmp_path / "run"]
    printed = run(
        "finetune.py", llama_dir, *data, *out, *how, *forget, cwd=tmp_path, code=0 if kept else 1
    )
    assert ("14 checked, 0 failed" in printed) == kept


def test_every_program_has_a_test():
    tested = Path(__file__).read_text()
    assert all(f'"{path.name}"' in tested for path in EXAMPLES.glob("*.py"))


@pytest.fixture(scope="module")
def gpt2_dir(tmp_path_factory):
    from tests.fixtures import pico

    return pico.save(pico.gpt2(), tmp_path_factory.mktemp("gpt2"))
