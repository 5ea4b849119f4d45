"""NVIDIA ModelOpt as a mask backend: its answers are checked, its limits are sentences, its masks
are the known ones."""

import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch

from nmsparse_deploy.errors import CheckFailed, MissingExtra, NmsparseError, UsageError
from nmsparse_deploy.find.calibration.layer_stats import LayerStats
from nmsparse_deploy.find.methods import modelopt, sparsegpt
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.masks import mask_follows, project
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.recipe import Prune, validate
from tests.find.methods.test_methods import layer
from tests.fixtures import pico

installed = pytest.mark.skipif(find_spec("modelopt") is None, reason="needs nvidia-modelopt")


@pytest.fixture
def backend(monkeypatch):
    """A stand-in for `modelopt.torch.sparsity`; `backend.mask` is the mask that it finds,
    `backend.seen` what it saw."""
    fake = ModuleType("modelopt.torch.sparsity")
    fake.mask, fake.seen = None, {}

    def sparsify(linear, mode, config):
        fake.seen = {"mode": mode, "weight": linear.weight, **config}
        if "forward_loop" in config:
            inputs = []
            linear.register_forward_hook(lambda module, given, out: inputs.append(given[0]))
            config["forward_loop"](linear)
            fake.seen["gram"] = inputs[0].T @ inputs[0]
        linear._weight_mask = fake.mask

    fake.sparsify = sparsify
    parents = {name: ModuleType(name) for name in ("modelopt", "modelopt.torch")}
    parents["modelopt"].torch, parents["modelopt.torch"].sparsity = parents["modelopt.torch"], fake
    for name, module in {**parents, "modelopt.torch.sparsity": fake}.items():
        monkeypatch.setitem(sys.modules, name, module)
    return fake


def test_the_backend_sees_the_weight_and_inputs_with_the_same_gram(backend):
    weight, stats = layer(0)
    backend.mask = project(weight.abs(), TWO_FOUR)
    result = modelopt.sparsegpt(weight, stats, TWO_FOUR)
    assert torch.equal(result.mask, backend.mask) and result.weight is None
    assert backend.seen["mode"] == "sparsegpt" and torch.equal(backend.seen["weight"], weight)
    torch.testing.assert_close(backend.seen["gram"], stats.gram, rtol=1e-4, atol=1e-2)


def test_a_mask_that_keeps_too_few_is_filled_up_and_one_that_keeps_too_many_is_refused(backend):
    weight, stats = layer(1)
    full = project(torch.rand_like(weight), TWO_FOUR)
    backend.mask = full.clone()
    backend.mask[:, ::4] = False
    mask = modelopt.magnitude(weight, stats, TWO_FOUR).mask
    assert mask_follows(mask, TWO_FOUR) and bool(mask[backend.mask].all())
    backend.mask = full.clone()
    backend.mask[3, :4] = True
    with pytest.raises(CheckFailed, match="not 2:4"):
        modelopt.magnitude(weight, stats, TWO_FOUR)


@pytest.mark.parametrize(
    "mask", [None, torch.ones(12, 32, dtype=torch.bool)], ids=["nothing", "all"]
)
def test_a_layer_that_the_backend_leaves_alone_is_an_error_and_not_a_dense_layer(backend, mask):
    backend.mask = mask
    with pytest.raises(NmsparseError, match="does not prune a weight of shape 12 x 32"):
        modelopt.magnitude(*layer(2), TWO_FOUR)


@pytest.mark.parametrize(
    "wrong", [{"pattern": "4:8"}, {"pattern": "unstructured:0.5"}, {"patterns": {"x": "1:4"}}]
)
def test_it_knows_one_pattern(wrong):
    with pytest.raises(UsageError, match="finds 2:4 masks only"):
        validate(Prune, {"method": "modelopt-sparsegpt", **wrong})


def test_without_the_package_nothing_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr("nmsparse_deploy.registry.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="needs the package 'modelopt'") as caught:
        prune("no such model", Prune(method="modelopt-magnitude"), tmp_path / "run")
    assert "nmsparse-deploy[modelopt]" in caught.value.hint and not (tmp_path / "run").exists()


@installed
def test_magnitude_is_magnitude():
    weight, stats = layer(3, rows=16)
    assert torch.equal(
        modelopt.magnitude(weight, stats, TWO_FOUR).mask, project(weight.abs(), TWO_FOUR)
    )


@installed
def test_sparsegpt_is_the_sweep_without_its_weights():
    """At the library's own damping, but for pairs that rounding decides."""
    weight, stats = layer(4, rows=64, width=256, tokens=1024)
    ours = sparsegpt.prune_layer(weight.clone(), stats, TWO_FOUR, damping=0.1).mask
    theirs = modelopt.sparsegpt(weight, stats, TWO_FOUR).mask
    assert (ours == theirs).float().mean() > 0.999
    assert (ours == project(weight.abs(), TWO_FOUR)).float().mean() < 0.95


@installed
def test_dead_columns_and_zero_weights_give_an_exact_mask():
    weight, stats = layer(5, rows=16)
    weight[:, 3], weight[4] = 0.0, 0.0
    gram = stats.gram.clone()
    gram[[0, 7]] = 0
    gram[:, [0, 7]] = 0
    for method in (modelopt.magnitude, modelopt.sparsegpt):
        assert mask_follows(
            method(weight, LayerStats(96, gram.diagonal().clone(), gram), TWO_FOUR).mask, TWO_FOUR
        )


@installed
def test_a_run_is_verified_like_any_other_and_says_nothing_of_the_backend(tmp_path, capfd):
    dense = pico.save(pico.llama(), tmp_path / "dense")
    spec = validate(
        Prune, {"method": "modelopt-sparsegpt", "calibration": {"samples": 4, "length": 16}}
    )
    run = prune(str(dense), spec, tmp_path / "run")
    [report] = run.read_json("verify.json")["reports"]
    assert report["ok"] and "Searching" not in capfd.readouterr().out
