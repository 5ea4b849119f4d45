"""A packed model on a GPU: decided, loaded, compared, watched."""

from __future__ import annotations

import pytest
import torch

from nmsparse_deploy.cli import app, invoke
from nmsparse_deploy.measure.bench.arms import SPARSE
from nmsparse_deploy.measure.bench.model_arms import Job, bench_arms
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.recipe import Pack
from nmsparse_deploy.registry import ADAPTERS
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.ship.torch_sparse.engine import TorchSparse
from nmsparse_deploy.ship.torch_sparse.semi_structured import kernels
from nmsparse_deploy.ship.torch_sparse.stage import export_torch
from nmsparse_deploy.system.gpu_clock import require_gpu
from tests.fixtures import pico
from tests.measure.bench.test_arms import magnitude

pytestmark = pytest.mark.gpu
IDS = {"input_ids": torch.arange(64).view(2, 32)}


@pytest.fixture(autouse=True)
def able(device) -> None:
    why = kernels().why_not("fp16")
    if why is not None:
        pytest.skip(why)


def test_from_a_run_to_a_packed_model_that_decided_for_itself(llama_dir, tmp_path):
    out = tmp_path / "run"
    assert (
        invoke(
            lambda: app(
                ["--quiet", "prune", str(llama_dir), "--method", "magnitude", "--out", str(out)]
            )
        )
        == 0
    )
    row = export_torch(RunDir(out), Pack(rows=(64,), rounds=7))[0]
    assert row.decisions.gpu == torch.cuda.get_device_name() and not row.decisions.dry
    found = {
        mode: TorchSparse.build(out / "torch/fp16", {"mode": mode}).run(IDS)["logits"]
        for mode in ("dense", "sparse", "auto")
    }
    assert (
        abs(found["sparse"] - found["dense"]).max() < 0.02
        and abs(found["auto"] - found["dense"]).max() < 0.02
    )


def test_the_arms_of_a_model(device):
    wide = pico.llama(hidden_size=256, intermediate_size=512)
    loaded = LoadedModel(wide, "wide", "wide", "llm", ADAPTERS.load("transformers"))
    loaded.module.to(device)
    found = bench_arms(loaded, magnitude(loaded), Job(4, 64, "fp16", 7), require_gpu("This test"))
    assert found.status == "measured" and found.evidence["prefill"][SPARSE].count("observed") == 14
    assert {(phase.name, phase.replayed) for phase in found.phases} >= {
        ("prefill", False),
        ("prefill", True),
    }
    assert loaded.sample_inputs()["input_ids"].is_cuda


def test_a_replayed_model_follows_its_inputs(llama_dir, tmp_path):
    out = tmp_path / "run"
    assert (
        invoke(
            lambda: app(
                ["--quiet", "prune", str(llama_dir), "--method", "magnitude", "--out", str(out)]
            )
        )
        == 0
    )
    export_torch(RunDir(out), Pack(rows=(64,), rounds=7))
    plain, graph = (
        TorchSparse.build(out / "torch/fp16", {"mode": "sparse", "cuda_graph": kind})
        for kind in (False, True)
    )
    for ids in (IDS["input_ids"], IDS["input_ids"].flip(1), IDS["input_ids"][:1]):
        found, wanted = (
            graph.run({"input_ids": ids})["logits"],
            plain.run({"input_ids": ids})["logits"],
        )
        assert abs(found - wanted).max() < 0.01
