"""`export --torch`: a run as PyTorch models without stored zeros, verified, and with a decision for
every GEMM.

    RUN/torch/fp16/   packed.safetensors, config.json..., decisions.json (artefact.py)
    RUN/torch.json    sizes, agreement with the model, decisions

Packing, verifying and comparing need no GPU. Timing does; without one the GEMMs stay undecided, and
the record says so.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict
from pathlib import Path

from nmsparse_deploy.errors import CheckFailed, NmsparseError
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.models.base import Target
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.models.meta_model import description
from nmsparse_deploy.recipe import Pack
from nmsparse_deploy.runs.load import load_pruned
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.ship.model_agreement import compare_with_model
from nmsparse_deploy.ship.quantise import FORMATS, Range, activation_ranges
from nmsparse_deploy.ship.torch_sparse.artefact import DECISIONS, Artefact, verify_packed, write
from nmsparse_deploy.ship.torch_sparse.engine import TorchSparse
from nmsparse_deploy.ship.torch_sparse.kernel_choice import Decisions, decide_all
from nmsparse_deploy.ship.torch_sparse.record import FOLDER, RECORD, PackedModel
from nmsparse_deploy.ship.torch_sparse.semi_structured import kernels
from nmsparse_deploy.system.environment import environment
from nmsparse_deploy.system.gpu_clock import Machine, require_gpu
from nmsparse_deploy.system.progress import Progress, silent

ON_CPU = {"mode": "dense", "device": "cpu"}


def export_torch(
    run: RunDir, spec: Pack = Pack(), progress: Progress = silent, machine: Machine | None = None
) -> list[PackedModel]:
    """Write, verify, compare and, on a GPU, time every asked precision; returns a record for each.

    `machine` is what the GEMMs are timed on; left out: this machine's GPU, if there is one. Raises
    `CheckFailed` when a packed model does not hold the masks.
    """
    start = time.perf_counter()
    masks, loaded = MaskSet.load(run / "masks.safetensors"), load_pruned(run)
    targets = loaded.discover().targets
    with run.lock():
        ranges: dict[str, Range] = {}
        if any(precision in FORMATS for precision in spec.precisions):
            masked = [
                target for target in targets if target.name in masks.masks and not target.watched
            ]
            ranges = activation_ranges(run, loaded, masked, progress)
        rows = [
            _one(run, loaded, masks, list(targets), precision, ranges, spec, machine, progress)
            for precision in spec.precisions
        ]
        held = run.read_json(RECORD)["artefacts"] if (run / RECORD).is_file() else []
        others = [row for row in held if row["precision"] not in spec.precisions]
        run.write_json(
            RECORD, {"artefacts": [*others, *(row.to_json() for row in rows)], **environment()}
        )
        run.finish(FOLDER, time.perf_counter() - start, spec=spec.model_dump(mode="json"))
    return rows


def _one(
    run: RunDir,
    loaded: LoadedModel,
    masks: MaskSet,
    targets: list[Target],
    precision: str,
    ranges: dict[str, Range],
    spec: Pack,
    machine: Machine | None,
    progress: Progress,
) -> PackedModel:
    name = f"{FOLDER}/{precision}"
    progress(f"packing {precision}", 0, 0)
    with run.replacing(name) as folder:
        folder.mkdir()
        for file in description(run / "model"):
            shutil.copy(file, folder)
        sizes = write(folder, loaded, masks, targets, precision, ranges)
        report = verify_packed(folder, masks)
        if not report.ok:
            raise CheckFailed(f"The packed model fails verification: {report.summary()}")
    made, why = None, None
    try:
        made = decide(
            run / name, spec, machine or require_gpu("Timing sparse against dense GEMMs"), progress
        )
        run.write_json(f"{name}/{DECISIONS}", made.to_json())
    except NmsparseError as error:
        why = error.message
    same = compare_with_model(
        loaded, lambda inputs: TorchSparse.build(run / name, ON_CPU).run(inputs)
    )
    return PackedModel(
        **asdict(sizes),
        precision=precision,
        path=name,
        verified=report.checked,
        agreement=same,
        decisions=made,
        not_checked=why,
    )


def decide(folder: Path, spec: Pack, machine: Machine, progress: Progress = silent) -> Decisions:
    """Decide sparse or dense for every GEMM of a packed model. Raises `NmsparseError` without
    sparse kernels."""
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
    return Decisions(
        machine.name if not machine.dry else "cpu",
        machine.dry,
        tuple(decisions),
        spec.rows,
        kernels().name,
        machine.environment(),
    )
