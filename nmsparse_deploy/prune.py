"""The prune stage: load, plan, walk block by block, commit each block, bake, verify, save.

A block is finished when `blocks/NNN.safetensors` exists. After a kill, finished blocks are read back, the calibration
stream is recomputed through them, and the walk goes on: the masks are the same bits as in an unbroken run.
"""

from __future__ import annotations

import json
import resource
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from . import models
from .calib.sample import Sample, draw
from .calib.stats import LayerStats, Need
from .calib.walk import BlockWalk
from .errors import CheckFailed, NmsparseError
from .masks import Mask, MaskSet, tensor_hash
from .methods.base import LayerResult, Method, relative_error
from .models.base import LoadedModel, from_rows, to_rows
from .models.discover import discover
from .pattern import NMPattern, mask_follows
from .plan import Plan, PlanRow, make_plan
from .progress import Progress, silent
from .recipe import DEFAULT_MODEL, Prune, fingerprint
from .refine.refit import refit
from .registry import METHODS
from .rundir import RUNS, RunDir
from .verify import VerifyReport, verify_checkpoint


def prune(model: str = DEFAULT_MODEL, spec: Prune = Prune(), out: Path | None = None, force: bool = False,  # noqa: B008
          progress: Progress = silent) -> RunDir:
    """Prune `model` as `spec` says into a run folder (default `runs/MODEL-METHOD-PATTERN`) and verify what was saved.

    The same recipe resumes an unfinished run and returns a finished one as it is. Raises `UsageError` for a folder that
    holds another recipe's run, `NmsparseError` for weights or data that cannot be used, `CheckFailed` when the saved
    model does not hold the pattern.
    """
    model = str(Path(model).resolve()) if Path(model).exists() else model
    recipe = {"model": model, **spec.model_dump(mode="json")}
    identity = fingerprint(model, spec)
    path = out or _default_path(model, spec, identity)
    if not force and (path / "manifest.json").is_file():
        run = RunDir.create(path, recipe, identity, force=False)  # refuses another recipe before anything is loaded
        if run.finished("prune"):
            progress(f"'{path}' is finished; --force starts over", 0, 0)
            return run
    progress(f"loading {model}", 0, 0)
    loaded = models.load(model)
    progress(models.described(model, loaded), 0, 0)
    method: Method = METHODS.load(spec.method)
    inputs = models.sample_inputs(loaded)
    plan = make_plan(discover(loaded.module, inputs), NMPattern.parse(spec.pattern), spec.include, spec.exclude)
    _check_finite(loaded, plan)
    sample = None if needs(spec, method) == "none" else draw(loaded, spec.calibration, progress)
    run = RunDir.create(path, recipe, identity, force)
    with run.lock():
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loaded.module.to(device)
        _Stage(run, loaded, plan, spec, method, sample, compute_dtype(spec.compute, device), progress).work()
    return run


def _default_path(model: str, spec: Prune, identity: str) -> Path:
    how = "-".join([spec.method, *(step.name for step in spec.refine)])
    path = RUNS / f"{models.short_name(model)}-{how}-{spec.pattern.replace(':', '-')}"
    if (path / "manifest.json").is_file() and RunDir(path).manifest()["fingerprint"] != identity:
        return path.with_name(f"{path.name}-{identity[:8]}")
    return path


def _check_finite(loaded: LoadedModel, plan: Plan) -> None:
    for row in plan.pruned():
        if not torch.isfinite(loaded.module.get_parameter(row.target.name)).all():
            raise NmsparseError(f"The weight '{row.target.name}' of '{loaded.source}' contains NaN or Inf.",
                                f"repair the checkpoint, or leave it dense with --exclude '{row.target.name}'")


def compute_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """bf16 where the processor multiplies it natively, fp32 elsewhere."""
    if wanted != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[wanted]
    fast = device.type == "cuda" or "avx512_bf16" in _cpu_flags() or "amx_bf16" in _cpu_flags()
    return torch.bfloat16 if fast else torch.float32


def _cpu_flags() -> str:
    try:
        return next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return ""


NOT_CHECKED = ({"place": "engine", "why": "no TensorRT engine was built here"},)
"""Steps of the chain that this machine could not take; they are counted, not hidden."""


def needs(spec: Prune, method: Method) -> Need:
    """The statistics that the method and the refinements ask for together."""
    return "gram" if spec.refine else method.needs


