"""Take over a result that was found elsewhere: masks for a dense model, or a checkpoint that is
sparse already.

Files of masks are read by `mask_files.py`. In a sparse checkpoint zeros say less than a mask: where
a group has fewer non-zeros than the pattern keeps, the places that were kept are guessed (first
where the dense weight is zero too, then the lowest index) and counted.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from nmsparse_deploy import models
from nmsparse_deploy.errors import CheckFailed, NmsparseError, UsageError
from nmsparse_deploy.find.block_file import LayerRecord
from nmsparse_deploy.find.facts import Json
from nmsparse_deploy.find.mask_files import read_masks
from nmsparse_deploy.find.plan.make_plan import Plan, PlanRow, by_fusion
from nmsparse_deploy.find.write_run import verify_model, write_masks, write_model
from nmsparse_deploy.masks import Mask, mask_follows, normalise_zeros, tensor_hash
from nmsparse_deploy.models.base import Target
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.pattern import NMPattern
from nmsparse_deploy.recipe import Prune, fingerprint
from nmsparse_deploy.runs.inputs import read_inputs
from nmsparse_deploy.runs.manifest import ImportedFrom, RecipeRecord
from nmsparse_deploy.runs.run_dir import RUNS, RunDir
from nmsparse_deploy.system.memory import peak_memory_mb
from nmsparse_deploy.system.progress import Progress, silent


@dataclass(frozen=True)
class Imported:
    """A run that holds a foreign result. `ambiguous` counts groups whose kept places had to be
    guessed, `partial` the fusion groups in which some weights are sparse and others are not."""

    run: RunDir
    layers: int
    groups: int
    ambiguous: int
    partial: int

    def summary(self) -> str:
        """Say in one sentence what was imported, and what had to be guessed."""
        guessed = (
            f"; in {self.ambiguous:,} of {self.groups:,} groups the kept places had to be guessed from zeros"
            if self.ambiguous
            else ""
        )
        mixed = (
            f"; {self.partial} groups that compilers merge into one GEMM are only partly sparse, which makes the "
            "merged weight dense"
            if self.partial
            else ""
        )
        return f"{self.run.path}: {self.layers} masks imported and verified{guessed}{mixed}."

    def to_json(self) -> Json:
        return {
            "run": str(self.run.path),
            "layers": self.layers,
            "groups": self.groups,
            "ambiguous": self.ambiguous,
            "partial": self.partial,
        }


def import_result(
    model: str,
    masks: Path | None = None,
    sparse: str | None = None,
    pattern: str = "2:4",
    out: Path | None = None,
    progress: Progress = silent,
) -> Imported:
    """Make a run folder of `model` with the masks of a file, with those of the checkpoint `sparse`,
    or with its own zeros.

    With a mask file the surviving weights are the model's; with `sparse` they are the checkpoint's.
    Raises `UsageError` for files that are damaged or do not fit the model, and `CheckFailed` for
    masks of another pattern.
    """
    if masks is not None and sparse is not None:
        raise UsageError(
            "Masks come from a file (--masks) or from a checkpoint (--sparse), not from both."
        )
    wanted = NMPattern.parse(pattern)
    model = models.absolute(model)
    path = out or RUNS / f"{models.short_name(model)}-imported-{str(wanted).replace(':', '-')}"
    _refuse_finished(path)
    progress(f"loading {model}", 0, 0)
    dense = models.load(model)
    start = time.perf_counter()
    discovery = dense.discover()
    targets = {target.name: target for target in discovery.targets}
    weights = {name: dense.module.get_parameter(name).detach() for name in targets}
    hashes = {name: tensor_hash(weight) for name, weight in weights.items()}
    ambiguous: dict[str, int] = {}
    if masks is not None:
        kept = _checked(read_masks(masks, targets, weights), targets, wanted)
        pruned = dense
    else:
        pruned = dense if sparse is None else _same_model(sparse, dense, progress)
        values = {name: pruned.module.get_parameter(name).detach() for name in targets}
        kept = {}
        for name, target in targets.items():
            guess = mask_of(
                values[name], weights[name] if sparse is not None else None, wanted, target.axis
            )
            if guess is not None:
                kept[name], ambiguous[name] = guess
        if not kept:
            raise CheckFailed(f"No weight of '{sparse or model}' is {wanted} sparse.")
    plan = Plan(
        tuple(
            PlanRow(
                target,
                wanted if name in kept else None,
                "imported" if name in kept else "has no mask",
            )
            for name, target in targets.items()
        ),
        discovery.skipped,
        discovery.blocks,
    )
    spec = Prune(method="magnitude", pattern=str(wanted))
    source = ImportedFrom(masks=str(masks) if masks else None, sparse=sparse)
    recipe = RecipeRecord.of(model, spec).model_copy(
        update={"method": "imported", "imported": source}
    )
    normalised = _apply(pruned, kept)
    run = RunDir.create(
        path,
        recipe,
        fingerprint(f"{model} {masks} {sparse}", spec),
        True,
        read_inputs(models.files(dense.source), spec.calibration.data),
    )
    with run.lock():
        write_model(run, pruned)
        packed = {
            name: Mask.pack(mask.contiguous(), targets[name].axis, wanted, hashes[name])
            for name, mask in kept.items()
        }
        records = [
            _record(name, targets[name], mask, normalised[name]) for name, mask in packed.items()
        ]
        masks_written = write_masks(run, packed, records, "imported", model)
        run.write_json("plan.json", plan.to_json())
        verify_model(run, masks_written, "imported")
        run.finish(
            "prune",
            time.perf_counter() - start,
            layers=len(records),
            peak_memory_mb=peak_memory_mb(),
            negative_zeros_normalised=sum(normalised.values()),
            provenance=dense.provenance,
            compute="none",
            calibration=None,
            ambiguous=ambiguous,
        )
    groups = sum(mask.numel() // wanted.group for mask in kept.values())
    partial = sum(len({row.pattern for row in rows}) > 1 for rows in by_fusion(plan.rows).values())
    return Imported(run, len(kept), groups, sum(ambiguous.values()), partial)


def _refuse_finished(path: Path) -> None:
    """Raise `UsageError` for a folder that is there already, unless it is an import that was
    interrupted."""
    if path.exists() and not (
        (path / "manifest.json").is_file() and not RunDir(path).finished("prune")
    ):
        raise UsageError(f"'{path}' exists already.", "choose another --out")


def mask_of(
    sparse: torch.Tensor, dense: torch.Tensor | None, pattern: NMPattern, axis: int
) -> tuple[torch.Tensor, int] | None:
    """Return the mask that a sparse weight follows, and in how many groups it is a guess; None when
    the weight is not sparse.

    A group with `keep` non-zeros is known. With fewer, places that are zero in `dense` as well come
    first: a kept place of a dense zero is zero, too.
    """
    if sparse.shape[axis] % pattern.group:
        return None
    values = sparse.movedim(axis, -1).unflatten(-1, (-1, pattern.group))
    held = values != 0
    count = held.sum(-1)
    if bool((count > pattern.keep).any()) or not bool(held.any()):
        return None
    rank = held.float() * 2
    free = pattern.group - count
    if dense is not None:
        twice = ~held & (dense.movedim(axis, -1).unflatten(-1, (-1, pattern.group)) == 0)
        rank = rank + twice.float()
        both, missing = twice.sum(-1), pattern.keep - count
        guessed = (missing > 0) & (both != missing)
    else:
        guessed = (count < pattern.keep) & (free > 0)
    order = rank.argsort(dim=-1, descending=True, stable=True)[..., : pattern.keep]
    mask = torch.zeros_like(held).scatter_(-1, order, True)
    return mask.flatten(-2).movedim(-1, axis), int(guessed.sum())


def _checked(
    masks: dict[str, torch.Tensor], targets: Mapping[str, Target], pattern: NMPattern
) -> dict[str, torch.Tensor]:
    """Return the masks, every one in the pattern along its weight's reduction axis. Raises
    `CheckFailed`."""
    for name, mask in masks.items():
        axis = targets[name].axis
        if mask.shape[axis] % pattern.group or not mask_follows(mask, pattern, axis):
            raise CheckFailed(
                f"The mask of '{name}' is not {pattern} along its reduction axis.",
                "name its pattern with --pattern",
            )
    return masks


def _same_model(sparse: str, dense: LoadedModel, progress: Progress) -> LoadedModel:
    """Load the sparse checkpoint. Raises `UsageError` when it is not of the dense model's shape."""
    progress(f"loading {sparse}", 0, 0)
    loaded = models.load(sparse)
    here = {name: tuple(p.shape) for name, p in loaded.module.named_parameters()}
    there = {name: tuple(p.shape) for name, p in dense.module.named_parameters()}
    if here != there:
        odd = next(name for name in [*here, *there] if here.get(name) != there.get(name))
        raise UsageError(
            f"'{sparse}' is another model than '{dense.source}': they differ in '{odd}'."
        )
    return loaded


@torch.no_grad()
def _apply(loaded: LoadedModel, kept: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Bake the masks; return how many kept values of each weight were -0.0."""
    normalised = {}
    for name, mask in kept.items():
        weight = loaded.module.get_parameter(name)
        if not bool(torch.isfinite(weight).all()):
            raise NmsparseError(f"The weight '{name}' of '{loaded.source}' contains NaN or Inf.")
        weight.copy_(torch.where(mask, weight, torch.zeros((), dtype=weight.dtype)))
        normalised[name] = normalise_zeros(weight)
    return normalised


def _record(name: str, target: Target, mask: Mask, negative_zeros: int) -> LayerRecord:
    return LayerRecord(
        name,
        target.block,
        mask.axis,
        str(mask.pattern),
        mask.shape,
        mask.dense_hash,
        None,
        negative_zeros,
        0.0,
        0,
    )
