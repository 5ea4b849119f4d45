import json
import shlex
import shutil

import numpy as np
import pytest
import torch

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.masks import Mask, MaskSet, project
from nmsparse_deploy.measure.report import plots
from nmsparse_deploy.measure.report.build import build_report, summary
from nmsparse_deploy.measure.report.layers import masks
from nmsparse_deploy.pattern import NMPattern
from nmsparse_deploy.recipe import Prune, Recipe, fingerprint
from nmsparse_deploy.runs.manifest import RecipeRecord
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.runs.section import Graphic
from nmsparse_deploy.runs.wording import clean, interval, number, with_error, within
from tests.fixtures.run_folder import (
    Page,
    make_run,
    result,
    views,
    write_bench,
    write_evaluate,
    write_export,
    write_verify,
)


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(
        plots, "_svg", lambda draw, size, words, salt: Graphic("<svg></svg>", words)
    )


def report_of(run):
    build_report(run)
    return views(run)[2]


@pytest.mark.parametrize(
    "name",
    ["verify.json", "evaluate.json", "export.json", "bench.json", "layers.json", "plan.json"],
)
@pytest.mark.parametrize(
    "damage", ['{"results": ', "[3]", '{"results": 3, "reports": 3, "files": 3, "rows": 3}', "7"]
)
def test_a_damaged_stage_file_is_one_sentence_and_keeps_the_old_report(tmp_path, name, damage):
    run = make_run(tmp_path / "run")
    build_report(run)
    before = (run / "report/index.html").read_bytes()
    (run / name).write_text(damage)
    for call in (build_report, summary):
        with pytest.raises(UsageError) as error:
            call(run)
        assert name in error.value.message and "damaged" in error.value.message
    assert (run / "report/index.html").read_bytes() == before


def test_the_method_is_named_with_what_surrounds_it(tmp_path):
    run = make_run(tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text())
    steps = Recipe.model_validate(
        {
            "prune": {
                "method": "group-obs",
                "refine": [{"name": "refit"}],
                "sequential": True,
                "permute": True,
            }
        }
    ).prune.model_dump(mode="json")
    manifest["recipe"] |= steps
    (run / "manifest.json").write_text(json.dumps(manifest))
    report = report_of(run)
    assert report["headline"]["method"] == "permuted channels + group-obs + refit"
    commands = " ".join(report["provenance"]["commands"])
    assert all(part in commands for part in ("--refine refit", "--sequential", "--permute"))


def test_a_run_that_is_not_pruned_is_refused(tmp_path):
    run = RunDir.create(tmp_path / "run", RecipeRecord.of("pico", Prune()), "0", force=False)
    with pytest.raises(UsageError, match="not pruned yet"):
        build_report(run)


def test_the_headline_is_json_and_complete(tmp_path):
    facts = summary(make_run(tmp_path / "run")).to_json()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert (facts["pattern"], facts["method"], facts["layers"]) == ("2:4", "sparsegpt", 4)
    assert facts["compliance"] == {"checked": 8, "failed": 0, "ok": True}
    assert [row["label"] for row in facts["metrics"]] == ["dense", "pruned"]
    assert facts["sizes"]["model_bytes"] == 123_456
    assert [row["place"] for row in facts["not_checked"]] == ["engine", "sparse kernels"]
    assert 4 <= len(facts["lines"]) <= 7 and all(
        line.endswith(".") and "\n" not in line for line in facts["lines"]
    )


def test_a_failed_verification_is_said_first(tmp_path):
    run = make_run(tmp_path / "run")
    write_verify(run, bad=3)
    data = report_of(run)
    assert data["headline"]["state"] == "fails" and data["headline"]["compliance"]["failed"] == 4
    assert (
        "VERIFICATION FAILED in the saved model: 4 of 8 checked tensors"
        in data["headline"]["verdict"]
    )
    page = Page(views(run)[0]).text
    assert "Verification failed" in page and "3 of 512 groups break the pattern" in page
    assert "3 of 512 groups" in views(run)[1]


def test_places_are_named_within_the_run_even_after_it_moved(tmp_path):
    make_run(tmp_path / "first/run")
    shutil.move(tmp_path / "first/run", tmp_path / "moved")
    run = RunDir(tmp_path / "moved")
    data = report_of(run)
    assert [place["artefact"] for place in data["compliance"]["places"]] == [
        "model",
        "onnx/fp32/model.onnx",
    ]
    assert [place["place"] for place in data["compliance"]["places"]] == [
        "saved model",
        "ONNX fp32",
    ]
    assert not any(str(tmp_path) in view for view in (*views(run)[:2], json.dumps(data)))


