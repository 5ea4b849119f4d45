"""Debian packages as archives of assets: apt-get downloads them, dpkg-deb unpacks them, and neither
needs root."""

from __future__ import annotations

import shutil
import subprocess
from fnmatch import fnmatchcase
from pathlib import Path

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.system.assets import Archive, Asset


def _download(asset: Asset, folder: Path) -> Path:
    hint = f"on another system, unpack the Debian package {asset.package} yourself and give the folder instead"
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise NmsparseError(
            f"'{asset.key}' is a Debian package, and apt-get is not on this machine.", hint
        )
    result = subprocess.run(
        ["apt-get", "download", f"{asset.package}={asset.version}"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    files = [path for path in folder.glob("*.deb") if path.name.replace("%3a", ":") == asset.wheel]
    if result.returncode or not files:
        lines = [line for line in result.stderr.splitlines() if line.startswith("E:")]
        reason = lines[-1].removeprefix("E: ") if lines else "apt-get could not download it"
        raise NmsparseError(
            f"Could not get '{asset.key}' ({asset.package} {asset.version}): {reason}", hint
        )
    return files[0]


def _unpack(asset: Asset, archive: Path, folder: Path) -> None:
    whole = folder.with_name("whole")
    result = subprocess.run(
        ["dpkg-deb", "-x", str(archive), str(whole)], capture_output=True, text=True
    )
    names = [
        str(path.relative_to(whole))
        for path in whole.rglob("*")
        if path.is_file() and not path.is_symlink()
    ]
    names = [name for name in names if any(fnmatchcase(name, glob) for glob in asset.files)]
    if result.returncode or not names:
        raise NmsparseError(f"{asset.wheel} does not hold the expected files.")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (whole / name).rename(folder / name)


DEB = Archive(_download, _unpack)
