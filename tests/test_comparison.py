"""Several recipes on one model: paired, resumable, and shown."""

from __future__ import annotations

import json

import pytest

from nmsparse_deploy.comparison import compare, load
from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.recipe import Evaluate, validate
from tests.find.test_prune import spec


@pytest.fixture
def recipes(texts):
    return {
        "wanda": spec(texts, "wanda"),
        "sparsegpt": spec(texts, "sparsegpt"),
        "refitted": spec(texts, "wanda", refine=[{"name": "refit"}]),
    }


def test_side_by_side(recipes, llama_dir, texts, tmp_path):
    held_out = validate(
        Evaluate, {"data": str(texts["held_out"]), "tokens": 256, "context": 64, "continuation": 0}
    )
    result = compare(recipes, str(llama_dir), held_out, tmp_path / "c")
    assert [row.recipe for row in result.rows] == list(recipes) and result.same_calibration
    assert (
        result.rows[0].gap_closed == 0
        and result.rows[1].difference.low <= result.rows[1].difference.mean
    )
    for row in result.rows:
        alone = json.loads((tmp_path / "c" / row.recipe / "evaluate.json").read_text())["results"]
        assert (
            row.value == alone["pruned"]["value"] and result.dense.value == alone["dense"]["value"]
        )
    page, text = ((tmp_path / "c" / f"compare.{end}").read_text() for end in ("html", "md"))
    assert (
        "<svg" in page
        and "<script" not in page
        and "http" not in page.replace("http://www.w3.org", "")
    )
    assert all(name in page and name in text for name in recipes)
    before = {
        name: (tmp_path / "c" / name / "manifest.json").stat().st_mtime_ns for name in recipes
    }
    again = compare(recipes, str(llama_dir), held_out, tmp_path / "c")
    assert again.rows == result.rows
    assert before == {
        name: (tmp_path / "c" / name / "manifest.json").stat().st_mtime_ns for name in recipes
    }


def test_names_and_files(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("prune: {method: wanda, pattern: '4:8'}")
    found = load(["sparsegpt", "wanda+refit", str(file)])
    assert list(found) == ["sparsegpt", "wanda+refit", "mine"] and found["mine"].pattern == "4:8"
    assert [step.name for step in found["wanda+refit"].refine] == ["refit"]


@pytest.mark.parametrize(
    "names,sentence",
    [
        (["wanda"], "two recipes or more"),
        (["wanda", "wanda"], "Two recipes are called"),
        (["wanda", "wandaa"], "Did you mean"),
        (["wanda", "magnitude+refits"], "Did you mean"),
        (["wanda", "nowhere.yaml"], "There is no recipe"),
    ],
)
def test_bad_names_are_one_sentence(names, sentence):
    with pytest.raises(UsageError, match=sentence):
        load(names)


def test_other_held_out_text_is_scored_again(llama_dir, texts, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(texts["held_out"].read_bytes())
    settings = {"data": str(text), "tokens": 128, "context": 64, "continuation": 0, "photos": ""}
    held_out, only = validate(Evaluate, settings), {"a": spec(texts, "magnitude")}
    first = compare(only, str(llama_dir), held_out, tmp_path / "c").rows[0].value
    text.write_text(text.read_text().replace("a", "q"))
    assert compare(only, str(llama_dir), held_out, tmp_path / "c").rows[0].value != first
