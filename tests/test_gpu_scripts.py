"""The unattended GPU scripts, dry: every part walks its whole way, and no limit, failure or missing GPU loses a record."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import gpu_bundle, gpu_learn, gpu_parts, gpu_proof
from benchmarks.files import read_json
from benchmarks.gpu_supervise import supervise
from nmsparse_deploy.data.self_generated import GENERATED
from tests.fixtures import pico

SHELL = "/bin/sh"


def shell(text: str) -> list[str]:
    return [SHELL, "-c", text]


def test_a_part_that_ends_well_hands_over_its_record(tmp_path):
    out = tmp_path / "part.json"
    record = supervise(shell(f"echo '{{\"a\": 1}}' > {out}"), 30, out)
    assert record["state"] == "done" and record["data"] == {"a": 1} and record["reason"] is None


def test_a_part_that_fails_keeps_what_it_had_and_says_why(tmp_path):
    out = tmp_path / "part.json"
    record = supervise(shell(f"echo '{{\"a\": 1}}' > {out}; echo 'CUDA error: oh no' >&2; exit 3"), 30, out)
    assert record["state"] == "failed" and record["data"] == {"a": 1} and record["reason"] == "CUDA error: oh no"
    assert supervise(shell("exit 4"), 30, out)["reason"] == "it ended with code 4 and said nothing"


def test_a_part_that_does_not_end_is_ended_with_all_that_it_started(tmp_path):
    out, witness = tmp_path / "part.json", tmp_path / "late"
    start = time.monotonic()
    record = supervise(shell(f"echo '{{\"a\": 2}}' > {out}; (trap '' TERM; sleep 5; touch {witness}) & trap '' TERM; sleep 60"),
                       0.5, out)
    assert record["state"] == "stopped at its limit" and record["data"] == {"a": 2} and time.monotonic() - start < 30
    time.sleep(0.1)
    assert not witness.exists()


def test_an_old_record_is_never_taken_for_a_new_one(tmp_path):
    out = tmp_path / "part.json"
    out.write_text('{"old": true}')
    assert supervise(shell("exit 1"), 30, out)["data"] is None
    assert supervise(shell("exit 0"), 0, out)["state"] == "no time left"
    assert read_json(tmp_path / "nothing") is None


# --- parts and proof -------------------------------------------------------------------------------------------------


def fake_tests(monkeypatch) -> None:
    """Collecting the GPU tests takes another interpreter."""
    told = subprocess.CompletedProcess([], 0, "3 tests collected\n", "")
    monkeypatch.setattr(gpu_parts.subprocess, "run", lambda *args, **more: told)


@pytest.mark.parametrize("part", gpu_parts.PARTS)
def test_every_part_walks_its_whole_way_dry(part, tmp_path, monkeypatch):
    fake_tests(monkeypatch)
    monkeypatch.setattr(gpu_parts, "PRECISIONS", ("fp16", "int8"))
    out = tmp_path / "part.json"
    gpu_parts.run_part(part, 600, out, dry=True)
    data = json.loads(out.read_text())
    assert data["dry"] is True
    for run in data.get("runs", ()):
        assert run["status"] == "dry run", run
    if part == "ladder":
        assert {one["precision"] for one in data["lines"]} == {"fp16", "int8"} and "Dry run" in data["markdown"]
    if part == "learning":
        assert set(data["steps"]) == {"plain", "masked", "masked, distilled"} and data["steps"]["plain"]["over_plain"] == 1
    if part == "compiled":
        assert "sparse_over_dense" in data["precisions"]["fp16"]


def in_process(part, seconds, dry, environment, work):
    """As `gpu_proof.run`, without another interpreter; one part fails."""
    if part == "vit":
        return {"state": "failed", "reason": "out of memory", "seconds": 1.0, "data": None, "output": ""}
    gpu_parts.run_part(part, seconds, work / f"{part}.json", dry)
    return {"state": "done", "reason": None, "seconds": 0.1, "data": read_json(work / f"{part}.json"), "output": None}


def test_the_proof_goes_on_after_a_failure_and_writes_as_it_goes(tmp_path, monkeypatch, capsys):
    fake_tests(monkeypatch)
    monkeypatch.setattr(gpu_parts, "PRECISIONS", ("fp16",))
    seen = []

    def run(*arguments):
        seen.append([path.name for path in tmp_path.glob("*.json")])
        return in_process(*arguments)

    monkeypatch.setattr(gpu_proof, "run", run)
    bundle = tmp_path / "no-bundle"
    asked = ["--dry", "--out", str(tmp_path), "--bundle", str(bundle)]
    assert gpu_proof.main([*asked, "--only", "ladder", "--only", "vit", "--only", "llama", "--only", "tests"]) == 1
    assert seen[0] == [] and all(len(names) == 1 for names in seen[1:])
    path = Path(capsys.readouterr().out.strip())
    data, page = json.loads(path.read_text()), path.with_suffix(".md").read_text()
    assert [data["parts"][name]["state"] for name in ("ladder", "vit", "llama", "tests")] == ["done", "failed", "done", "done"]
    assert data["dry"] and "DRY RUN" in data["note"] and "DRY RUN" in page and "out of memory" in page
    assert "3 tests collected" in page and "Llama-8B shapes" in page
    assert gpu_proof.main([*asked, "--only", "vit"]) == 1 and len(list(tmp_path.glob("*.json"))) == 2  # beside, not over it
    assert not list(tmp_path.glob(".*"))


def test_limits_fit_into_nine_minutes():
    assert sum(gpu_proof.limits().values()) <= gpu_proof.SECONDS <= 500


def test_a_dry_run_never_writes_to_the_results(capsys):
    for out in (gpu_proof.RESULTS, gpu_proof.RESULTS / "sub"):
        assert gpu_proof.main(["--dry", "--out", str(out)]) == 1
        assert "never writes to results/gpu" in capsys.readouterr().err


def test_without_a_gpu_each_script_says_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_proof, "gpu_name", lambda: None)
    monkeypatch.setattr(gpu_learn, "has_gpu", lambda: False)
    for script, arguments in ((gpu_proof, ["--out", str(tmp_path)]), (gpu_learn, ["--out", str(tmp_path)])):
        assert script.main(arguments) == 1
        told = capsys.readouterr()
        assert told.out == "" and told.err.count("\n") == 1 and "no CUDA device" in told.err
    assert not list(tmp_path.iterdir())


# --- bundle ----------------------------------------------------------------------------------------------------------


def test_a_bundle_comes_back_as_it_was(tmp_path):
    data = gpu_bundle.bundle(tmp_path / "bundle", (), dry=True)
    assert data["dry"] and len(data["files"][0]["pieces"]) == 3
    environment = gpu_bundle.unpacked(tmp_path / "bundle", tmp_path / "work")
    made = tmp_path / "work/cache/assets/demo-0/made-up.bin"
    assert made.read_bytes() == bytes(range(256)) * 8 and environment == {"NMSPARSE_CACHE": str(tmp_path / "work/cache")}
    assert gpu_bundle.main(["--dry", "--out", str(tmp_path / "bundle")]) == 0  # replaces the one before


@pytest.mark.parametrize("size", (0, 1, 999, 1000, 1001))
def test_pieces_have_the_asked_size(size, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"x" * size)
    row = gpu_bundle.split(file, "a/b", tmp_path, 1000)
    assert sum(piece["bytes"] for piece in row["pieces"]) == size and max(p["bytes"] for p in row["pieces"]) <= 1000
    assert gpu_bundle.join(row, tmp_path, tmp_path / "out").read_bytes() == file.read_bytes()
    assert gpu_bundle.PIECE < 60_000_000


def test_damaged_and_hostile_bundles_are_refused(tmp_path):
    gpu_bundle.bundle(tmp_path / "bundle", (), dry=True)
    piece = next((tmp_path / "bundle/files").iterdir())
    piece.write_bytes(b"y" + piece.read_bytes()[1:])
    with pytest.raises(gpu_bundle.BundleError, match="damaged"):
        gpu_bundle.unpacked(tmp_path / "bundle", tmp_path / "work")
    assert not list((tmp_path / "work").rglob("made-up.bin"))
    with pytest.raises(gpu_bundle.BundleError, match="outside"):
        gpu_bundle.join({"name": "../../x", "pieces": [], "sha256": ""}, tmp_path, tmp_path / "work")
    (tmp_path / "bundle/manifest.json").write_text("{")
    with pytest.raises(gpu_bundle.BundleError, match="no bundle"):
        gpu_bundle.unpacked(tmp_path / "bundle", tmp_path / "work")


# --- learning in slices ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", gpu_learn.JOBS)
def test_learning_stops_with_its_slice_and_goes_on(job, tmp_path, texts, monkeypatch, capsys):
    from nmsparse_deploy.find.learn import loop

    source = pico.save(pico.llama(), tmp_path / "model")
    asked = ["--dry", "--job", job, "--out", str(tmp_path / "out"), "--model", str(source), "--bundle", str(tmp_path / "none")]
    monkeypatch.setattr(loop, "QUIET", 0.0)  # the loop speaks after every step
    monkeypatch.setenv("NMSPARSE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("OUT", str(tmp_path / "home"))
    assert gpu_learn.main([*asked, "--minutes", "0"]) == 0
    first = json.loads((tmp_path / f"out/{job}.json").read_text())
    assert first["state"] == "to be continued" and first["dry"] is True
    assert 0 < first["step"] < 6 if job == "maskllm" else first["step"] == 0  # there a finished block is kept first
    assert "call it again" in capsys.readouterr().out
    assert gpu_learn.main([*asked, "--minutes", "10"]) == 0
    last = json.loads((tmp_path / f"out/{job}.json").read_text())
    assert last["state"] == "done" and last["step"] == 6 and last["best"] <= last["prior"]
    assert len(last["history"]) >= 3 and "scores" not in last
    assert json.loads((tmp_path / f"home/{job}.json").read_text()) == last, "a copy is brought home"
    assert [file.name for file in (tmp_path / "home").iterdir()] == [f"{job}.json"], "and the runs stay"
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1, "written once"


def test_a_finished_job_is_scored_against_the_ends_of_the_scale(tmp_path, texts, monkeypatch):
    source = pico.save(pico.llama(), tmp_path / "out/maskllm/model")
    texts = {"held out": str(texts["held_out"]), "elsewhere": "wikitext2"}
    ends = [{"method": method, **{text: {"ppl": ppl} for text in texts.values()}}
            for method, ppl in (("dense", 10.0), ("sparsegpt", 1000.0))]
    monkeypatch.setattr(gpu_learn, "RESULTS", tmp_path)
    monkeypatch.delenv("NMSPARSE_DATA", raising=False)
    (tmp_path / "baseline-smollm2-135m.json").write_text(json.dumps(
        {"protocol": {"tokens": 512, "context": 64, "texts": list(texts.values())}, "table": ends}))
    save_file({"ids": torch.zeros(2, 64, dtype=torch.int32)}, source.parent / "calibration.safetensors")
    found = gpu_learn.scores(source.parent)
    one = found[texts["held out"]]
    assert one["gap_closed"] == pytest.approx((math.log(1000) - math.log(one["ppl"])) / math.log(100))
    assert 100 < one["ppl"] < 1000  # bytes, guessed by an untrained model
    assert "NMSPARSE_DATA" in found["wikitext2"]["not_measured"]


def test_a_finished_job_is_scored_once_and_kept_with_the_results(tmp_path, monkeypatch):
    monkeypatch.setenv("NMSPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gpu_learn, "JOBS", gpu_learn.DRY)
    monkeypatch.setattr(gpu_learn, "RESULTS", tmp_path / "results")
    scored = []
    monkeypatch.setattr(gpu_learn, "scores", lambda run: scored.append(run) or {"bbc": {"ppl": 1.0}})
    source = pico.save(pico.llama(), tmp_path / "model")
    given = Namespace(dry=False, data=None, out=tmp_path / "out", model=str(source))
    (tmp_path / "out").mkdir()
    first, again = (gpu_learn.slice_of("maskllm", given, math.inf) for _ in range(2))
    assert scored == [tmp_path / "out/maskllm"] and first["state"] == "done" and again == read_json(tmp_path / "out/maskllm.json")
    assert read_json(tmp_path / "results/gpu/learn-maskllm.json") == again == json.loads(json.dumps(first))


def test_the_learning_jobs_are_valid_recipes():
    from nmsparse_deploy.recipe import Prune, validate

    for jobs in (gpu_learn.JOBS, gpu_learn.DRY):
        for job in jobs.values():
            spec = validate(Prune, job)
            assert (spec.learn is None) != (spec.finetune is None)
            assert GENERATED in spec.calibration.data, "no packaged text is long enough"


def test_the_sparse_kernels_of_a_dry_run_are_gone_afterwards(tmp_path):
    from nmsparse_deploy.ship.torch_sparse.semi_structured import kernels

    before = kernels()
    gpu_parts.run_part("small", 60, tmp_path / "small.json", dry=True)
    assert kernels() is before and (torch.cuda.is_available() or before.why_not("fp16"))


def test_scripts_do_not_need_the_package_before_the_bundle_is_unpacked():
    """`gpu_proof` and what it imports at the top are standard library: the machine may lack packages."""
    import ast

    root = Path(gpu_proof.__file__).parent
    for name in ("gpu_proof", "gpu_bundle", "gpu_supervise", "gpu_learn", "gpu_parts"):
        tree = ast.parse((root / f"{name}.py").read_text())
        names = {alias.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert names <= set(sys.stdlib_module_names) | {"benchmarks", "__future__"}, name
