"""The package of examples/plugin: once installed, its method is listed and prunes like one of
ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from nmsparse_deploy import models
from nmsparse_deploy.masks import MaskSet, project
from nmsparse_deploy.pattern import TWO_FOUR
from tests import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder in which pip installed the package, without a network and outside of the
    environment."""
    source, target = (tmp_path_factory.mktemp(name) for name in ("source", "target"))
    shutil.copytree(ROOT / "examples/plugin", source, dirs_exist_ok=True)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            "--no-build-isolation",
            "--target",
            str(target),
            str(source),
        ],
        check=True,
    )
    return target


def nms(installed, *arguments):
    path = os.pathsep.join([str(installed), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "nmsparse_deploy", *map(str, arguments)],
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def test_it_is_listed_with_what_it_says_of_itself(installed):
    done = nms(installed, "--json", "list")
    assert done.returncode == 0, done.stderr
    assert "column-norm" in done.stdout and "relative to the norm of their column" in done.stdout


def test_it_prunes_and_the_run_is_verified(installed, llama_dir, tmp_path):
    run = tmp_path / "run"
    done = nms(installed, "prune", llama_dir, "--method", "column-norm", "--out", run)
    assert done.returncode == 0, done.stderr
    assert nms(installed, "verify", run).returncode == 0
    masks = MaskSet.load(run / "masks.safetensors").masks
    for name, weight in models.load(str(llama_dir)).module.named_parameters():
        if name in masks:
            weight = weight.detach().float()
            assert torch.equal(
                masks[name].unpack(), project(weight.abs() / weight.norm(dim=0), TWO_FOUR)
            )
    assert json.loads((run / "manifest.json").read_text())["recipe"]["method"] == "column-norm"


def test_without_it_the_name_is_unknown(llama_dir, tmp_path):
    done = nms(tmp_path, "prune", llama_dir, "--method", "column-norm", "--out", tmp_path / "run")
    assert done.returncode == 2 and "There is no method called 'column-norm'" in done.stderr
