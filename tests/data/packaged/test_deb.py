"""Debian packages: only the named files are taken, and what cannot be had is one sentence."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from nmsparse_deploy.data.packaged import corpus_folder, deb
from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.system.assets import Asset, digest

NAME = "toy_1_all.deb"
GLOB = "usr/share/toy/*.gz"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An asset in a Debian package; returns a function that says what apt-get leaves in the
    folder."""
    monkeypatch.setenv("NMSPARSE_CACHE", str(tmp_path / "cache"))
    run = subprocess.run

    def leaves(file: Path | None, error: str = "", sha256: str = "0" * 64) -> None:
        toy = Asset("toy", "images", "a toy", "toy", "1", NAME, sha256, (GLOB,), source="debian")
        monkeypatch.setattr("nmsparse_deploy.system.assets.assets", lambda: {"toy": toy})
        monkeypatch.setattr("nmsparse_deploy.data.packaged.assets", lambda: {"toy": toy})

        def command(arguments, **options):
            if arguments[0] != "apt-get":
                return run(arguments, **options)
            if file is not None:
                shutil.copy(file, Path(options["cwd"]) / NAME)
            return subprocess.CompletedProcess(arguments, 0 if file else 100, "", error)

        monkeypatch.setattr(deb.subprocess, "run", command)
        monkeypatch.setattr(deb.shutil, "which", lambda name: name)

    return leaves


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="makes a Debian package")
def test_only_the_named_files_are_taken(package, tmp_path):
    root = tmp_path / "root"
    for name in ("usr/share/toy/a.gz", "usr/share/toy/code.py", "usr/bin/toy"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "DEBIAN").mkdir()
    (root / "DEBIAN/control").write_text(
        "Package: toy\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: toy\n"
    )
    subprocess.run(
        ["dpkg-deb", "--build", "--root-owner-group", str(root), str(tmp_path / NAME)],
        check=True,
        capture_output=True,
    )
    package(tmp_path / NAME, sha256=digest(tmp_path / NAME))
    folder = corpus_folder("toy", "images")
    assert [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()] == [
        "usr/share/toy/a.gz"
    ]
    assert corpus_folder("toy", "text") is None and corpus_folder("other", "images") is None


def test_wrong_bytes_are_refused(package, tmp_path):
    (tmp_path / "junk.deb").write_bytes(b"junk")
    package(tmp_path / "junk.deb")
    with pytest.raises(NmsparseError, match="not used"):
        corpus_folder("toy", "images")


def test_what_apt_says_is_one_sentence(package, monkeypatch):
    package(None, "W: x\nE: Version '1' for 'toy' was not found\n")
    with pytest.raises(NmsparseError, match=r"Could not get 'toy'.*Version '1'"):
        corpus_folder("toy", "images")
    monkeypatch.setattr(deb.shutil, "which", lambda name: None)
    with pytest.raises(NmsparseError, match="apt-get is not on this machine"):
        corpus_folder("toy", "images")
