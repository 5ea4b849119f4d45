"""The unattended GPU scripts, dry: a bundle comes back whole, learning goes on after every
slice."""

from __future__ import annotations

import json
import math
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.files import read_json
from benchmarks.gpu import bundle, learn, proof
from nmsparse_deploy.data.self_generated import GENERATED
from nmsparse_deploy.measure.proof import parts, run
from tests.fixtures import pico


def test_the_script_adds_its_parts_and_says_what_fails(tmp_path, monkeypatch, capsys):
    asked = [
        "--dry",
        "--out",
        str(tmp_path),
        "--bundle",
        str(tmp_path / "no-bundle"),
        "--only",
        "learning",
        "--only",
        "tests",
    ]
    assert proof.main(asked) == 0
    data = json.loads(Path(capsys.readouterr().out.strip()).read_text())
    assert set(data["parts"]["learning"]["data"]["steps"]) == {
        "plain",
        "masked",
        "masked, distilled",
    }
    assert "collected" in data["parts"]["tests"]["data"]["summary"]
    assert sum(part.seconds for part in run.PARTS.values()) + 55 + 60 <= run.SECONDS


def test_without_a_gpu_each_script_says_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(learn, "has_gpu", lambda: False)
    for script in (proof, learn):
        assert script.main(["--out", str(tmp_path)]) == 1
        printed = capsys.readouterr()
        assert (
            printed.out == "" and printed.err.count("\n") == 1 and "GPU" in printed.err
        ) or "CUDA" in printed.err
    assert not list(tmp_path.iterdir())


# --- bundle
# ----------------------------------------------------------------------------------------------------------


def test_a_bundle_comes_back_as_it_was(tmp_path):
    data = bundle.bundle(tmp_path / "bundle", (), dry=True)
    assert data["dry"] and len(data["files"][0]["pieces"]) == 3
    environment = bundle.unpacked(tmp_path / "bundle", tmp_path / "work")
    made = tmp_path / "work/cache/assets/demo-0/made-up.bin"
    assert made.read_bytes() == bytes(range(256)) * 8 and environment == {
        "NMSPARSE_CACHE": str(tmp_path / "work/cache")
    }
    assert bundle.main(["--dry", "--out", str(tmp_path / "bundle")]) == 0  # replaces the one before


@pytest.mark.parametrize("size", (0, 1, 999, 1000, 1001))
def test_pieces_have_the_asked_size(size, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"x" * size)
    row = bundle.split(file, "a/b", tmp_path, 1000)
    assert (
        sum(piece["bytes"] for piece in row["pieces"]) == size
        and max(p["bytes"] for p in row["pieces"]) <= 1000
    )
    assert bundle.join(row, tmp_path, tmp_path / "out").read_bytes() == file.read_bytes()
    assert bundle.PIECE < 60_000_000


def test_damaged_and_hostile_bundles_are_refused(tmp_path):
    bundle.bundle(tmp_path / "bundle", (), dry=True)
    piece = next((tmp_path / "bundle/files").iterdir())
    piece.write_bytes(b"y" + piece.read_bytes()[1:])
    with pytest.raises(bundle.BundleError, match="damaged"):
        bundle.unpacked(tmp_path / "bundle", tmp_path / "work")
    assert not list((tmp_path / "work").rglob("made-up.bin"))
    with pytest.raises(bundle.BundleError, match="outside"):
        bundle.join({"name": "../../x", "pieces": [], "sha256": ""}, tmp_path, tmp_path / "work")
    (tmp_path / "bundle/manifest.json").write_text("{")
    with pytest.raises(bundle.BundleError, match="no bundle"):
        bundle.unpacked(tmp_path / "bundle", tmp_path / "work")


