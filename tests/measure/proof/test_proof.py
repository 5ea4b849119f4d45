"""The proof, dry: every part walks its whole way, no limit, failure or missing GPU loses a record,
and a file is checked."""

from __future__ import annotations

import json
import time

import pytest

from nmsparse_deploy.errors import CheckFailed, NmsparseError, UsageError
from nmsparse_deploy.measure.proof import parts, run
from nmsparse_deploy.measure.proof.record import PartRecord, ProofRecord
from nmsparse_deploy.measure.proof.supervise import supervise

SHELL = "/bin/sh"


def shell(text: str) -> list[str]:
    return [SHELL, "-c", text]


def test_a_part_that_ends_well_hands_over_its_record(tmp_path):
    out = tmp_path / "part.json"
    record = supervise(shell(f"echo '{{\"a\": 1}}' > {out}"), 30, out)
    assert record.state == "done" and record.data == {"a": 1} and record.reason is None


def test_a_part_that_fails_keeps_what_it_had_and_says_why(tmp_path):
    out = tmp_path / "part.json"
    record = supervise(
        shell(f"echo '{{\"a\": 1}}' > {out}; echo 'CUDA error: oh no' >&2; exit 3"), 30, out
    )
    assert (
        record.state == "failed"
        and record.data == {"a": 1}
        and record.reason == "CUDA error: oh no"
    )
    assert supervise(shell("exit 4"), 30, out).reason == "it ended with code 4 and said nothing"


def test_a_part_that_does_not_end_is_ended_with_all_that_it_started(tmp_path):
    out, witness = tmp_path / "part.json", tmp_path / "late"
    start = time.monotonic()
    record = supervise(
        shell(
            f"echo '{{\"a\": 2}}' > {out}; (trap '' TERM; sleep 5; touch {witness}) & trap '' TERM; sleep 60"
        ),
        0.5,
        out,
    )
    assert (
        record.state == "stopped at its limit"
        and record.data == {"a": 2}
        and time.monotonic() - start < 30
    )
    time.sleep(0.1)
    assert not witness.exists()


def test_an_old_record_is_never_taken_for_a_new_one(tmp_path):
    out = tmp_path / "part.json"
    out.write_text('{"old": true}')
    assert supervise(shell("exit 1"), 30, out).data is None
    assert supervise(shell("exit 0"), 0, out).state == "no time left"


