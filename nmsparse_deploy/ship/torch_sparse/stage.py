"""`export --torch`: a run as PyTorch models without stored zeros, verified, and with a decision for every GEMM.

    RUN/torch/fp16/   packed.safetensors, config.json..., decisions.json (engines/torch_sparse.py)
    RUN/torch.json    sizes, agreement with the model, decisions

Packing, verifying and comparing need no GPU. Timing does; without one the GEMMs stay undecided, and the record says so.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nmsparse_deploy.errors import CheckFailed, NmsparseError, first_line
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.models.base import Target
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.models.meta_model import description
from nmsparse_deploy.models.outputs import primary_output
from nmsparse_deploy.prove import VerifyReport, verify_tensors
from nmsparse_deploy.prove.agreement import agreement, compared
from nmsparse_deploy.recipe import Pack
from nmsparse_deploy.runs.load import load_pruned
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.ship.quantise import FORMATS, Range, activation_ranges
from nmsparse_deploy.ship.torch_sparse.artefact import DECISIONS, FILE, Artefact, TorchSparse, write
from nmsparse_deploy.ship.torch_sparse.kernel_choice import as_file, decide_all
from nmsparse_deploy.ship.torch_sparse.semi_structured import kernels
from nmsparse_deploy.system.environment import environment
from nmsparse_deploy.system.gpu_clock import Machine, require_gpu
from nmsparse_deploy.system.progress import Progress, silent

FOLDER, RECORD = "torch", "torch.json"


def export_torch(run: RunDir, spec: Pack = Pack(), progress: Progress = silent,  # noqa: B008
                 machine: Machine | None = None) -> list[dict[str, Any]]:
    """Write, verify, compare and, on a GPU, time every asked precision; returns a record for each.

    `machine` is what the GEMMs are timed on; left out: this machine's GPU, if there is one. Raises `CheckFailed` when a
    packed model does not hold the masks.
    """
    start = time.perf_counter()
    masks, loaded = MaskSet.load(run / "masks.safetensors"), load_pruned(run)
    targets = loaded.discover().targets
    with run.lock():
        ranges: dict[str, Range] = {}
        if any(precision in FORMATS for precision in spec.precisions):
            masked = [target for target in targets if target.name in masks.masks and not target.watched]
            ranges = activation_ranges(run, loaded, masked, progress)
        rows = [_one(run, loaded, masks, list(targets), precision, ranges, spec, machine, progress)
                for precision in spec.precisions]
        held = run.read_json(RECORD)["artefacts"] if (run / RECORD).is_file() else []
        made = {row["precision"] for row in rows}
        run.write_json(RECORD, {"artefacts": [row for row in held if row["precision"] not in made] + rows,
                                **environment()})
        run.finish(FOLDER, time.perf_counter() - start, spec=spec.model_dump(mode="json"))
    return rows


def _one(run: RunDir, loaded: LoadedModel, masks: MaskSet, targets: list[Target], precision: str,
         ranges: dict[str, Range], spec: Pack, machine: Machine | None, progress: Progress) -> dict[str, Any]:
    name = f"{FOLDER}/{precision}"
    progress(f"packing {precision}", 0, 0)
    with run.replacing(name) as folder:
        folder.mkdir()
        for file in description(run / "model"):
            shutil.copy(file, folder)
        facts = write(folder, loaded, masks, targets, precision, ranges)
        report = verify_packed(folder, masks)
        if not report.ok:
            raise CheckFailed(f"The packed model fails verification: {report.summary()}")
    row = {"precision": precision, "path": name, **facts, "verified": report.checked,
           "agreement": _agreement(run / name, loaded), "decisions": None, "not_checked": None}
    try:
        made = decide(run / name, spec, machine or require_gpu("Timing sparse against dense GEMMs"), progress)
        run.write_json(f"{name}/{DECISIONS}", made)
        row["decisions"] = made
    except NmsparseError as error:
        row["not_checked"] = error.message
    return row


def packed_models(run: RunDir) -> list[Path]:
    """Return folders of the run's packed models."""
    return sorted(file.parent for file in (run / FOLDER).glob(f"*/{FILE}"))


def verify_packed(folder: Path, masks: MaskSet) -> VerifyReport:
    """Check every mask against what a packed model really stores."""
    artefact = Artefact(folder)
    plain = artefact.dense([name for name in masks.masks if name not in artefact.entries])
    return verify_tensors({**artefact.tensors(), **plain}, masks, str(folder), "file")


def decide(folder: Path, spec: Pack, machine: Machine, progress: Progress = silent) -> dict[str, Any]:
    """Decide sparse or dense for every GEMM of a packed model. Raises `NmsparseError` without sparse kernels."""
    artefact = Artefact(folder)
    why = kernels().why_not(artefact.precision)
    if why is not None:
        raise NmsparseError(f"Sparse kernels cannot run {artefact.precision} here: {why}.")
    shapes: dict[tuple[int, int, bool], list[str]] = {}
    for name, entry in artefact.entries.items():
        if entry.why_not is None:
            biased = f"{entry.layer}.bias" in artefact.plain
            shapes.setdefault((entry.k, entry.n, biased), []).append(name)
    decisions = decide_all(shapes, artefact.precision, spec.rows, machine, spec.rounds, progress)
    return as_file(decisions, machine, spec.rows)


@torch.no_grad()
def _agreement(folder: Path, loaded: LoadedModel) -> dict[str, Any]:
    """Compare the packed model on ordinary kernels with the run's model in fp32, on this machine's processor."""
    module = loaded.module.float().cpu()
    inputs = loaded.sample_inputs(batch=1, length=48)
    reference = primary_output(module(**inputs))
    try:
        outputs = TorchSparse.build(folder, {"mode": "dense", "device": "cpu"}).run(inputs)
    except (RuntimeError, NotImplementedError) as error:  # a processor without this precision
        return {"not_checked": first_line(error)}
    return asdict(agreement(reference.value, outputs[reference.name], reference.kind))


def told(row: dict[str, Any], path: Path) -> list[str]:
    """Return a record in sentences."""
    lines = [f"{path}: {row['weights']} weights packed to {row['packed_bytes'] / 1e6:.1f} MB, {row['share']:.1%} of "
             f"their {row['dense_bytes'] / 1e6:.1f} MB in {row['precision']}; {row['verified']} verified"
             if row["weights"] else f"{path}: no weight could be packed"]
    lines += [f"  stored with its zeros: {name} ({why})" for name, why in row["kept"].items()]
    lines.append(f"  {compared(row['agreement'])}")
    made = row["decisions"]
    if made is None:
        return [*lines, f"  not timed here, so no GEMM is decided: {row['not_checked']}"]
    lines.append(f"  {made['kept_sparse']} of {made['shapes']} GEMM shapes run sparse on {made['gpu']}")
    return lines + [f"  {one['k']} x {one['n']} ({len(one['weights'])} weights): {one['keep']}, {one['why']}"
                    for one in made["gemms"]]
