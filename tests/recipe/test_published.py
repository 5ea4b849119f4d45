"""Recipes of published results: all of them valid, priced from shapes alone, and their figures in
the page that is made from them."""

from __future__ import annotations

import json
import socket

import pytest
import torch
import yaml

from nmsparse_deploy import models
from nmsparse_deploy.cli import app, invoke
from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.find.cost import Cost, Rates
from nmsparse_deploy.find.inspect import predict_cost, price
from nmsparse_deploy.recipe import Prune, Recipe, fingerprint, validate
from tests import ROOT
from tests.fixtures import pico

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
WEIGHTS = {
    "opt-125m-sparsegpt": 125e6,
    "opt-1.3b-wanda": 1.3e9,
    "opt-6.7b-alps": 6.7e9,
    "llama2-7b-wanda": 6.7e9,
    "bloom-176b-sparsegpt": 176e9,
    "baichuan-7b-isc": 7.0e9,
    "qwen2.5-0.5b-wanda": 0.494e9,
    "qwen2.5-7b-wanda": 7.6e9,
    "mistral-7b-wanda": 7.2e9,
}


@pytest.fixture(autouse=True)
def a_known_machine_without_network(monkeypatch):
    monkeypatch.setattr(
        Rates, "measure", classmethod(lambda cls, dtype: cls(dtype, 1e11, 5e10, 2e10))
    )

    def refuse(*_):
        raise AssertionError("pricing asked for a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_priced_without_the_model(path):
    recipe = Recipe.load(path)
    if recipe.model.startswith("timm:"):
        pytest.importorskip("timm")
    cost = price(recipe)
    assert isinstance(cost, Cost) and cost.status == "predicted"
    assert cost.seconds > 0 or recipe.prune.method == "magnitude"
    assert cost.memory_mb > 0 and cost.disk_mb > 0


@pytest.mark.parametrize("name", WEIGHTS)
def test_shapes_are_those_of_the_model(name):
    recipe = Recipe.load(ROOT / f"recipes/published/{name}.yaml")
    module = models.shapes(recipe.model, recipe.config).module
    assert all(parameter.is_meta for parameter in module.parameters())
    assert sum(parameter.numel() for parameter in module.parameters()) == pytest.approx(
        WEIGHTS[name], rel=0.05
    )


@pytest.mark.parametrize("make", [pico.llama, pico.gpt2])
def test_shapes_are_discovered_as_the_model_is(make, tmp_path):
    """Where there is no memory, what reads the same tensor is still known."""
    folder = pico.save(make(), tmp_path / "model")
    real, bare = models.load(str(folder)), models.shapes(str(folder))
    found, priced = (model.discover() for model in (real, bare))
    assert priced.targets == found.targets and priced.blocks == found.blocks
    assert (
        len({target.fusion for target in priced.targets}) < len(priced.targets) or make is pico.gpt2
    )


def test_a_price_is_that_of_the_loaded_model(llama_dir):
    spec = validate(Prune, {"method": "sparsegpt", "calibration": {"samples": 8, "length": 64}})
    real, bare = predict_cost(str(llama_dir), spec), price(Recipe(model=str(llama_dir), prune=spec))
    known = {"forward_gflop", "gram_gflop", "factor_gflop", "sweep_gflop", "tokens", "disk_mb"}
    assert {key: getattr(real, key) for key in known} == {key: getattr(bare, key) for key in known}


def test_what_is_not_known_is_not_priced(tmp_path, capfd):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: nobody/nothing\n")
    assert invoke(lambda: app(["run", str(recipe), "--dry-run"])) == 0
    assert (
        "is valid" in (said := capfd.readouterr().out)
        and "not priced: What 'nobody/nothing' looks like" in said
    )
    recipe.write_text("model: nobody/nothing\nconfig: {model_type: nonesuch}\n")
    assert invoke(lambda: app(["--json", "run", str(recipe), "--dry-run"])) == 0
    assert "makes no model" in json.loads(capfd.readouterr().out)["cost"]["not_priced"]


def test_a_recipe_that_does_not_fit_the_model_is_refused(tmp_path, capfd):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: demo\nprune: {include: ['*nothing*']}\n")
    assert invoke(lambda: app(["run", str(recipe), "--dry-run"])) == 2
    assert "matches no prunable parameter" in capfd.readouterr().err


def test_what_others_measured_decides_nothing():
    path = ROOT / "recipes/published/llama2-7b-wanda.yaml"
    data = yaml.safe_load(path.read_text())
    bare = validate(
        Recipe, {key: value for key, value in data.items() if key not in ("published", "config")}
    )
    assert fingerprint(bare.model, bare.prune) == fingerprint(bare.model, Recipe.load(path).prune)
    with pytest.raises(UsageError, match="source"):
        validate(Recipe, {"published": [{"metric": "x", "value": 1.0}]})


def test_every_published_recipe_names_its_source_and_a_metric_that_it_measures():
    for path in (ROOT / "recipes/published").glob("*.yaml"):
        recipe = Recipe.load(path)
        assert recipe.published or "could not be read" in path.read_text(), path
        context = recipe.evaluate.paper_context
        for figure in recipe.published:
            assert "arXiv" in figure.source or "MaskLLM-4V" in figure.source
            assert (
                figure.metric in ("imagenet_top1", "imagenet_top5")
                or figure.metric == f"wikitext2_ppl@{context}"
            )
            if figure.dense is not None:
                assert (figure.value > figure.dense) == figure.metric.startswith("wikitext2")


def test_loading_on_the_meta_device_leaves_no_trace():
    """The default device is what it was."""
    models.shapes("demo")
    assert torch.empty(1).device.type == "cpu"
