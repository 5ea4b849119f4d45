"""The manifest: read into types, written back with every key; damaged or foreign, it is one
sentence."""

from __future__ import annotations

import json
import math

import pytest

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.recipe import Prune
from nmsparse_deploy.runs.manifest import Manifest, RecipeRecord
from nmsparse_deploy.runs.run_dir import RunDir

SPEC = Prune(
    method="maskllm",
    refine=[{"name": "refit"}],
    include=["*q_proj*"],
    patterns={"a": "dense"},
    calibration={"data": "bbc", "samples": 3},
)


@pytest.fixture
def run(tmp_path):
    return RunDir.create(tmp_path / "run", RecipeRecord.of("m", SPEC), "aaaa", force=False)


def test_the_recorded_recipe_has_the_fields_of_a_recipe():
    known = list(RecipeRecord.model_fields)
    assert known == ["model", *Prune.model_fields, "imported"]


def test_what_is_written_is_the_recipe_and_the_facts(run):
    spec = {"batch": 1, "shapes": (("x", 1),)}
    run.finish("build", 1.26, spec=spec, peak_memory_mb=7)
    run.finish(
        "prune",
        3,
        layers=2,
        calibration={"ids": ["gr\udcfc\u00dfe.png"], "loss": math.inf},
        compute="bfloat16",
    )
    data = run.read_json("manifest.json")
    assert list(data) == [
        "format",
        "fingerprint",
        "recipe",
        "created",
        "versions",
        "hardware",
        "stages",
    ]
    assert list(data["hardware"]) == ["cpu", "threads", "gpu"]
    assert data["recipe"] == {"model": "m", **SPEC.model_dump(mode="json")}
    assert (
        data["stages"]["build"].items()
        >= {"seconds": 1.3, "spec": {"batch": 1, "shapes": [["x", 1]]}, "peak_memory_mb": 7}.items()
    )
    assert data["stages"]["prune"].keys() == {
        "finished",
        "seconds",
        "layers",
        "calibration",
        "compute",
    }
    assert data["stages"]["prune"]["calibration"] == {
        "ids": ["gr\udcfc\u00dfe.png"],
        "loss": math.inf,
    }
    manifest = run.manifest()
    assert manifest.spec("build") == {"batch": 1, "shapes": [["x", 1]]}
    assert manifest.spec("prune") is None and manifest.spec("bench") is None
    assert manifest.recipe.calibration == SPEC.calibration and manifest.recipe.patterns == {
        "a": "dense"
    }


def test_keys_of_others_survive(run):
    data = run.read_json("manifest.json")
    data |= {"note": "mine"}
    data["recipe"]["later"] = [1]
    run.write_json("manifest.json", data)
    run.finish("bench", 1.0, spec={}, extra={"a": [1]})
    again = run.read_json("manifest.json")
    assert (
        again["note"] == "mine"
        and again["recipe"]["later"] == [1]
        and again["stages"]["bench"]["extra"] == {"a": [1]}
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": 2}, "was not written by this version of the tool"),
        ({"format": None}, "was not written by this version of the tool"),
        ({"recipe": {"model": "m"}}, r"manifest.json' is damaged: recipe.method: Field required"),
        (
            {
                "recipe": {
                    "model": "m",
                    "method": "wanda",
                    "pattern": "2:4",
                    "calibration": {"samples": -1},
                }
            },
            "calibration.samples",
        ),
        ({"stages": {"prune": {"finished": "now"}}}, "stages.prune.seconds"),
        (
            {"stages": {"prune": {"finished": "now", "seconds": 1, "memory": {}}}},
            "stages.prune.memory.weights",
        ),
        ({"stages": []}, "stages"),
        ({"versions": None}, "versions"),
        ({"hardware": {"cpu": "x"}}, "hardware.threads"),
    ],
)
def test_a_damaged_manifest_names_the_field(run, change, sentence):
    run.write_json("manifest.json", run.read_json("manifest.json") | change)
    with pytest.raises(UsageError, match=sentence) as caught:
        RunDir.open(run.path)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("foreign", [{"name": "a web page", "icons": []}, [], "text", None, 3])
def test_a_foreign_manifest_is_one_sentence(run, foreign):
    (run / "manifest.json").write_text(json.dumps(foreign))
    with pytest.raises(UsageError) as caught:
        run.manifest()
    assert "\n" not in caught.value.message


def test_a_model_that_is_no_text_is_refused_in_a_sentence():
    with pytest.raises(UsageError, match="model"):
        RecipeRecord.of(3, Prune())  # type: ignore[arg-type]


def test_manifests_cannot_be_changed(run):
    manifest: Manifest = run.manifest()
    with pytest.raises(ValueError, match="frozen"):
        manifest.fingerprint = "b"
