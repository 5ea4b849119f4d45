"""Two processes of one run: other noise and other batches in each, the same masks in both, split or
not."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from nmsparse_deploy.find.learn.loop import fit
from nmsparse_deploy.find.methods.maskllm import LEARNED
from tests import ROOT
from tests.fixtures.toy_learner import NAME, Planted, settings
from tests.fixtures.two_processes import SETTINGS


def launched(*arguments: str) -> subprocess.CompletedProcess:
    """Two processes on this machine."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "0",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
        *arguments,
    ]
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RANK", "WORLD", "MASTER", "LOCAL"))
    }
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
        env={**kept, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[tuple[dict, dict]]:
    """Facts and tensors of both."""
    folder = tmp_path_factory.mktemp("ranks")
    done = launched("-m", "tests.fixtures.two_processes", str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        (
            json.loads((folder / f"rank{rank}.json").read_text()),
            load_file(folder / f"rank{rank}.safetensors"),
        )
        for rank in (0, 1)
    ]


@pytest.mark.parametrize("how", ["parallel", "sharded"])
def test_both_end_with_the_same_masks(how, ranks):
    (one, mine), (two, yours) = ranks
    assert torch.equal(mine[f"{how}/{NAME}"], yours[f"{how}/{NAME}"]) and one[how] == {
        **two[how],
        "peak_memory_mb": one[how]["peak_memory_mb"],
    }
    assert one[how]["best"] < one[how]["prior"] and not torch.equal(
        mine[f"{how}/{NAME}"], Planted().prior[NAME]
    )


@pytest.mark.parametrize("how", ["parallel", "sharded"])
def test_noise_and_batches_are_each_one_s_own_and_the_result_says_so(how, ranks):
    (facts, mine), (_, yours) = ranks
    assert not torch.equal(mine[f"{how}/first"], yours[f"{how}/first"])
    assert not set(mine[f"{how}/numbers"][:10].tolist()) & set(
        yours[f"{how}/numbers"][:10].tolist()
    )
    assert facts[how]["processes"] == 2 and facts[how]["samples_per_step"] == 128
    assert "own noise" in facts[how]["each_process"] and facts[how]["sharded"] == (how == "sharded")


def test_split_or_whole_is_the_same_training(ranks):
    """The same noise, batches and mean gradient; only the order of a few sums differs."""
    facts, tensors = ranks[0]
    whole, split = (
        [row["hard"] for row in facts[how]["history"]] for how in ("parallel", "sharded")
    )
    assert split == pytest.approx(whole, rel=1e-3)
    same = (tensors[f"parallel/{NAME}"] == tensors[f"sharded/{NAME}"]).unflatten(1, (-1, 4)).all(-1)
    assert float(same.float().mean()) > 0.98


def test_two_processes_learn_what_one_learns(ranks):
    """The share of the loss that goes, over the seeds of one process, brackets that of two."""
    gone = []
    for seed in range(4):
        subject, spec = Planted(), settings(**SETTINGS)
        found = fit(subject, LEARNED.make(spec), subject.prior, spec, seed).facts
        gone.append(1 - found.best / found.prior)
    for how in ("parallel", "sharded"):
        facts = ranks[0][0][how]
        spread = max(gone) - min(gone)
        assert min(gone) - spread < 1 - facts["best"] / facts["prior"] < max(gone) + spread


@pytest.mark.parametrize("name", ["prox", "maskpro"])
def test_a_killed_run_of_two_ends_with_the_bits_of_an_unbroken_one(name, ranks):
    (one, mine), (two, yours) = ranks
    assert (
        one[name]["history"] == one[f"{name}-again"]["history"] == two[f"{name}-again"]["history"]
    )
    sites = [key for key in mine if key.startswith(f"{name}/")]
    assert sites
    for key in sites:
        again = key.replace(name, f"{name}-again", 1)
        assert torch.equal(mine[key], mine[again]) and torch.equal(mine[key], yours[again])


def test_what_cannot_be_split_is_refused_in_a_sentence(ranks):
    refused = ranks[0][0]["refused"]
    assert "whole in every process" in refused["sentence"] and refused["hint"] == "shard: false"


@pytest.mark.matrix
@pytest.mark.parametrize("method", ["maskllm", "proxsparse"])
def test_the_prune_command_in_two_processes(method, llama_dir, texts, tmp_path):
    """`torchrun -m nmsparse_deploy run RECIPE`, split over both: one run folder, written once,
    verified; the first of them goes on alone."""
    recipe = {
        "model": str(llama_dir),
        "export": {"precisions": ["fp32"]},
        "evaluate": None,
        "bench": None,
        "prune": {
            "method": method,
            "calibration": {
                "data": str(texts["calibration"]),
                "samples": 24,
                "length": 32,
                "batch": 2,
            },
            "learn": {
                "objective": "global",
                "steps": 8,
                "batch": 8,
                "shard": True,
                "priors": ["wanda"],
                "evaluate_every": 4,
            },
        },
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    done = launched(
        "-m",
        "nmsparse_deploy",
        "--json",
        "run",
        str(tmp_path / "recipe.yaml"),
        "--out",
        str(tmp_path / "run"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["run"] == str(tmp_path / "run")  # one of them speaks
    [facts] = json.loads((tmp_path / "run/refinements.json").read_text())
    assert facts["processes"] == 2 and facts["sharded"] and facts["best"] <= facts["prior"]
    weights, graph = json.loads((tmp_path / "run/verify.json").read_text())["reports"]
    assert (
        weights["failed"] == graph["failed"] == 0 and weights["checked"] == graph["checked"] == 14
    )
