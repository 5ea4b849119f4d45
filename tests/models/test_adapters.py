"""A model library is one adapter: a toy goes the whole way, and every other source finds its own
library."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import nmsparse_deploy as nms
from nmsparse_deploy import models
from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.measure.report.card import model_card
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.prove.group_counter import check
from nmsparse_deploy.recipe import Evaluate, Export, Pack, Prune, validate
from nmsparse_deploy.registry import ADAPTERS, RegistryEntry
from nmsparse_deploy.ship.torch_sparse.stage import export_torch
from tests import ROOT
from tests.fixtures.toy_library import ADAPTER, STEPS, Stack, ToyAdapter


@pytest.fixture
def toy(monkeypatch, tmp_path) -> Path:
    """The folder of a toy model, whose library is registered."""
    monkeypatch.setitem(
        ADAPTERS.own, "toy", RegistryEntry(code="tests.fixtures.toy_library:ADAPTER")
    )
    torch.manual_seed(0)
    folder = tmp_path / "toy"
    folder.mkdir()
    ADAPTER.save(LoadedModel(Stack(32, 3), "toy", "toy", "signals", ADAPTER), folder)
    return folder


def inputs(path: Path, seed: int, samples: int = 8) -> str:
    generator = torch.Generator().manual_seed(seed)
    save_file({"x": torch.randn(samples, STEPS, 32, generator=generator)}, path)
    return str(path)


def recipe(data: str, **settings) -> Prune:
    return validate(
        Prune,
        {
            "method": "sparsegpt",
            "compute": "fp32",
            "calibration": {"data": data, "samples": 8, "batch": 4},
            **settings,
        },
    )


@pytest.fixture
def run(toy, tmp_path):
    return prune(
        str(toy), recipe(inputs(tmp_path / "calibration.safetensors", 0)), tmp_path / "run"
    )


def test_a_toy_library_is_pruned_verified_and_saved(run):
    masks = MaskSet.load(run / "masks.safetensors").masks
    assert len(masks) == 6
    pruned = models.load(str(run / "model"))
    assert isinstance(pruned.adapter, ToyAdapter) and pruned.family == "signals"
    for name, mask in masks.items():
        weight = pruned.module.get_parameter(name).detach()
        assert not weight[~mask.unpack()].any() and check(weight, mask.pattern, mask.axis).bad == 0
    assert all(report.ok for report in nms.verify(run))


def test_a_toy_library_is_evaluated_on_prepared_inputs_and_reported(run, tmp_path):
    held_out = inputs(tmp_path / "held-out.safetensors", 1)
    data = nms.evaluate(run, Evaluate(data=held_out))
    rows = {row["metric"]: row["value"] for row in data["results"]["pruned"]}
    assert rows.keys() == {
        "pooled_cosine@held-out.safetensors",
        "token_cosine@held-out.safetensors",
    }
    assert 0.5 < rows["token_cosine@held-out.safetensors"] < 1 - 1e-6
    assert data["held_out"] == {"samples_compared": 8, "overlaps": 0}
    page = nms.report(run).read_text()
    assert "token" in page and "held-out" in page
    card = model_card(run)
    assert "library_name: toy" in card and 'models.load("FOLDER")' in card


def test_what_was_calibrated_on_is_not_evaluated_on(run, tmp_path):
    with pytest.raises(NmsparseError, match="8 of 8 evaluation samples were calibrated on"):
        nms.evaluate(run, Evaluate(data=inputs(tmp_path / "again.safetensors", 0)))
    with pytest.raises(UsageError, match="No packaged data suits"):
        nms.evaluate(run)


def test_a_toy_library_is_exported(run):
    rows = nms.export(run, Export(precisions=("fp32",)))
    assert rows[0].links == 6 and rows[0].agreement.relative < 1e-4
    packed = export_torch(run, Pack(precisions=("bf16",)))
    assert packed[0].verified == 6 and packed[0].agreement.relative < 0.05


def test_no_data_of_its_own_is_one_sentence(toy, tmp_path):
    with pytest.raises(UsageError, match=r"reads x, so it cannot be calibrated on text"):
        prune(str(toy), recipe("auto"), tmp_path / "run")


def test_private_functions_of_transformers_stand_in_one_file():
    private = {}
    for path in (ROOT / "nmsparse_deploy").rglob("*.py"):
        modules = {
            node.module
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
        }
        private[path.name] = {
            module for module in modules if module and module.startswith("transformers.")
        } - {"transformers.utils"}
    assert {name for name, modules in private.items() if modules} == {"transformers_private.py"}


def test_an_adapter_that_leaves_questions_open_cannot_be_made():
    class Silent(ToyAdapter.__base__):
        library = "silent"

    with pytest.raises(TypeError, match="abstract"):
        Silent()


@pytest.mark.parametrize(
    ("source", "library", "short", "hub"),
    [
        ("toy:/a/b", "toy", "b", None),
        ("timm:vit_tiny", "timm", "vit_tiny", "timm/vit_tiny"),
        ("timm:hf-hub:a/vit", "timm", "vit", "a/vit"),
        ("timm:x?checkpoint=/a/b.pt", "timm", "x", None),
        ("diffusers:a/dit?vae=c", "diffusers", "dit", "a/dit"),
        ("a/llama", "transformers", "llama", "a/llama"),
        ("gpt2", "transformers", "gpt2", "gpt2"),
        ("/a/model.gguf", "transformers", "model", None),
        ("model.gguf", "transformers", "model", None),
    ],
)
def test_a_source_is_claimed_by_its_spelling(source, library, short, hub, toy):
    assert models.adapter_for(source).library == library
    assert models.short_name(source) == short and models.hub_name(source) == hub


@pytest.mark.parametrize(
    ("config", "library"),
    [
        ({"architecture": "vit_tiny"}, "timm"),
        ({"architecture": "x", "model_type": "vit"}, "transformers"),
        ({"_diffusers_version": "1"}, "diffusers"),
        ({"model_type": "llama"}, "transformers"),
        ([], "transformers"),
    ],
)
def test_a_folder_is_claimed_by_what_it_holds(config, library, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert models.adapter_for(str(tmp_path)).library == library
    assert models.adapter_for(str(tmp_path / "nowhere")).library == "transformers"
