"""A run on disk: a folder per stage that appears by rename, a manifest of how it came about, and
resume.

    RUN/
      manifest.json        recipe, fingerprint, hashes of inputs, versions, hardware, finished stages
      blocks/NNN.*         finished blocks while pruning (gone when the stage is)
      model/               pruned weights that the stock library loads
      masks.safetensors    the masks, by the names of parameters
      stored.json          which part of which parameter a saved tensor is, where names or layout differ
      permutations.safetensors   how the dense channels were reordered first, where they were
      scales.safetensors   with --wbits: what the integers of each weight are multiplied by
      plan.json layers.json verify.json evaluate.json bench.json
      onnx/                exported graphs with their link maps
      torch/ torch.json    PyTorch models without stored zeros; sizes and decisions (bench-gpu.json: the arms on a GPU)
      engines/ engines.json   TensorRT engines with logs and layer lists; what they prove
      report/              index.html, report.md, report.json

Whatever is named here was written completely: files and folders are built under a temporary name
and renamed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.prove.stored_views import FILE, StoredViews, views_from_json
from nmsparse_deploy.recipe import differences
from nmsparse_deploy.runs.manifest import InputsRecord, Manifest, RecipeRecord
from nmsparse_deploy.runs.wording import first_names

RUNS = Path("runs")
GRAPH = "model"
"""Stem of the ONNX file of a whole model."""


class RunDir:
    """One run folder. Every write is atomic."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @classmethod
    def open(cls, path: Path | None) -> RunDir:
        """Open an existing run, or the newest under `runs/` when no path is given. Raises
        `UsageError`."""
        if path is None:
            manifests = sorted(RUNS.glob("*/manifest.json"), key=lambda file: file.stat().st_mtime)
            if not manifests:
                raise UsageError("There is no run here yet.", "nmsparse-deploy prune")
            path = manifests[-1].parent
        run = cls(path)
        if not (path / "manifest.json").is_file():
            raise UsageError(
                f"'{path}' is not a run folder (no manifest.json).",
                "nmsparse-deploy prune makes one",
            )
        run.manifest()
        return run

    @classmethod
    def create(
        cls,
        path: Path,
        recipe: RecipeRecord,
        fingerprint: str,
        force: bool,
        inputs: InputsRecord | None = None,
    ) -> RunDir:
        """Make a new run, or open the same run to be resumed.

        `force` starts a run over: it deletes the folder of a run, and no other. Raises `UsageError`
        when the folder holds a run of another recipe (naming the fields) or of other inputs and
        `force` is not given, and for foreign files at all times.
        """
        run = cls(path)
        run.refuse_foreign(force)
        if force and (path / "manifest.json").is_file():
            shutil.rmtree(path)
        if (path / "manifest.json").is_file():
            manifest = run.manifest()
            if manifest.fingerprint != fingerprint:
                recorded = manifest.recipe.to_json()
                changed = (
                    "; ".join(differences(recorded, recipe.to_json())) or "an unrecorded field"
                )
                raise UsageError(
                    f"'{path}' holds a run of another recipe: {changed}.",
                    "choose another --out, or --force to start over",
                )
            if inputs is not None:
                run.check_inputs(inputs)
            return run
        path.mkdir(parents=True, exist_ok=True)
        run.write_json("manifest.json", Manifest.new(recipe, fingerprint, inputs).to_json())
        return run

    def refuse_foreign(self, force: bool) -> None:
        """Raise `UsageError` when the folder holds what is no run, which `force` does not delete."""
        path = self.path
        if (path / "manifest.json").is_file():
            if force and not self._is_ours():
                raise UsageError(
                    f"'{path}' is not deleted: its manifest.json is not that of a run.",
                    "choose another --out, or delete the folder yourself",
                )
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UsageError(f"'{path}' exists and is not a run folder.", "choose another --out")

    def _is_ours(self) -> bool:
        """Decide whether this tool, of whatever version, wrote the manifest."""
        try:
            data = self.read_json("manifest.json")
        except UsageError:
            return False
        return isinstance(data, dict) and {"format", "fingerprint"} <= data.keys()

    def manifest(self) -> Manifest:
        """Read the manifest. Raises `UsageError` when it is missing, damaged or foreign."""
        return Manifest.parse(self.read_json("manifest.json"), self.path)

    def check_inputs(self, now: InputsRecord) -> None:
        """Raise `UsageError` naming the inputs whose content is not what the run was begun with."""
        begun_with = self.manifest().inputs
        changed = begun_with.changes(now) if begun_with else []
        if changed:
            raise UsageError(
                f"'{self.path}' was begun with other inputs; changed since: "
                f"{first_names(changed, 3)}.",
                "put back what it was begun with, choose another --out, or --force to start over",
            )

    def read_json(self, name: str) -> Any:
        """Read a file of the run. Raises `UsageError` when it is missing or damaged."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(f"The run '{self.path}' has no {name}.") from None
        except ValueError as error:
            raise UsageError(f"'{self.path / name}' is damaged: {error}.") from error

    def stored_views(self) -> StoredViews:
        """Return which part of which parameter each saved tensor is; empty where each parameter is
        saved under its own name. Raises `UsageError` when the file that says so is damaged."""
        if not (self / FILE).is_file():
            return {}
        return views_from_json(self.read_json(FILE), str(self / FILE))

    def write_json(self, name: str, data: object) -> Path:
        """Write a file of the run, complete or not at all."""
        text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=True) + "\n"
        with self.replacing(name) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        return self.path / name

    @contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """Build a file or folder under a temporary name; it replaces `name` when the block ends
        without an error."""
        final = self.path / name
        final.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
        temporary = work / final.name
        try:
            yield temporary
            _sync(temporary)
            if final.is_dir():
                final.rename(work / "old")
            os.replace(temporary, final)
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), str(error), str(final)) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def finish(self, stage: str, seconds: float, **facts: object) -> None:
        """Record a finished stage in the manifest; `facts` are fields of its record."""
        self.write_json(
            "manifest.json", self.manifest().with_stage(stage, seconds, facts).to_json()
        )

    def finished(self, stage: str) -> bool:
        """Tell whether a stage has finished."""
        return stage in self.manifest().stages

    def graphs(self, whole: bool = False) -> list[Path]:
        """List exported ONNX files; `whole`: those that take what the model takes. (With a cache
        they take more.)"""
        return sorted((self / "onnx").glob(f"*/{GRAPH if whole else '*'}.onnx"))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from working on the run. Raises `NmsparseError` when another one
        holds it."""
        try:
            held = FileLock(self.path / ".lock").acquire(timeout=0)
        except Timeout:
            raise NmsparseError(f"Another process is working on '{self.path}'.") from None
        with held:  # the system lets go of it when this process is killed
            for leftover in self.path.glob(".*-*"):  # of a process that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            yield


def _sync(path: Path) -> None:
    """Force file contents to disk, so that a rename never reveals an empty file after a crash.

    Files get the user's ordinary permissions: the weight library makes them readable by the owner
    alone.
    """
    os.umask(mask := os.umask(0))
    for file in [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]:
        file.chmod(0o666 & ~mask)
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
