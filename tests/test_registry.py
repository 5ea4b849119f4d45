"""What is registered loads, here and in packages outside; a damaged one is blamed by name."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError

import pytest
import torch

from nmsparse_deploy import registry
from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.find.calibration.layer_stats import LayerStats
from nmsparse_deploy.find.learn.learner import LearnedMethod
from nmsparse_deploy.find.methods.base import Method
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.models.loaded import ModelAdapter
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.recipe import Learn, Prune, fingerprint, validate
from nmsparse_deploy.registry import ADAPTERS, LEARNERS, METHODS, REFINEMENTS
from tests import ROOT
from tests.cli.test_cli import run as command
from tests.fixtures import plugin

KINDS = {LEARNERS: LearnedMethod, ADAPTERS: ModelAdapter}
EVERY = [
    (group, name) for group in (METHODS, LEARNERS, REFINEMENTS, ADAPTERS) for name in group.own
]


@pytest.mark.parametrize("group,name", EVERY, ids=[f"{group.kind} {name}" for group, name in EVERY])
def test_what_is_registered_loads(group, name):
    entry, code = group[name], group.load(name)
    assert entry.summary and entry.source and entry.code.startswith("nmsparse_deploy.")
    assert KINDS[group] in type(code).__mro__ if group in KINDS else callable(code)
    with pytest.raises(FrozenInstanceError):
        entry.summary = ""


@pytest.mark.parametrize("name", REFINEMENTS.own)
def test_every_refinement_is_a_step_of_a_recipe(name):
    [step] = validate(Prune, {"method": "wanda", "refine": [{"name": name}]}).refine
    assert step.name == name and type(step).__module__ == "nmsparse_deploy.recipe.refine_steps"


@pytest.mark.parametrize("name", LEARNERS.own)
def test_every_learner_has_a_section(name):
    assert (
        type(validate(Prune, {"method": name}).learn).__module__
        == "nmsparse_deploy.recipe.learn_settings"
    )


# --- packages outside
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Put a package on the path, as `plugin.install` takes it."""

    def put(**what):
        monkeypatch.syspath_prepend(
            plugin.install(tmp_path / what.get("name", "nms-outside"), **what)
        )
        importlib.invalidate_caches()
        registry.installed.cache_clear()

    yield put
    registry.installed.cache_clear()
    for name in [name for name in sys.modules if name.startswith("nms_")]:
        del sys.modules[name]


def test_a_method_from_outside_is_a_method(outside, llama_dir, tmp_path):
    outside()
    assert "first" in METHODS and "first" in METHODS.names() and METHODS["first"].needs == "none"
    run = prune(llama_dir, validate(Prune, {"method": "first"}), tmp_path / "run")
    masks = MaskSet.load(run / "masks.safetensors").masks
    assert masks and all(
        mask.unpack()[:, :4].tolist() == [[True, True, False, False]] * mask.shape[0]
        for mask in masks.values()
    )


def test_a_ranking_from_outside_is_projected(outside):
    outside()
    weight, stats = torch.randn(6, 8), LayerStats(9, torch.rand(8) + 1)
    ours, theirs = (
        Method.load(name).prune_layer(weight, stats, TWO_FOUR).mask for name in ("wanda", "ranked")
    )
    assert torch.equal(ours, theirs)


def test_a_refinement_from_outside_is_a_step(outside, llama_dir, tmp_path):
    outside()
    spec = validate(Prune, {"method": "magnitude", "refine": [{"name": "shrink", "factor": 0.25}]})
    again = validate(Prune, spec.model_dump(mode="json"))
    assert again == spec and again.refine[0].factor == 0.25
    assert fingerprint("m", spec) != fingerprint(
        "m", validate(Prune, {"method": "magnitude", "refine": [{"name": "shrink"}]})
    )
    with pytest.raises(UsageError, match=r"refine\.0\.factr"):
        validate(Prune, {"refine": [{"name": "shrink", "factr": 1}]})
    run = prune(llama_dir, spec, tmp_path / "run")
    assert run.finished("prune")


def test_a_learner_from_outside_has_a_section(outside):
    outside()
    learn = validate(Prune, {"method": "outside", "learn": {"steps": 3}}).learn
    assert type(learn) is Learn and learn.name == "outside" and learn.steps == 3
    assert isinstance(LEARNERS.load("outside"), LearnedMethod)


