"""A recipe is read, validated and settled without the libraries that carry it out."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import ROOT

HEAVY = {"torch", "transformers", "numpy"}
RECIPES = """
from pathlib import Path
from nmsparse_deploy.recipe import Prune, Recipe, fingerprint, validate
for path in sorted(Path("recipes").glob("*.yaml")):
    recipe = Recipe.load(path)
    settled = recipe.prune.settled(gpu=True)
    fingerprint(recipe.model, recipe.prune), settled.needs, settled.one_shot_method, settled.whole_model
validate(Prune, {"method": "wanda", "pattern": "unstructured:0.5", "wbits": 4, "refine": [{"name": "llm-barber"}]}).rounds_last
"""


def imported(code: str) -> set[str]:
    """What a fresh interpreter imports to run `code`: the packages, by name."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


def test_what_is_imported_shows():
    assert "numpy" in imported("import numpy")


@pytest.mark.parametrize(
    "code",
    [
        RECIPES,
        "import nmsparse_deploy as nms; nms.NMPattern(2, 4)",
        "import nmsparse_deploy as nms; nms.Recipe, nms.Prune(method='maskllm')",
    ],
    ids=["every recipe", "a pattern", "the public names"],
)
def test_nothing_heavy_is_imported(code):
    names = imported(code)
    assert "nmsparse_deploy" in names and not names & HEAVY
