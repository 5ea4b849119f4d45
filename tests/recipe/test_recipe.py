"""Recipes: validated before anything loads, frozen, fingerprinted; every shipped one is valid."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.recipe import (
    CLOSED_FORM,
    Calibration,
    Prune,
    Recipe,
    differences,
    fingerprint,
    validate,
)
from nmsparse_deploy.registry import NEEDS
from tests import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path):
    assert Recipe.load(path).prune.method


@pytest.mark.parametrize("name", ["demo", "closed-form", "vit"])
def test_recipes_that_name_the_demo_spell_it_out(name):
    named = Recipe.load(RECIPES[0].parent / f"{name}.yaml").prune
    what = {"method", "pattern", "refine", "sequential"}
    assert named.model_dump(include=what) == CLOSED_FORM.model_dump(include=what)


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize(
    "text,sentence",
    [
        ("prune: {method: sparsegtp}", "Did you mean 'sparsegpt'?"),
        ("prune: {pattern: '4:4'}", "not a pattern"),
        ("prune: {calibration: {samples: -1}}", "prune.calibration.samples"),
        ("prune: {calibrations: {}}", "prune.calibrations"),
        ("export: {precisions: [fp12]}", "export.precisions"),
        ("- a list", "expected a mapping"),
        ("{", "not valid YAML"),
        ("model: [1]", "model"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, text, sentence):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        Recipe.load(file)
    assert sentence in caught.value.message and "\n" not in caught.value.message


def test_yaml_cannot_run_code(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("model: !!python/object/apply:os.getcwd []")
    with pytest.raises(UsageError, match="not valid YAML"):
        Recipe.load(file)


def test_recipes_are_frozen():
    with pytest.raises(ValidationError):
        Prune().method = "wanda"


def test_everything_that_decides_a_mask_changes_the_fingerprint():
    base = Prune()
    seen = {fingerprint("m", base), fingerprint("n", base)}
    changes = {
        "method": "wanda",
        "pattern": "1:4",
        "include": ["*fc*"],
        "exclude": ["*fc*"],
        "compute": "fp32",
    }
    for field, value in changes.items():
        seen.add(fingerprint("m", validate(Prune, {field: value})))
    for field, value in {"data": "x", "samples": 1, "length": 64, "batch": 1, "seed": 1}.items():
        seen.add(fingerprint("m", Prune(calibration=Calibration(**{field: value}))))
    assert len(seen) == 12
    assert fingerprint("m", Prune(pattern="02:04")) == fingerprint("m", base)


def test_differences_are_named_with_both_values():
    old = {"model": "m", "prune": {"seed": 0, "method": "a"}}
    new = {"model": "m", "prune": {"seed": 1, "method": "a"}, "extra": 2}
    assert differences(old, new) == ["extra (None there, 2 now)", "prune.seed (0 there, 1 now)"]


def test_measured_rows_are_of_the_recipes_that_are_here():
    """A recipe that changes after it was measured would stand beside figures that are not its
    own."""
    rows = json.loads((ROOT / "results/oneshot-smollm2-135m.json").read_text())["rows"]
    named = {
        row["method"]: row for row in rows if (ROOT / f"recipes/{row['method']}.yaml").is_file()
    }
    assert {"closed-form", "best"} <= named.keys()
    for name, row in named.items():
        section = Recipe.load(ROOT / f"recipes/{name}.yaml").prune.model_dump(mode="json")
        section["calibration"]["seed"] = row["seed"]
        assert fingerprint("demo", validate(Prune, section)) == row["fingerprint"], name


def test_settings_that_came_later_leave_older_runs_what_they_are():
    step = {"name": "reconstruct"}
    ids = [
        fingerprint("demo", validate(Prune, {"refine": [{**step, **more}]}))
        for more in ({}, {"through": 0}, {"through": 1})
    ]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_settled_recipe_leaves_nothing_open_and_stays_settled(path, gpu):
    asked = Recipe.load(path).prune
    settled = asked.settled(gpu=gpu)
    assert settled.settled(gpu=not gpu) == settled and settled.needs in NEEDS
    if asked.learn is None:
        assert settled is asked
    else:
        learn = settled.learn
        assert (
            learn.scope == learn.objective != "auto"
            and learn.steps >= 1
            and getattr(learn, "step_size", 1) > 0
        )


@pytest.mark.parametrize(
    "section,gpu,scope",
    [
        ({}, True, "global"),
        ({}, False, "block"),
        ({"permute": True}, True, "block"),
        ({"learn": {"objective": "global"}}, False, "global"),
        ({"learn": {"objective": "block"}}, True, "block"),
    ],
)
def test_what_is_learned_depends_on_the_gpu_where_nobody_says(section, gpu, scope):
    spec = validate(Prune, {"method": "maskllm", **section})
    settled = spec.settled(gpu=gpu)
    assert (
        settled.learn.scope == scope and settled.learn.steps == {"global": 1000, "block": 60}[scope]
    )
    assert settled.needs == (
        "none" if scope == "global" and not spec.permute else "gram"
    )  # of the priors
    assert (settled.whole_model is None) == (scope == "block")


def test_what_is_not_settled_cannot_be_taken_for_settled():
    spec = validate(Prune, {"method": "maskllm"})
    for ask in (lambda: spec.needs, lambda: spec.whole_model, lambda: spec.learn.scope):
        with pytest.raises(ValueError, match="not settled"):
            ask()


@pytest.mark.parametrize(
    "section,needs",
    [
        ({"method": "magnitude"}, "none"),
        ({"method": "magnitude", "permute": True}, "norms"),
        ({"method": "wanda"}, "norms"),
        ({"method": "magnitude", "refine": [{"name": "bias"}]}, "norms"),
        ({"method": "wanda", "refine": [{"name": "refit"}]}, "gram"),
        ({"method": "magnitude", "refine": [{"name": "finetune"}]}, "none"),
        ({"method": "magnitude", "wbits": 4}, "gram"),
        ({"method": "maskllm", "learn": {"objective": "block", "priors": ["magnitude"]}}, "norms"),
    ],
)
def test_a_recipe_needs_what_its_parts_need(section, needs):
    assert validate(Prune, section).needs == needs


def test_the_method_that_scores_is_the_first_prior_of_a_learned_one():
    assert Prune(method="wanda").one_shot_method == "wanda"
    learned = {
        "method": "maskllm",
        "learn": {"priors": ["masks.safetensors", "wanda", "magnitude"]},
    }
    assert validate(Prune, learned).one_shot_method == "wanda"
    learned["learn"]["priors"] = ["masks.safetensors"]
    assert validate(Prune, learned).one_shot_method == "magnitude"


def test_recipes_keep_their_fingerprints():
    """Only a change of a recipe itself changes its identity; then its line in that file changes
    with it."""
    now = {
        path.stem: fingerprint(recipe.model, recipe.prune)
        for path in RECIPES
        for recipe in [Recipe.load(path)]
    }
    written = json.loads((ROOT / "tests/recipe/fingerprints.json").read_text())
    assert {name: now[name] for name in written.keys() & now.keys()} == written