@dataclass
class _Stage:
    """One prune stage while it runs."""

    run: RunDir
    loaded: LoadedModel
    plan: Plan
    spec: Prune
    method: Method
    sample: Sample | None
    compute: torch.dtype
    progress: Progress

    def work(self) -> None:
        start = time.perf_counter()
        self.run.write_json("plan.json", self.plan.to_json())
        blocks = sorted({row.target.block for row in self.plan.pruned()})
        walk = self._walk()
        rows: list[dict[str, Any]] = []
        for number in range(blocks[-1] + 1):
            self.progress(f"{self.spec.method} {self.spec.pattern}, block {number}", number, len(self.plan.blocks))
            if number in blocks:
                rows += self._block(walk, number)
            elif walk is not None:
                walk.pass_dense(number)
            if walk is not None and number < blocks[-1]:
                walk.advance(number)
        self.progress("saving and verifying", 0, 0)
        report = self._save(rows)
        if not report.ok:
            raise CheckFailed(f"The saved model fails verification: {report.summary()}")
        self.run.finish("prune", time.perf_counter() - start, layers=len(rows), peak_memory_mb=peak_memory_mb(),
                        provenance=self.loaded.provenance, compute=str(self.compute).removeprefix("torch."),
                        calibration=self.sample.to_json() if self.sample else None)
        shutil.rmtree(self.run / "blocks", ignore_errors=True)

    def _walk(self) -> BlockWalk | None:
        """The calibration stream, or None when the method needs no data."""
        if self.sample is None:
            return None
        batches = models.batches(self.loaded, self.sample.inputs, self.spec.calibration.batch)
        self.progress("capturing the inputs of the first block", 0, 0)
        both = any(step.blend for step in self.spec.refine)
        return BlockWalk(self.loaded.module, self.plan.blocks, batches, self.compute, both)

    def _block(self, walk: BlockWalk | None, block: int) -> list[dict[str, Any]]:
        """Prune one block, or read it back when an earlier process finished it."""
        name = f"blocks/{block:03d}.safetensors"
        if not (self.run / name).is_file():
            self._prune_block(walk, block, name)
        elif walk is not None:
            walk.pass_dense(block)
        weights = load_file(self.run / name)
        with torch.no_grad():
            for row in self.plan.pruned(block):
                self.loaded.module.get_parameter(row.target.name).copy_(weights[row.target.name])
        with safe_open(self.run / name, framework="numpy") as file:
            return json.loads(file.metadata()["layers"])

    def _prune_block(self, walk: BlockWalk | None, block: int, name: str) -> None:
        targets = self.plan.pruned(block)
        wanted = needs(self.spec, self.method)
        stats = walk.statistics(block, [row.target for row in targets], wanted) if walk else {}
        tensors: dict[str, torch.Tensor] = {}
        layers = []
        for row in targets:
            weight, mask, facts = self._prune_layer(row, stats.get(row.target.fusion, LayerStats.none()))
            tensors |= {row.target.name: weight, f"{row.target.name}|mask": torch.from_numpy(mask.bits)}
            layers.append({"name": row.target.name, "block": block, "axis": mask.axis, "pattern": str(mask.pattern),
                           "shape": mask.shape, "dense_hash": mask.dense_hash, **facts})
        with self.run.replacing(name) as temporary:
            save_file(tensors, temporary, {"layers": json.dumps(layers)})

    def _prune_layer(self, row: PlanRow, stats: LayerStats) -> tuple[torch.Tensor, Mask, dict[str, Any]]:
        """The baked weight (pruned values exactly +0.0), its mask, and what it cost."""
        start = time.perf_counter()
        axis, pattern = row.target.axis, row.pattern
        assert pattern is not None
        parameter = self.loaded.module.get_parameter(row.target.name).detach()
        rows = to_rows(parameter, axis).float()
        result = self.method.prune_layer(rows, stats, pattern)
        for step in self.spec.refine:
            start_from = rows if result.weight is None else result.weight
            refined = refit(rows, start_from, result.mask, stats, step.blend, step.steps, step.damping)
            result = LayerResult(result.mask, refined)
        if not mask_follows(result.mask, pattern):
            raise CheckFailed(f"The method '{self.spec.method}' broke the pattern {pattern} on '{row.target.name}'.")
        mask = from_rows(result.mask, parameter.shape, axis)
        kept = rows if result.weight is None else result.weight
        weight = torch.where(mask, from_rows(kept, parameter.shape, axis).to(parameter.dtype), 0)
        error = None
        if stats.gram is not None:
            error = relative_error(rows, to_rows(weight, axis).float(), stats.gram)
        facts = {"relative_error": error, "seconds": round(time.perf_counter() - start, 3)}
        return weight.cpu(), Mask.pack(mask, axis, pattern, tensor_hash(parameter)), facts

    def _save(self, rows: list[dict[str, Any]]) -> VerifyReport:
        """Write weights, masks and records, and check the weights as they are on disk."""
        info = {"method": self.spec.method, "recipe": self.run.manifest()["fingerprint"], "model": self.loaded.source}
        masks = MaskSet(self._masks(rows), info)
        with self.run.replacing("model") as folder:
            folder.mkdir()
            models.save(self.loaded, folder)
        with self.run.replacing("masks.safetensors") as file:
            masks.save(file)
        if self.sample is not None:
            with self.run.replacing("calibration.safetensors") as file:
                save_file(self.sample.record(), file)
        self.run.write_json("layers.json", rows)
        report = verify_checkpoint(self.run / "model", masks)
        self.run.write_json("verify.json", {"reports": [report.to_json()], "not_checked": list(NOT_CHECKED)})
        return report

    def _masks(self, rows: list[dict[str, Any]]) -> dict[str, Mask]:
        masks = {}
        for block in sorted({row["block"] for row in rows}):
            with safe_open(self.run / f"blocks/{block:03d}.safetensors", framework="numpy") as file:
                for row in (r for r in rows if r["block"] == block):
                    masks[row["name"]] = Mask(file.get_tensor(f"{row['name']}|mask"), tuple(row["shape"]), row["axis"],
                                              NMPattern.parse(row["pattern"]), row["dense_hash"])
        return masks


def peak_memory_mb() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
