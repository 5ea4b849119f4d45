"""The real small language model through the whole chain. Slow; `make matrix`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nmsparse_deploy import models
from nmsparse_deploy.data.text import evaluation_sample, load_text
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.measure.evaluate.perplexity import perplexity
from nmsparse_deploy.recipe import CLOSED_FORM, Calibration, Prune

pytestmark = pytest.mark.matrix
CALIBRATION = Calibration(samples=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("matrix")


@torch.no_grad()
def score(source: str) -> float:
    loaded = models.load(source, torch.bfloat16)
    sample = evaluation_sample(load_text("bbc"), loaded.processor, 4096, 1024)
    return perplexity(loaded.module, sample, "cpu").value


def test_the_order_of_the_methods(folder):
    """On the same text: dense < closed form < SparseGPT < Wanda < magnitude, each by a wide
    margin."""
    recipes = {
        "closed": CLOSED_FORM,
        **{name: Prune(method=name) for name in ("magnitude", "wanda", "sparsegpt")},
    }
    values = {"dense": score("demo")}
    for name, recipe in recipes.items():
        run = prune("demo", recipe.model_copy(update={"calibration": CALIBRATION}), folder / name)
        values[name] = score(str(run / "model"))
    print(values)
    assert values["dense"] < 40
    assert (
        values["dense"]
        < values["closed"]
        < 0.9 * values["sparsegpt"]
        < 0.9 * 0.8 * values["wanda"]
        < 0.8 * 0.5 * values["magnitude"]
    )


def test_a_killed_run_resumes_to_the_same_bits(folder):
    """A real kill -9 while the real model is pruned, at a moment nobody chose."""
    command = [
        sys.executable,
        "-m",
        "nmsparse_deploy",
        "--json",
        "prune",
        "--samples",
        "16",
        "--out",
        str(folder / "killed"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not (folder / "killed" / "blocks" / "004.safetensors").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "killed" / "masks.safetensors").exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole = folder / "sparsegpt"
    assert (folder / "killed" / "masks.safetensors").read_bytes() == (
        whole / "masks.safetensors"
    ).read_bytes()
    one, two = (load_file(r / "model" / "model.safetensors") for r in (whole, folder / "killed"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_export_and_verify_the_real_model(folder):
    def call(*arguments: str) -> dict:
        done = subprocess.run(
            [sys.executable, "-m", "nmsparse_deploy", "--json", *arguments],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    (row,) = call("export", str(folder / "sparsegpt"), "--precision", "fp32")["files"]
    assert (
        row["links"] == 210
        and row["agreement"]["argmax_share"] == 1.0
        and row["agreement"]["max_abs"] < 1e-2
    )
    reports = call("verify", str(folder / "sparsegpt"))["reports"]
    assert [(r["place"], r["checked"], r["failed"]) for r in reports] == [
        ("file", 210, 0),
        ("onnx", 210, 0),
    ]
