"""Run folders: nothing half-written, resume rules, locks, full and read-only disks."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from nmsparse_deploy.errors import NmsparseError, UsageError, from_os_error
from nmsparse_deploy.recipe import Prune
from nmsparse_deploy.runs.manifest import RecipeRecord
from nmsparse_deploy.runs.run_dir import RunDir
from tests import ROOT

RECIPE = RecipeRecord.of("m", Prune(method="wanda"))


def test_create_resume_and_refuse(tmp_path):
    run = RunDir.create(tmp_path / "r", RECIPE, "aaaa", force=False)
    assert {"versions", "hardware", "recipe", "created"} <= run.read_json("manifest.json").keys()
    assert RunDir.create(tmp_path / "r", RECIPE, "aaaa", force=False).path == run.path
    other = RecipeRecord.of("m", Prune(method="wanda", calibration={"seed": 1}))
    with pytest.raises(UsageError, match=r"calibration.seed \(0 there, 1 now\)"):
        RunDir.create(tmp_path / "r", other, "bbbb", force=False)
    (tmp_path / "r" / "old.txt").write_text("x")
    RunDir.create(tmp_path / "r", other, "bbbb", force=True)
    assert not (tmp_path / "r" / "old.txt").exists()


def test_foreign_folders_are_never_touched(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    for force in (False, True):
        with pytest.raises(UsageError, match="not a run folder"):
            RunDir.create(tmp_path, RECIPE, "aaaa", force=force)
    assert (tmp_path / "mine.txt").read_text() == "precious"
    with pytest.raises(UsageError, match="not a run folder"):
        RunDir.open(tmp_path)


@pytest.mark.parametrize("text", ['{"name": "an app"}', '{"format": 1}', "[]", "{", "", "\ud83d"])
def test_force_deletes_no_folder_with_a_foreign_manifest(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text, errors="surrogatepass")
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match="not that of a run") as caught:
        RunDir.create(tmp_path, RECIPE, "aaaa", force=True)
    assert caught.value.exit_code == 2
    assert (tmp_path / "mine.txt").read_text() == "precious"
    assert (tmp_path / "manifest.json").read_text(errors="surrogatepass") == text


def test_newest_run_is_the_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no run here yet"):
        RunDir.open(None)
    import os

    for age, name in ((20, "a"), (10, "b")):
        run = RunDir.create(Path("runs") / name, RECIPE, name, force=False)
        stamp = run.path.stat().st_mtime - age
        os.utime(run / "manifest.json", (stamp, stamp))
    assert RunDir.open(None).path.name == "b"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}', '{"format": 1}'])
def test_damaged_manifests(tmp_path, text):
    run = RunDir.create(tmp_path / "r", RECIPE, "aaaa", force=False)
    (run / "manifest.json").write_text(text)
    with pytest.raises(UsageError):
        RunDir.open(run.path)


def test_a_failed_write_leaves_the_old_artefact(tmp_path):
    run = RunDir.create(tmp_path / "r", RECIPE, "aaaa", force=False)
    with run.replacing("model") as folder:
        folder.mkdir()
        (folder / "w").write_text("first")
    with pytest.raises(OSError), run.replacing("model") as folder:
        folder.mkdir()
        (folder / "w").write_text("second, half")
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))
    assert (run / "model" / "w").read_text() == "first"
    with run.replacing("model") as folder:
        folder.mkdir()
        (folder / "v").write_text("third")
    assert [f.name for f in (run / "model").iterdir()] == ["v"]
    assert sorted(f.name for f in run.path.iterdir()) == ["manifest.json", "model"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    run = RunDir.create(tmp_path / "r", RECIPE, "aaaa", force=False)
    (run / ".model-abc").mkdir()
    with run.lock():
        assert not (run / ".model-abc").exists()
        with pytest.raises(NmsparseError, match="Another process"), run.lock():
            pass
    with run.lock():
        pass


def test_another_process_is_kept_out_until_it_is_killed(tmp_path):
    run = RunDir.create(tmp_path / "r", RECIPE, "aaaa", force=False)
    script = (
        "import sys, time; from pathlib import Path; from nmsparse_deploy.runs.run_dir import RunDir\n"
        "with RunDir(Path(sys.argv[1])).lock():\n    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, run.path], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as other:
        try:
            assert other.stdout.readline() == "held\n"
            with (
                pytest.raises(NmsparseError, match=f"Another process is working on '{run.path}'"),
                run.lock(),
            ):
                pass
        finally:
            other.kill()
    with run.lock():
        pass


def test_read_only_place():
    with pytest.raises(OSError) as caught:  # the kernel allows nobody to make folders there
        RunDir.create(Path("/sys/nmsparse"), RECIPE, "aaaa", force=False)
    assert "No permission" in from_os_error(caught.value).message


@pytest.mark.parametrize(
    "number,sentence,code",
    [
        (errno.ENOSPC, "disk is full", 1),
        (errno.EDQUOT, "disk is full", 1),
        (errno.EROFS, "No permission", 1),
        (errno.EACCES, "No permission", 1),
        (errno.ENOENT, "no file or folder", 2),
        (errno.EIO, "failed", 1),
    ],
)
def test_os_errors_become_sentences(number, sentence, code):
    error = from_os_error(OSError(number, "reason", "/some/file"))
    assert sentence in error.message and "/some/file" in error.message and error.exit_code == code
