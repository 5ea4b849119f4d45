"""What a CUDA machine without network lacks, in one ignored folder: `make gpu-bundle`.

    gpu-bundle/wheels/      packages that its image does not have, for its Python
    gpu-bundle/files/       the packaged models and texts, split so that no file passes 60 MB
    gpu-bundle/manifest.json   which pieces make which file, with SHA-256

`proof.py` and `learn.py` install the wheels into a temporary folder, put the pieces together again,
check them, and point the package's cache there. Standard library only, because it runs before
anything is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.files import write_json

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "gpu-bundle"
PIECE = 50_000_000
"""Bytes of a piece."""
LACKS = (
    "pydantic",
    "pydantic_core",
    "annotated-types",
    "typing-inspection",
    "typing_extensions",
    "gguf",
)
"""What an image with torch, transformers, timm, typer, rich, onnx, onnxruntime and accelerate does
not have."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
ASSETS = ("demo", "wikipedia", "bbc", "vit", "minilm")
PYTHON = "3.12"


class BundleError(Exception):
    """One sentence."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=BUNDLE)
    parser.add_argument(
        "--asset", action="append", choices=ASSETS, help="left out: all; may be repeated"
    )
    parser.add_argument(
        "--dry", action="store_true", help="no network: one made-up file, no wheels"
    )
    given = parser.parse_args(arguments)
    try:
        data = bundle(given.out, tuple(given.asset or ASSETS), given.dry)
    except BundleError as error:
        print(f"gpu-bundle: {error}", file=sys.stderr)
        return 1
    for row in data["missing"]:
        print(f"gpu-bundle: without {row['what']}: {row['why']}", file=sys.stderr)
    size = sum(piece["bytes"] for file in data["files"] for piece in file["pieces"])
    print(
        f"{given.out}: {len(data['wheels'])} wheels, {len(data['files'])} files, {size / 1e6:.0f} MB in pieces"
    )
    return 0


def bundle(out: Path, wanted: tuple[str, ...], dry: bool) -> dict[str, Any]:
    """Fill the folder anew, under a temporary name until it is complete."""
    work = out.with_name(f".{out.name}")
    shutil.rmtree(work, ignore_errors=True)
    (work / "files").mkdir(parents=True)
    (work / "wheels").mkdir()
    data: dict[str, Any] = {"dry": dry, "python": PYTHON, "wheels": [], "files": [], "missing": []}
    if dry:
        made = work / "made-up.bin"
        made.write_bytes(bytes(range(256)) * 8)
        data["files"].append(split(made, "assets/demo-0/made-up.bin", work / "files", piece=1000))
        made.unlink()
    else:
        data["wheels"] = wheels(work / "wheels")
        for key in wanted:
            _asset(key, work / "files", data)
    write_json(work / "manifest.json", data)
    shutil.rmtree(out, ignore_errors=True)
    work.rename(out)
    return data


def wheels(folder: Path) -> list[str]:
    """Download what the machine lacks, for its Python, in the versions of constraints/cpu.txt."""
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints/cpu.txt").read_text().splitlines()
        if "==" in line
    )
    asked = [f"{name}=={pins[name]}" if name in pins else name for name in LACKS]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version",
        PYTHON,
        "--implementation",
        "cp",
        *(part for tag in PLATFORMS for part in ("--platform", tag)),
        "--dest",
        str(folder),
        *asked,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise BundleError(
            f"pip could not download the wheels: {lines[-1] if lines else 'no reason given'}."
        )
    return sorted(file.name for file in folder.iterdir())


def _asset(key: str, folder: Path, data: dict[str, Any]) -> None:
    from nmsparse_deploy.errors import NmsparseError
    from nmsparse_deploy.system.assets import cache_dir, fetch

    try:
        place = fetch(key)
    except NmsparseError as error:
        data["missing"].append({"what": key, "why": error.message})
        return
    for file in sorted(path for path in place.rglob("*") if path.is_file()):
        data["files"].append(split(file, str(file.relative_to(cache_dir())), folder))


def split(file: Path, name: str, folder: Path, piece: int = PIECE) -> dict[str, Any]:
    """Copy `file` in pieces; what makes it again."""
    whole, pieces = hashlib.sha256(), []
    stem = hashlib.sha256(name.encode()).hexdigest()[:12]
    with open(file, "rb") as source:
        while (chunk := source.read(piece)) or not pieces:
            whole.update(chunk)
            place = folder / f"{stem}-{len(pieces):03d}"
            place.write_bytes(chunk)
            pieces.append({"file": place.name, "bytes": len(chunk)})
    return {"name": name, "sha256": whole.hexdigest(), "pieces": pieces}


def unpacked(bundle: Path, work: Path) -> dict[str, str]:
    """Put a bundle to use under `work`; the environment variables that processes need. Raises
    `BundleError`."""
    try:
        data = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"'{bundle}' is no bundle: {error}.") from error
    site, cache = work / "site", work / "cache"
    found = sorted((bundle / "wheels").glob("*.whl"))
    if found:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-index",
                "--no-deps",
                "--no-compile",
                "--target",
                str(site),
                *map(str, found),
            ],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise BundleError(
                f"the wheels of '{bundle}' cannot be installed: {done.stderr.strip()[-300:]}."
            )
    for row in data["files"]:
        join(row, bundle / "files", cache)
    return {"NMSPARSE_CACHE": str(cache), **({"PYTHONPATH": str(site)} if found else {})}


def use(bundle: Path, work: Path) -> None:
    """Let this process and those that it starts find the checkout, and what a bundle brings if
    there is one."""
    environment = unpacked(bundle, work) if bundle.is_dir() else {}
    paths = [
        str(ROOT),
        *filter(None, (environment.pop("PYTHONPATH", None), os.environ.get("PYTHONPATH"))),
    ]
    os.environ.update(environment, PYTHONPATH=os.pathsep.join(paths))
    sys.path[:0] = paths


def join(row: dict[str, Any], folder: Path, target: Path) -> Path:
    """One file from its pieces, checked. Raises `BundleError` for a damaged one, or one that would
    lie elsewhere."""
    path = (target / row["name"]).resolve()
    if not path.is_relative_to(target.resolve()):
        raise BundleError(f"the bundle names a file outside its folder: {row['name']}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = hashlib.sha256()
    with open(path, "wb") as sink:
        for piece in row["pieces"]:
            chunk = (folder / Path(piece["file"]).name).read_bytes()
            whole.update(chunk)
            sink.write(chunk)
    if whole.hexdigest() != row["sha256"]:
        path.unlink()
        raise BundleError(f"the pieces of {row['name']} are damaged.")
    return path


if __name__ == "__main__":
    sys.exit(main())
