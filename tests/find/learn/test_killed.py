"""SIGKILL at some step, or while a checkpoint is written: the resumed run ends with the bits of an
unbroken one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT


def cases(folder: Path, which: str) -> dict[str, dict]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fixtures.killed", str(folder), which],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {row["case"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert found, done.stderr
    return found


def holds(row: dict) -> None:
    assert row["ends"] == [0, *(end for _ in row["whens"] for end in (-signal.SIGKILL, 0))]
    assert row["same"] == [True] * len(row["whens"]) and row["tensors"] >= 14


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> dict[str, dict]:
    return cases(tmp_path_factory.mktemp("killed"), "few")


@pytest.mark.parametrize("case", ["maskllm", "proxsparse", "maskpro", "sr-ste"])
def test_a_killed_learner_ends_with_the_bits_of_an_unbroken_one(case, few):
    holds(few[case])


@pytest.mark.matrix
def test_every_learner_at_every_step(tmp_path):
    found = cases(tmp_path, "every")
    assert len(found) == 9
    for row in found.values():
        holds(row)