def test_an_infinite_perplexity_is_a_word_and_not_a_number(tmp_path):
    run = make_run(tmp_path / "run", ())
    write_evaluate(run, pruned=float("inf"))
    data = report_of(run)
    assert data["quality"]["rows"][1]["value"] == "infinite"
    assert "went from 25.95 dense to infinite pruned" in data["headline"]["verdict"]


def test_one_sample_has_no_error_and_no_interval(tmp_path):
    run = make_run(tmp_path / "run", ())
    write_evaluate(run, samples=1)
    data = report_of(run)
    assert data["quality"]["rows"][0]["standard_error"] is None
    assert data["quality"]["comparison"]["low"] is None
    assert "interval not measured" in data["headline"]["verdict"]
    assert "Standard error of dense: not measured" in Page(views(run)[0]).text


def test_any_metric_and_any_label_is_reported(tmp_path):
    run = make_run(tmp_path / "run", ())
    rows = {
        label: result(value, 50, "top1").to_json()
        for label, value in (("pruned, ONNX fp16", 0.71), ("dense", 0.81), ("pruned", 0.72))
    }
    run.write_json(
        "evaluate.json",
        {"results": rows, "difference": {"difference": -0.09, "low": -0.1, "high": -0.08}},
    )
    data = report_of(run)
    assert [row["label"] for row in data["quality"]["rows"]] == [
        "dense",
        "pruned",
        "pruned, ONNX fp16",
    ]
    assert (
        "top1 went from 0.81 dense to 0.72 pruned (pruned − dense -0.090"
        in data["headline"]["verdict"]
    )
    assert data["continuations"] is None and "What the models write" not in views(run)[0]


def test_a_method_without_data_has_no_errors_and_no_calibration(tmp_path):
    run = make_run(tmp_path / "run", method="magnitude", errors=False)
    data = report_of(run)
    html, markdown, _ = views(run)
    assert data["layers"]["series"] == {} and data["provenance"]["calibration"] is None
    assert (
        "Relative errors per layer were not measured" in html and "used no calibration data" in html
    )
    assert "| not measured | 0.25 s |" in markdown


def test_a_ratio_between_two_runtimes_is_marked(tmp_path):
    run = make_run(tmp_path / "run", ())
    write_bench(run)
    marked = {arm["name"]: arm["other_runtime"] for arm in report_of(run)["latency"]["arms"]}
    assert marked == {"dense": False, "pruned": False, "pruned, ONNX fp32": True}
    assert all(
        "says nothing" in view or "say nothing about pruning" in view for view in views(run)[:2]
    )
    write_bench(run, ("dense", "pruned"))
    assert report_of(run)["latency"]["note"] is None


def test_predictions_are_called_predictions(tmp_path):
    run = make_run(tmp_path / "run", ("bench",))
    data = report_of(run)
    html, markdown, _ = views(run)
    assert data["latency"]["predicted"][0]["model_speedup"] == 1.375
    assert (
        "1.38 times" in html
        and "1.38 times" in markdown
        and "1.38" not in data["headline"]["verdict"]
    )
    assert all("Predicted, not measured" in view for view in (html, markdown))
    bench = run.read_json("bench.json")
    run.write_json("bench.json", {key: value for key, value in bench.items() if key != "predicted"})
    assert report_of(run)["latency"]["predicted"] == [] and "Predicted" not in views(run)[0]


def test_a_comparison_that_could_not_run_is_listed(tmp_path):
    run = make_run(tmp_path / "run", ("verify",))
    write_export(run, {"not_checked": "needs the package 'onnxruntime'"})
    assert {"place": "output of ONNX fp32", "why": "needs the package 'onnxruntime'"} in report_of(
        run
    )["not_checked"]
    assert "not run here: needs the package" in Page(views(run)[0]).text


def test_the_recipe_and_the_commands_give_the_same_run(tmp_path):
    run = make_run(tmp_path / "run")
    origin = report_of(run)["provenance"]
    (tmp_path / "recipe.yaml").write_text(origin["recipe_yaml"])
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    assert fingerprint(recipe.model, recipe.prune) == run.manifest().fingerprint
    words = [shlex.split(command) for command in origin["commands"]]
    assert [line[1] for line in words] == ["prune", "export", "evaluate", "bench", "report"]
    assert words[0][2] == "pico" and {"--samples", "2", "--length", "16"} <= set(words[0])


