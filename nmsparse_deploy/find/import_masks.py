"""Take over a result that was found elsewhere: masks for a dense model, or a checkpoint that is sparse already.

What comes in, and from whom:

* `.npz`: one array per weight, the bits of the row-major mask packed eight to a byte, highest first, under the weight's
  name with `.mask` (MaskLLM, Fang et al., 2024, as released).
* `.pt` or `.safetensors`: a table of masks by name; or a folder with one file per weight, named after it (ProxSparse
  and MaskPro as released). Pickles are read with `weights_only=True`; code in a file is never run.
* a checkpoint of NVIDIA ModelOpt that was saved before its export: dense weights, each with its `_weight_mask`.
* a sparse checkpoint. Zeros say less than a mask: where a group has fewer non-zeros than the pattern keeps, the places
  that were kept are guessed (first where the dense weight is zero too, then the lowest index) and counted.
"""

from __future__ import annotations

import time
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nmsparse_deploy import models
from nmsparse_deploy.errors import CheckFailed, NmsparseError, UsageError, first_line
from nmsparse_deploy.find.block_file import LayerRecord
from nmsparse_deploy.find.plan.make_plan import Plan, PlanRow, by_fusion
from nmsparse_deploy.find.write_run import verify_model, write_masks, write_model
from nmsparse_deploy.masks import Mask, mask_follows, normalise_zeros, tensor_hash
from nmsparse_deploy.models.base import Target
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.models.state_dict import read_state_dict
from nmsparse_deploy.pattern import NMPattern
from nmsparse_deploy.recipe import Prune, fingerprint
from nmsparse_deploy.runs.manifest import ImportedFrom, RecipeRecord
from nmsparse_deploy.runs.run_dir import RUNS, RunDir
from nmsparse_deploy.system.memory import peak_memory_mb
from nmsparse_deploy.system.progress import Progress, silent

FILES = (".npz", ".pt", ".pth", ".bin", ".safetensors")
MODELOPT = "._weight_mask"
"""Ends the name of a mask beside the weights of a checkpoint of NVIDIA ModelOpt."""

LARGEST = 1 << 34
"""Bytes of masks that a file may unpack to; a small archive can claim any size."""


@dataclass(frozen=True)
class Imported:
    """A run that holds a foreign result. `ambiguous` counts groups whose kept places had to be guessed,
    `partial` the fusion groups in which some weights are sparse and others are not."""

    run: RunDir
    layers: int
    groups: int
    ambiguous: int
    partial: int

    def summary(self) -> str:
        guessed = (f"; in {self.ambiguous:,} of {self.groups:,} groups the kept places had to be guessed from zeros"
                   if self.ambiguous else "")
        mixed = (f"; {self.partial} groups that compilers merge into one GEMM are only partly sparse, which makes the "
                 "merged weight dense" if self.partial else "")
        return f"{self.run.path}: {self.layers} masks imported and verified{guessed}{mixed}."

    def to_json(self) -> dict[str, Any]:
        return {"run": str(self.run.path), "layers": self.layers, "groups": self.groups,
                "ambiguous": self.ambiguous, "partial": self.partial}


