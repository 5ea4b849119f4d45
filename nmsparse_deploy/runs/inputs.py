"""The content of what a run is made from. A name or a time of change proves nothing, so files are
always read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import BaseModel

from nmsparse_deploy.data.calibration_sample import source_files
from nmsparse_deploy.recipe import Evaluate
from nmsparse_deploy.runs.manifest import InputsRecord, Manifest
from nmsparse_deploy.system.assets import digest
from nmsparse_deploy.system.progress import Progress, silent

WORKERS = 4
"""Files that are hashed at a time."""
LARGE = 1 << 30
"""Bytes that take a second; of less nothing is said."""


def read_inputs(
    files: Mapping[str, Path], data: str, priors: Sequence[str] = (), progress: Progress = silent
) -> InputsRecord:
    """Hash `files` of a model, local calibration `data`, and mask files that learning starts from;
    the sample is not drawn yet."""
    beside = source_files(data) | {name: Path(name) for name in priors}
    there = {name: file for name, file in beside.items() if file.is_file()}
    return InputsRecord(model=hashes(files, progress), data=hashes(there, progress))


def hashes(files: Mapping[str, Path], progress: Progress = silent) -> dict[str, str]:
    """Return the SHA-256 of files by name."""
    sizes = [file.stat().st_size for file in files.values()]
    digests: list[str] = []
    with ThreadPoolExecutor(WORKERS) as pool:
        for name, hashed in zip(files, pool.map(digest, files.values())):
            digests.append(hashed)
            if sum(sizes) > LARGE:
                progress(f"hashing {name}", sum(sizes[: len(digests)]), sum(sizes))
    return dict(zip(files, digests))


def evaluation_inputs(spec: Evaluate) -> dict[str, str]:
    """Hash the local files that an evaluation reads."""
    return hashes(source_files(spec.data) | source_files(spec.photos))


def is_current(manifest: Manifest, stage: str, spec: BaseModel) -> bool:
    """Tell whether a stage has finished with these settings, on data that is still the same."""
    if manifest.spec(stage) != spec.model_dump(mode="json"):
        return False
    read = manifest.stages[stage].inputs
    return read is None or not isinstance(spec, Evaluate) or read == evaluation_inputs(spec)