def test_the_list_shows_it(outside, capfd):
    outside()
    code, out, _ = command(capfd, "--json", "list")
    names = {row["name"] for part in json.loads(out).values() for row in part}
    assert code == 0 and {"first", "ranked", "shrink", "outside", "wanda"} <= names


@pytest.mark.parametrize(
    "broken,sentence",
    [
        ({"description": "import nothing_of_the_kind"}, "nothing_of_the_kind"),
        ({"description": "FIRST = RANKED = 3"}, "nms_broken:FIRST is no MethodEntry"),
        (
            {"description": plugin.DESCRIPTION.replace('needs="none"', 'needs="all"', 1)},
            "needs: Input should be 'none', 'norms' or 'gram'",
        ),
        ({"description": "raise RuntimeError('two\\nlines')"}, "RuntimeError: two"),
        ({"offers": "[nmsparse_deploy.methods]\nfirst = nms_broken:ABSENT\n"}, "ABSENT"),
    ],
)
def test_a_damaged_package_is_one_sentence_that_names_it(
    outside, capfd, llama_dir, broken, sentence
):
    offers = plugin.OFFERS.replace("nms_outside", "nms_broken")
    outside(name="nms-broken", **{"offers": offers, **broken})
    with pytest.raises(NmsparseError) as caught:
        validate(Prune, {"method": "first"})
    assert caught.value.message.startswith(
        "The package 'nms-broken' offers the method 'first', which cannot be loaded"
    )
    assert sentence in caught.value.message and "\n" not in caught.value.message
    code, out, err = command(capfd, "prune", llama_dir, "--method", "first")
    assert code == 1 and "nms-broken" in err and "Traceback" not in err
    code, out, _ = command(capfd, "list")
    assert code == 0 and "nms-broken" in out and "wanda" in out
    assert validate(Prune, {"method": "wanda"}).needs == "norms"


def test_code_that_cannot_be_imported_is_blamed_too(outside):
    outside(code="import nothing_of_the_kind")
    assert validate(Prune, {"method": "first"}).needs == "none"
    with pytest.raises(
        NmsparseError,
        match=r"The package 'nms-outside' offers the method 'first'.*nothing_of_the_kind",
    ):
        Method.load("first")


def test_settings_that_are_no_step_are_blamed(outside):
    outside(description=plugin.DESCRIPTION.replace("class Shrink(Step)", "class Shrink(Learn)"))
    with pytest.raises(
        NmsparseError, match=r"'nms-outside' offers the refinement 'shrink'.*Shrink is no Step"
    ):
        validate(Prune, {"refine": [{"name": "shrink"}]})


def test_what_trains_the_whole_model_has_the_settings_of_fine_tuning(outside):
    """The stage that trains the model reads them; a step without them would be left out in
    silence."""
    description = plugin.DESCRIPTION.replace('level="layer"', 'level="model"')
    outside(description=description)
    with pytest.raises(
        NmsparseError, match=r"'nms-outside' offers the refinement 'shrink'.*Shrink is no Finetune"
    ):
        validate(Prune, {"refine": [{"name": "shrink"}]})
    outside(
        name="nms-tuning",
        offers="[nmsparse_deploy.refinements]\ntune = nms_tuning:SHRINK\n",
        code="",
        description="from nmsparse_deploy.recipe import Finetune\n"
        + description.replace("(Step)", "(Finetune)")
        .replace('"shrink"', '"tune"')
        .replace("nms_outside:", "nms_tuning:"),
    )
    spec = validate(Prune, {"refine": [{"name": "tune", "steps": 3}]})
    assert spec.finetune is spec.refine[0] and spec.whole_model == "finetune"


@pytest.mark.parametrize("taken", ["wanda", "first"])
def test_a_name_that_is_taken_is_refused(outside, taken):
    outside()
    outside(name="nms-second", offers=f"[nmsparse_deploy.methods]\n{taken} = nms_second:FIRST\n")
    with pytest.raises(
        NmsparseError,
        match=f"The package 'nms-second' offers the method '{taken}', which is one of",
    ):
        METHODS.names()
    assert METHODS["wanda"].needs == "norms"


def test_help_imports_no_package_from_outside(tmp_path):
    folder = plugin.install(tmp_path)
    code = (
        "import sys\nfrom nmsparse_deploy.cli import app\n"
        "try: app(['prune', '--help'])\nexcept SystemExit: pass\n"
        "print({'nms_outside', 'torch', 'transformers'} & sys.modules.keys() or 'none')"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
    )
    assert answer.stdout.splitlines()[-1] == "none"