def import_result(model: str, masks: Path | None = None, sparse: str | None = None, pattern: str = "2:4",
                  out: Path | None = None, progress: Progress = silent) -> Imported:
    """A run folder of `model` with the masks of a file, with those of the checkpoint `sparse`, or with its own zeros.

    With a mask file the surviving weights are the model's; with `sparse` they are the checkpoint's. Raises `UsageError`
    for files that are damaged or do not fit the model, and `CheckFailed` for masks of another pattern.
    """
    if masks is not None and sparse is not None:
        raise UsageError("Masks come from a file (--masks) or from a checkpoint (--sparse), not from both.")
    wanted = NMPattern.parse(pattern)
    model = str(Path(model).resolve()) if Path(model).exists() else model
    path = out or RUNS / f"{models.short_name(model)}-imported-{str(wanted).replace(':', '-')}"
    _refuse_finished(path)
    progress(f"loading {model}", 0, 0)
    dense = models.load(model)
    start = time.perf_counter()
    found = dense.discover()
    targets = {target.name: target for target in found.targets}
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
            guess = mask_of(values[name], weights[name] if sparse is not None else None, wanted, target.axis)
            if guess is not None:
                kept[name], ambiguous[name] = guess
        if not kept:
            raise CheckFailed(f"No weight of '{sparse or model}' is {wanted} sparse.")
    plan = Plan(tuple(PlanRow(target, wanted if name in kept else None, "imported" if name in kept else "has no mask")
                      for name, target in targets.items()), found.skipped, found.blocks)
    spec = Prune(method="magnitude", pattern=str(wanted))
    source = ImportedFrom(masks=str(masks) if masks else None, sparse=sparse)
    recipe = RecipeRecord.of(model, spec).model_copy(update={"method": "imported", "imported": source})
    normalised = _apply(pruned, kept)
    run = RunDir.create(path, recipe, fingerprint(f"{model} {masks} {sparse}", spec), force=True)
    with run.lock():
        write_model(run, pruned)
        packed = {name: Mask.pack(mask.contiguous(), targets[name].axis, wanted, hashes[name])
                  for name, mask in kept.items()}
        records = [_record(name, targets[name], mask, normalised[name]) for name, mask in packed.items()]
        masks_written = write_masks(run, packed, records, "imported", model)
        run.write_json("plan.json", plan.to_json())
        verify_model(run, masks_written, "imported")
        run.finish("prune", time.perf_counter() - start, layers=len(records), peak_memory_mb=peak_memory_mb(),
                   negative_zeros_normalised=sum(normalised.values()),
                   provenance=dense.provenance, compute="none", calibration=None, ambiguous=ambiguous)
    groups = sum(mask.numel() // wanted.group for mask in kept.values())
    partial = sum(len({row.pattern for row in rows}) > 1 for rows in by_fusion(plan.rows).values())
    return Imported(run, len(kept), groups, sum(ambiguous.values()), partial)


def _refuse_finished(path: Path) -> None:
    """An import that was interrupted starts over; nothing else is replaced."""
    if path.exists() and not ((path / "manifest.json").is_file() and not RunDir(path).finished("prune")):
        raise UsageError(f"'{path}' exists already.", "choose another --out")


def mask_of(sparse: torch.Tensor, dense: torch.Tensor | None, pattern: NMPattern, axis: int,
            ) -> tuple[torch.Tensor, int] | None:
    """The mask that a sparse weight follows, and in how many groups it is a guess; None when the weight is not sparse.

    A group with `keep` non-zeros is known. With fewer, places that are zero in `dense` as well come first: a kept place
    of a dense zero is zero, too.
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


# --- files -----------------------------------------------------------------------------------------------------------


def read_masks(path: Path, targets: Mapping[str, Target], weights: Mapping[str, torch.Tensor],
               ) -> dict[str, torch.Tensor]:
    """Masks by parameter name, in the weights' shapes. Raises `UsageError`."""
    if path.is_dir():
        return _folder(path, targets, weights)
    if not path.is_file():
        raise UsageError(f"There is no mask file '{path}'.")
    if path.suffix not in FILES:
        raise UsageError(f"'{path}' is no kind of mask file that is known here.", f"one of: {', '.join(FILES)}")
    table: Mapping[str, Any] = _npz(path) if path.suffix == ".npz" else read_state_dict(path)
    table = {key: value for key, value in table.items() if key.endswith(MODELOPT)} or table
    if not table:
        raise UsageError(f"'{path}' holds no masks.")
    named = {key: _parameter(key, path, targets) for key in table}
    return {name: _mask(table[key], key, weights[name], path) for key, name in named.items()}


def _npz(path: Path) -> dict[str, np.ndarray]:
    """Arrays by name; sizes are checked before anything is unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(entry.file_size for entry in archive.infolist())
        if claimed > LARGEST:
            raise UsageError(f"'{path}' claims to unpack to {claimed:,} bytes, more than any model's masks take.")
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, KeyError, OSError) as error:
        raise UsageError(f"The mask file '{path}' is damaged or truncated: {first_line(error)}.") from error


def _folder(path: Path, targets: Mapping[str, Target], weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One file per weight, named after it."""
    files = sorted(file for file in path.iterdir() if file.suffix in FILES)
    if not files:
        raise UsageError(f"'{path}' holds no mask files ({', '.join(FILES)}).")
    found = {}
    for file in files:
        name = _parameter(file.stem, path, targets)
        found[name] = _mask(_single(file), file.name, weights[name], file)
    return found


def _single(path: Path) -> Any:
    """The one tensor of a file, bare or in a table."""
    import pickle

    if path.suffix in (".npz", ".safetensors"):
        table: Any = _npz(path) if path.suffix == ".npz" else read_state_dict(path)
    else:
        try:
            table = torch.load(path, "cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise UsageError(f"'{path}' holds more than tensors, and code from a file is never run.",
                             "save the mask alone") from error
        except (RuntimeError, EOFError, ValueError, KeyError) as error:
            raise UsageError(f"The mask file '{path}' is damaged or truncated.") from error
    values = list(table.values()) if isinstance(table, dict) else [table]
    if len(values) != 1 or not isinstance(values[0], (torch.Tensor, np.ndarray)):
        raise UsageError(f"'{path}' should hold one mask and holds {len(values)} values.")
    return values[0]


def _parameter(key: str, path: Path, targets: Mapping[str, Target]) -> str:
    """The parameter that a foreign key means: `X.weight`, `X.weight.mask`, `X._weight_mask`, `X.mask` or `X`."""
    bare = ".".join(part for part in key.split(".") if part not in ("mask", MODELOPT.strip(".")))
    for name in (bare, f"{bare}.weight"):
        if name in targets:
            return name
    raise UsageError(f"'{path}' has a mask for '{key[:120]}', which is no prunable parameter of this model.",
                     "nmsparse-deploy inspect lists them")


def _mask(value: Any, key: str, weight: torch.Tensor, path: Path) -> torch.Tensor:
    """A mask in the weight's shape, from booleans, from numbers that are 0 and 1, or from packed bits."""
    shape, size = tuple(weight.shape), weight.numel()
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 1 and value.size == -(-size // 8):
        return torch.from_numpy(np.unpackbits(value, count=size).astype(bool)).view(shape)
    tensor = torch.as_tensor(value)
    if tuple(tensor.shape) != shape:
        raise UsageError(f"The mask '{key}' of '{path}' has shape {list(tensor.shape)}; its weight has {list(shape)}.")
    if tensor.dtype != torch.bool and not bool(((tensor == 0) | (tensor == 1)).all()):
        raise UsageError(f"The mask '{key}' of '{path}' holds other values than 0 and 1.")
    return tensor.bool()


def _checked(found: dict[str, torch.Tensor], targets: Mapping[str, Target], pattern: NMPattern,
             ) -> dict[str, torch.Tensor]:
    """The masks, every one in the pattern along its weight's reduction axis."""
    for name, mask in found.items():
        axis = targets[name].axis
        if mask.shape[axis] % pattern.group or not mask_follows(mask, pattern, axis):
            raise CheckFailed(f"The mask of '{name}' is not {pattern} along its reduction axis.",
                              "name its pattern with --pattern")
    return found


# --- the run ---------------------------------------------------------------------------------------------------------


def _same_model(sparse: str, dense: LoadedModel, progress: Progress) -> LoadedModel:
    """The sparse checkpoint. Raises `UsageError` when it is not of the dense model's shape."""
    progress(f"loading {sparse}", 0, 0)
    loaded = models.load(sparse)
    here = {name: tuple(p.shape) for name, p in loaded.module.named_parameters()}
    there = {name: tuple(p.shape) for name, p in dense.module.named_parameters()}
    if here != there:
        odd = next(name for name in [*here, *there] if here.get(name) != there.get(name))
        raise UsageError(f"'{sparse}' is another model than '{dense.source}': they differ in '{odd}'.")
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
    return LayerRecord(name, target.block, mask.axis, str(mask.pattern), mask.shape, mask.dense_hash, None,
                       negative_zeros, 0.0, 0)