@pytest.mark.parametrize("part", parts.PARTS)
def test_every_part_walks_its_whole_way_dry(part, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PRECISIONS", ("fp16", "int8"))
    parts.measure(parts.PARTS[part], 600, tmp_path / "part.json", dry=True)
    data = json.loads((tmp_path / "part.json").read_text())
    assert data["dry"] is True
    for row in data.get("runs", ()):
        assert row["status"] == "dry run", row
    if part == "ladder":
        assert {line["precision"] for line in data["lines"]} == {
            "fp16",
            "int8",
        } and "Dry run" in data["markdown"]
    if part == "compiled":
        assert "sparse_over_dense" in data["precisions"]["fp16"]


def in_process(name, part, seconds, dry, work):
    """As `run.run_part`, without another interpreter; one part fails."""
    if name == "vit":
        return PartRecord(state="failed", reason="out of memory", seconds=1, output="")
    parts.measure(parts.PARTS[name], seconds, work / f"{name}.json", dry)
    return PartRecord(
        state="done", seconds=0.1, data=json.loads((work / f"{name}.json").read_text())
    )


def test_the_proof_goes_on_after_a_failure_and_writes_as_it_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PRECISIONS", ("fp16",))
    seen = []

    def watched(*arguments):
        seen.append([path.name for path in tmp_path.glob("*.json")])
        return in_process(*arguments)

    monkeypatch.setattr(run, "run_part", watched)
    path = run.prove(tmp_path, dry=True, only=["ladder", "vit", "llama"])
    assert seen[0] == [] and all(len(names) == 1 for names in seen[1:])
    record, page = ProofRecord.load(path), path.with_suffix(".md").read_text()
    assert [record.parts[name].state for name in ("ladder", "vit", "llama")] == [
        "done",
        "failed",
        "done",
    ]
    assert (
        record.dry
        and not record.complete
        and "DRY RUN" in page
        and "out of memory" in page
        and "Llama-8B shapes" in page
    )
    run.prove(tmp_path, dry=True, only=["vit"])
    assert len(list(tmp_path.glob("*.json"))) == 2, "beside the first, not over it"
    assert not list(tmp_path.glob(".*"))


def test_limits_fit_into_nine_minutes():
    assert sum(part.seconds for part in run.PARTS.values()) <= run.SECONDS <= 500


def test_bad_requests_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="never writes to results/gpu"):
        run.prove(dry=True)
    with pytest.raises(UsageError, match="no part 'ladders'"):
        run.prove(tmp_path, dry=True, only=["ladders"])
    with pytest.raises(NmsparseError, match="needs an NVIDIA GPU"):
        run.prove(tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "spoil,said",
    [
        (lambda d: d.pop("machine"), "machine"),
        (lambda d: d["machine"].pop("libraries"), "no libraries"),
        (lambda d: d.update(speedup=9), "speedup"),
        (lambda d: d["parts"]["vit"].update(state="fine"), "parts.vit.state"),
        (lambda d: d.update(format="other"), "format"),
        (lambda d: d["parts"]["vit"].update(seconds=-1), "seconds"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_its_field(spoil, said, tmp_path):
    machine = {"versions": {}, "libraries": {}, "state": {}}
    record = ProofRecord(
        command="x",
        dry=True,
        gpu="dry run",
        machine=machine,
        started="2026-11-25T00:00:00Z",
        parts={"vit": PartRecord(state="done", seconds=1)},
    )
    record.save(tmp_path / "good.json")
    assert ProofRecord.load(tmp_path / "good.json") == record and record.complete
    data = json.loads((tmp_path / "good.json").read_text())
    spoil(data)
    (tmp_path / "bad.json").write_text(json.dumps(data))
    with pytest.raises(CheckFailed, match=said):
        ProofRecord.load(tmp_path / "bad.json")


def test_every_result_of_a_gpu_fits():
    from tests import ROOT

    for path in (ROOT / "results/gpu").glob("*.json"):
        if not path.name.startswith("learn-"):
            assert not ProofRecord.load(path).dry, path


def test_the_verb_checks_a_file_and_refuses_what_is_none(tmp_path, capsys):
    from nmsparse_deploy.cli import app, invoke

    machine = {"versions": {}, "libraries": {}, "state": {}}
    record = ProofRecord(
        command="x",
        dry=True,
        gpu="dry run",
        machine=machine,
        started="2026-11-25T00:00:00Z",
        parts={"vit": PartRecord(state="failed", reason="out of memory", seconds=1)},
    )
    record.save(tmp_path / "proof.json")
    assert invoke(lambda: app(["proof", "--check", str(tmp_path / "proof.json"), "--json"])) == 1
    printed = capsys.readouterr()
    assert (
        json.loads(printed.out)["parts"] == {"vit": "failed"}
        and "Not every part finished" in printed.err
    )
    (tmp_path / "proof.json").write_text('{"format": ')
    assert invoke(lambda: app(["proof", "--check", str(tmp_path / "proof.json")])) == 1
    assert "no record of a proof" in capsys.readouterr().err
    assert invoke(lambda: app(["proof", "--check", str(tmp_path / "none.json")])) == 2
    assert invoke(lambda: app(["proof", "--dry", "--check", str(tmp_path / "none.json")])) == 2
    assert (
        invoke(lambda: app(["proof", "--out", str(tmp_path / "out")])) == 1
        and not (tmp_path / "out").exists()
    )


@pytest.mark.matrix
def test_the_whole_proof_typed_dry(tmp_path):
    import subprocess
    import sys

    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "nmsparse_deploy",
            "proof",
            "--dry",
            "--out",
            str(tmp_path),
            "--json",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (
        set(answer["parts"].values()) == {"done"}
        and ProofRecord.load(tmp_path / answer["file"]).dry
    )