def test_settings_without_an_option_are_reproduced_through_the_recipe(tmp_path):
    run = make_run(tmp_path / "run", ())
    manifest = run.read_json("manifest.json")
    manifest["recipe"]["compute"] = "fp32"
    run.write_json("manifest.json", manifest)
    assert report_of(run)["provenance"]["commands"][0].startswith(
        "nmsparse-deploy run recipe.yaml --out runs/run"
    )


def test_imported_masks_are_imported_again(tmp_path):
    run = make_run(tmp_path / "run", ())
    manifest = run.read_json("manifest.json")
    manifest["recipe"] |= {"method": "imported", "imported": {"masks": "found.npz", "sparse": None}}
    run.write_json("manifest.json", manifest)
    first = report_of(run)["provenance"]["commands"][0]
    assert first == "nmsparse-deploy import pico --masks found.npz --pattern 2:4 --out runs/run"


def test_an_arm_without_a_dense_twin_is_no_reference(tmp_path):
    run = make_run(tmp_path / "run", ("bench",))
    bench = run.read_json("bench.json")
    run.write_json("bench.json", {**bench, "ratios": {"pruned": bench["ratios"]["pruned"]}})
    markdown = (report_of(run), views(run)[1])[1]
    rows = {
        line.split("|")[1].strip(): line.split("|")[-2].strip()
        for line in markdown.splitlines()
        if "Runtime CPU" in line or "PyTorch CPU" in line
    }
    assert (
        rows["dense"] == "reference"
        and rows["pruned, ONNX fp32"] == "none: its dense twin was not timed"
    )


def test_kept_positions_are_counted_along_the_group_axis(tmp_path):
    run = make_run(tmp_path / "run", ())
    pattern = NMPattern(2, 4)
    bits = {
        name: project(torch.rand(shape, generator=torch.Generator().manual_seed(2)), pattern, axis)
        for name, shape, axis in (("a", (8, 6), 0), ("b", (4, 8, 3, 3), 1), ("c", (5, 12), 1))
    }
    axes = {"a": 0, "b": 1, "c": 1}
    MaskSet({n: Mask.pack(b, axes[n], pattern, "0") for n, b in bits.items()}).save(
        run / "masks.safetensors"
    )
    found = masks(run)
    wanted = np.zeros(4)
    for name, mask in bits.items():
        for place in range(4):
            wanted[place] += mask.index_select(
                axes[name], torch.arange(place, mask.shape[axes[name]], 4)
            ).sum()
    groups = sum(mask.numel() for mask in bits.values()) / 4
    assert found is not None and found.positions[0].kept == pytest.approx(list(wanted / groups))
    assert found.corner == tuple("".join(str(int(v)) for v in row) for row in bits["a"].T)


def test_patterns_are_counted_apart(tmp_path):
    run = make_run(tmp_path / "run", ())
    both = {text: NMPattern.parse(text) for text in ("2:4", "4:8")}
    MaskSet(
        {text: Mask.pack(project(torch.rand(8, 16), p), 1, p, "0") for text, p in both.items()}
    ).save(run / "masks.safetensors")
    assert [
        (row["pattern"], row["masks"], len(row["kept"]))
        for row in report_of(run)["masks"]["positions"]
    ] == [("2:4", 1, 4), ("4:8", 1, 8)]


def test_half_a_character_does_not_stop_the_report(tmp_path):
    run = make_run(tmp_path / "run", ())
    write_evaluate(run)
    text = (
        (run / "evaluate.json").read_text().replace("Paris.", "Paris\\ud800.")
    )  # what a byte tokenizer may decode to
    (run / "evaluate.json").write_text(text)
    assert report_of(run)["continuations"]["rows"][0]["texts"]["dense"].startswith("Paris?.")


def test_numbers_are_written_one_way():
    assert [
        number(x) for x in (25.95096, 1234567, 12136.36, 1310.3, 0.00012345, True, None, "infinite")
    ] == ["25.95", "1,234,567", "12,136", "1,310", "0.0001234", "yes", "not measured", "infinite"]
    assert with_error(116.10493, 6.76714) == "116.10 ± 6.77" and with_error(3.0, None) == "3"
    assert (
        interval(4.220454, 4.744250) == "4.22 to 4.74" and within(4.474, 4.2204, 4.7442) == "4.47"
    )
    assert interval(1.0, 1.0) == "1 to 1" and with_error(0.5, 0.0) == "0.5"
    assert clean({"a": (float("nan"), float("-inf"))}) == {"a": ["not a number", "minus infinite"]}