# --- learning in slices
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", learn.JOBS)
def test_learning_stops_with_its_slice_and_goes_on(job, tmp_path, texts, monkeypatch, capsys):
    from nmsparse_deploy.find.learn import loop

    source = pico.save(pico.llama(), tmp_path / "model")
    asked = [
        "--dry",
        "--job",
        job,
        "--out",
        str(tmp_path / "out"),
        "--model",
        str(source),
        "--bundle",
        str(tmp_path / "none"),
    ]
    monkeypatch.setattr(loop, "QUIET", 0.0)  # the loop speaks after every step
    monkeypatch.setenv("NMSPARSE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("OUT", str(tmp_path / "home"))
    assert learn.main([*asked, "--minutes", "0"]) == 0
    first = json.loads((tmp_path / f"out/{job}.json").read_text())
    assert first["state"] == "to be continued" and first["dry"] is True
    assert (
        0 < first["step"] < 6 if job == "maskllm" else first["step"] == 0
    )  # there a finished block is kept first
    assert "call it again" in capsys.readouterr().out
    assert learn.main([*asked, "--minutes", "10"]) == 0
    last = json.loads((tmp_path / f"out/{job}.json").read_text())
    assert last["state"] == "done" and last["step"] == 6 and last["best"] <= last["prior"]
    assert len(last["history"]) >= 3 and "scores" not in last
    assert json.loads((tmp_path / f"home/{job}.json").read_text()) == last, "a copy is brought home"
    assert [file.name for file in (tmp_path / "home").iterdir()] == [f"{job}.json"], (
        "and the runs stay"
    )
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1, "written once"


def test_a_finished_job_is_scored_against_the_ends_of_the_scale(tmp_path, texts, monkeypatch):
    source = pico.save(pico.llama(), tmp_path / "out/maskllm/model")
    texts = {"held out": str(texts["held_out"]), "elsewhere": "wikitext2"}
    ends = [
        {"method": method, **{text: {"ppl": ppl} for text in texts.values()}}
        for method, ppl in (("dense", 10.0), ("sparsegpt", 1000.0))
    ]
    monkeypatch.setattr(learn, "RESULTS", tmp_path)
    monkeypatch.delenv("NMSPARSE_DATA", raising=False)
    (tmp_path / "baseline-smollm2-135m.json").write_text(
        json.dumps(
            {
                "protocol": {"tokens": 512, "context": 64, "texts": list(texts.values())},
                "table": ends,
            }
        )
    )
    save_file(
        {"ids": torch.zeros(2, 64, dtype=torch.int32)}, source.parent / "calibration.safetensors"
    )
    found = learn.scores(source.parent)
    one = found[texts["held out"]]
    assert one["gap_closed"] == pytest.approx(
        (math.log(1000) - math.log(one["ppl"])) / math.log(100)
    )
    assert 100 < one["ppl"] < 1000  # bytes, guessed by an untrained model
    assert "NMSPARSE_DATA" in found["wikitext2"]["not_measured"]


def test_a_finished_job_is_scored_once_and_kept_with_the_results(tmp_path, monkeypatch):
    monkeypatch.setenv("NMSPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(learn, "JOBS", learn.DRY)
    monkeypatch.setattr(learn, "RESULTS", tmp_path / "results")
    scored = []
    monkeypatch.setattr(learn, "scores", lambda run: scored.append(run) or {"bbc": {"ppl": 1.0}})
    source = pico.save(pico.llama(), tmp_path / "model")
    given = Namespace(dry=False, data=None, out=tmp_path / "out", model=str(source))
    (tmp_path / "out").mkdir()
    first, again = (learn.slice_of("maskllm", given, math.inf) for _ in range(2))
    assert (
        scored == [tmp_path / "out/maskllm"]
        and first["state"] == "done"
        and again == read_json(tmp_path / "out/maskllm.json")
    )
    assert (
        read_json(tmp_path / "results/gpu/learn-maskllm.json")
        == again
        == json.loads(json.dumps(first))
    )


def test_the_learning_jobs_are_valid_recipes():
    from nmsparse_deploy.recipe import Prune, validate

    for jobs in (learn.JOBS, learn.DRY):
        for job in jobs.values():
            spec = validate(Prune, job)
            assert (spec.learn is None) != (spec.finetune is None)
            assert GENERATED in spec.calibration.data, "no packaged text is long enough"


def test_the_sparse_kernels_of_a_dry_run_are_gone_afterwards(tmp_path):
    from nmsparse_deploy.ship.torch_sparse.semi_structured import kernels

    before = kernels()
    parts.measure(parts.PARTS["small"], 60, tmp_path / "small.json", dry=True)
    assert kernels() is before and (torch.cuda.is_available() or before.why_not("fp16"))


def test_scripts_do_not_need_the_package_before_the_bundle_is_unpacked():
    """What the scripts import at the top is standard library: the machine may lack packages."""
    import ast

    root = Path(proof.__file__).parent
    for name in ("proof", "bundle", "learn"):
        tree = ast.parse((root / f"{name}.py").read_text())
        names = {
            alias.name.split(".")[0]
            for node in tree.body
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        names |= {
            node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)
        }
        assert names <= set(sys.stdlib_module_names) | {"benchmarks", "__future__"}, name
