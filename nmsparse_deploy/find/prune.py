"""The prune stage: load, plan, walk block by block, commit each block, bake, verify, save.

A block is finished when `blocks/NNN.safetensors` exists. After a kill, finished blocks are read back, the calibration
stream is recomputed through them, and the walk goes on: the masks are the same bits as in an unbroken run.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nmsparse_deploy import models
from nmsparse_deploy.data.calibration_sample import Sample, draw, some
from nmsparse_deploy.errors import CheckFailed, NmsparseError, UsageError
from nmsparse_deploy.find.calibration.block_walk import BlockWalk
from nmsparse_deploy.find.calibration.buffers import DiskBuffers
from nmsparse_deploy.find.learn.checkpoint import Checkpoints
from nmsparse_deploy.find.learn.prior_selection import Masks
from nmsparse_deploy.find.learn.session import FOLDER, Session, stored_priors, summary
from nmsparse_deploy.find.methods.base import LayerResult, Method
from nmsparse_deploy.find.offload import Opened, open_model
from nmsparse_deploy.find.plan.make_plan import Plan
from nmsparse_deploy.find.prune_block import PrunedBlock, prune_block
from nmsparse_deploy.masks import Mask, MaskSet, mask_follows, normalise_zeros, tensor_hash
from nmsparse_deploy.models.base import from_rows, to_rows
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.models.permutations import ORDER, Permutations, from_tensors, to_tensors
from nmsparse_deploy.pattern import Scope, parse_pattern
from nmsparse_deploy.prove import VerifyReport, verify_checkpoint
from nmsparse_deploy.prove.report import NOT_CHECKED
from nmsparse_deploy.recipe import DEFAULT_MODEL, Prune, fingerprint
from nmsparse_deploy.registry import METHODS, REFINEMENTS
from nmsparse_deploy.runs.manifest import RecipeRecord
from nmsparse_deploy.runs.run_dir import RUNS, RunDir
from nmsparse_deploy.system import distributed, hardware
from nmsparse_deploy.system.distributed import ALONE, Processes
from nmsparse_deploy.system.memory import give_back, peak_memory_mb, run_peak, start_run
from nmsparse_deploy.system.progress import Progress, silent


def prune(model: str = DEFAULT_MODEL, spec: Prune = Prune(), out: Path | None = None, force: bool = False,  # noqa: B008
          progress: Progress = silent, max_memory: int | None = None) -> RunDir:
    """Prune `model` as `spec` says into a run folder (default `runs/MODEL-METHOD-PATTERN`) and verify what was saved.

    Weights are streamed from their files where the model does not fit into memory, or into `max_memory` bytes.
    The same recipe resumes an unfinished run and returns a finished one as it is. Raises `UsageError` for a folder that
    holds another recipe's run, `NmsparseError` for weights or data that cannot be used, `CheckFailed` when the saved
    model does not hold the pattern. Several processes (`torchrun`) share the calibration sequences, or what is learned
    through the whole model; the first one writes.
    """
    model = str(Path(model).resolve()) if Path(model).exists() else model
    recipe = RecipeRecord.of(model, spec)
    identity = fingerprint(model, spec)
    path = out or _default_path(model, spec, identity)
    if not force and (path / "manifest.json").is_file():
        run = RunDir.create(path, recipe, identity, force=False)  # refuses another recipe before anything is loaded
        if run.finished("prune"):
            progress(f"'{path}' is finished; --force starts over", 0, 0)
            return run
    start_run()
    device = hardware.device()
    spec = spec.settled(gpu=device.type == "cuda")
    team = distributed.current()
    if team.world > 1:
        progress = progress if team.first else silent
        _check_shared(spec, team)
    METHODS[spec.one_shot_method].require(f"The method '{spec.method}'")
    method = Method.load(spec.one_shot_method)
    compute = hardware.compute_dtype(spec.compute, device)
    progress(f"loading {model}", 0, 0)
    opened = open_model(model, spec, compute, max_memory, progress)
    loaded, plan = opened.loaded, opened.plan
    _check_finite(loaded, plan)
    stored = stored_priors(spec.learn, loaded.module, plan) if spec.learn else {}
    _check_scales_fit(plan, spec)
    idle = spec.needs == "none" and not spec.learn and not spec.finetune
    sample = None if idle else draw(loaded, spec.calibration, progress, compute)
    if team.first:
        RunDir.create(path, recipe, identity, force)
    team.wait()
    run = RunDir(path)
    loaded.to(device)
    stage = _Stage(run, opened, loaded, plan, spec, method, sample, compute, progress, stored,
                   team=ALONE if spec.learn else team)
    if spec.learn and not team.first:
        stage.learn_whole()
    else:
        with run.lock() if team.first else nullcontext():
            stage.work()
    team.wait()
    return run


def _default_path(model: str, spec: Prune, identity: str) -> Path:
    how = "-".join([*(["permute"] if spec.permute else []), spec.method, *([f"w{spec.wbits}"] if spec.wbits else []),
                    *(step.name for step in spec.refine), *(["plan"] if spec.patterns else [])])
    path = RUNS / f"{models.short_name(model)}-{how}-{spec.pattern.replace(':', '-')}"
    if (path / "manifest.json").is_file() and RunDir(path).manifest().fingerprint != identity:
        return path.with_name(f"{path.name}-{identity[:8]}")
    return path


def _check_finite(loaded: LoadedModel, plan: Plan) -> None:
    for number, path in enumerate(plan.blocks):
        with loaded.weights.materialise(path):
            for name in (row.target.name for row in plan.pruned(number)):
                if not torch.isfinite(loaded.module.get_parameter(name)).all():
                    raise NmsparseError(f"The weight '{name}' of '{loaded.source}' contains NaN or Inf.",
                                        f"repair the checkpoint, or leave it dense with --exclude '{name}'")


def _check_shared(spec: Prune, team: Processes) -> None:
    """Several processes can share the sequences where statistics are drawn from them, or masks learned globally."""
    if spec.learn is not None and spec.learn.objective == "global" and not spec.finetune:
        return
    alone = next((step.name for step in spec.refine if REFINEMENTS[step.name].level != "layer"), None)
    if spec.learn is not None or alone:
        raise UsageError(f"'{alone or spec.method}' sees all sequences at a time, so {team.world} processes cannot "
                         "share them.", "run it in one process; masks learned with --objective global can be shared")
    if spec.needs == "none":
        raise UsageError(f"'{spec.method}' uses no data, so there is nothing for {team.world} processes to share.",
                         "run it in one process")
    batches = -(-spec.calibration.samples // spec.calibration.batch)
    if batches < team.world:
        raise UsageError(f"{spec.calibration.samples} samples in batches of {spec.calibration.batch} cannot be shared "
                         f"by {team.world} processes.", "more --samples, or a smaller calibration.batch in a recipe")


def _check_scales_fit(plan: Plan, spec: Prune) -> None:
    for row in plan.pruned() if spec.wgroup else []:
        assert spec.wgroup is not None and row.pattern is not None
        if spec.wgroup % row.pattern.block_size:
            raise UsageError(f"wgroup {spec.wgroup} cuts through what {row.pattern} prunes at a time in "
                             f"'{row.target.name}'.", f"take a multiple of {row.pattern.block_size}")
        if row.target.k % spec.wgroup:
            raise UsageError(f"wgroup {spec.wgroup} does not divide the {row.target.k} inputs of '{row.target.name}'.",
                             f"leave it out, or leave the layer dense with --exclude '{row.target.name}'")


def _unreached(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Experts that too few calibration tokens reached, among all matrices of experts; nothing without experts."""
    stacks = [row["experts"] for row in rows if "experts" in row]
    if not stacks:
        return {}
    return {"experts_by_magnitude": {"matrices": sum(len(stack["by_magnitude"]) for stack in stacks),
                                     "of": sum(len(stack["tokens"]) for stack in stacks)}}


MASK = "|mask"
SCALES = "|scales"
"""Follow a parameter's name in a block's file."""

ACTIVATIONS = "activations"
"""In the run folder while hidden states are on disk."""


def _is_weight(key: str) -> bool:
    """Is this entry of a block's file the new value of a parameter?"""
    return not key.endswith((MASK, SCALES)) and ORDER not in key


def _stored(path: Path, name: str, dtype: torch.dtype) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        found: torch.Tensor = file.get_tensor(name).to(dtype)  # refinements leave norms and biases in fp32
        return found


@dataclass
class _Stage:
    """One prune stage while it runs."""

    run: RunDir
    opened: Opened
    loaded: LoadedModel
    plan: Plan
    spec: Prune
    method: Method
    """The first prior, where masks are learned."""
    sample: Sample | None
    compute: torch.dtype
    progress: Progress
    priors: Mapping[str, Masks] = field(default_factory=dict)
    """Masks from files that learning may start from."""
    refinements: list[dict[str, Any]] = field(default_factory=list)
    """What block refinements had to tell, block by block."""
    orders: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    """How channels were permuted before pruning."""
    given: dict[str, LayerResult] | None = None
    """Masks that were learned for the whole model."""
    moved: dict[str, Mask] = field(default_factory=dict)
    """Masks that fine-tuning changed."""
    team: Processes = ALONE

    def work(self) -> None:
        start = time.perf_counter()
        if self.team.first:
            self.run.write_json("plan.json", self.plan.to_json())
        blocks = sorted({row.target.block for row in self.plan.pruned()})
        self.learn_whole()
        walk, probe = self._walk(), self._probe()
        rows: list[dict[str, Any]] = []
        for number in range(blocks[-1] + 1):
            self.progress(f"{self.spec.method} {self.spec.pattern}, block {number}", number, len(self.plan.blocks))
            with self.loaded.weights.materialise(self.plan.blocks[number]):
                if number in blocks:
                    rows += self._block(walk, probe, number)
                elif walk is not None:
                    walk.pass_dense(number)
                if walk is not None and number < blocks[-1]:
                    walk.advance(number)
            if self.loaded.streamed:
                give_back()
            self.opened.check(run_peak(), f"Block {number}")
        del walk, probe
        self._finetune(rows)
        if self.team.first:
            self._finish(rows, time.perf_counter() - start)

    def _finish(self, rows: list[dict[str, Any]], seconds: float) -> None:
        self.progress("saving and verifying", 0, 0)
        report = self._save(rows)
        if not report.ok:
            raise CheckFailed(f"The saved model fails verification: {report.summary()}")
        self.opened.check(run_peak(), "Saving and verifying")
        self.run.finish("prune", seconds, layers=len(rows), peak_memory_mb=peak_memory_mb(),
                        negative_zeros_normalised=sum(row["negative_zeros_normalised"] for row in rows),
                        memory={**self.opened.to_json(), "peak_bytes": run_peak()},
                        provenance=self.loaded.provenance, compute=str(self.compute).removeprefix("torch."),
                        calibration=self.sample.to_json() if self.sample else None, **_unreached(rows),
                        **self._learned())
        for folder in ("blocks", FOLDER, ACTIVATIONS):
            shutil.rmtree(self.run / folder, ignore_errors=True)

    def _walk(self) -> BlockWalk | None:
        """The calibration stream, or None when the method needs no data."""
        if self.sample is None or self.spec.needs == "none":
            return None
        batches = self.loaded.batches(some(self.sample, self.spec.walked), self.spec.calibration.batch)
        batches = batches[self.team.rank :: self.team.world]
        self.progress("capturing the inputs of the first block", 0, 0)
        both = self.spec.dense_stream or self._blockwise()
        buffers = DiskBuffers(self.run / f"{ACTIVATIONS}/{self.team.rank}") if self.opened.on_disk else list
        return BlockWalk(self.loaded.module, self.plan.blocks, batches, self.compute, both, self.loaded.weights,
                         buffers, self.team)

    def _probe(self) -> BlockWalk | None:
        """A few tokens in fp32, on which the block is asked which of its channels may be permuted."""
        if not self.spec.permute:
            return None
        batches = self.loaded.batches(self.loaded.sample_inputs(), 2)
        return BlockWalk(self.loaded.module, self.plan.blocks, batches[:1], weights=self.loaded.weights)

    def _block(self, walk: BlockWalk | None, probe: BlockWalk | None, block: int) -> list[dict[str, Any]]:
        """Prune one block, or read it back when an earlier process finished it."""
        name = f"blocks/{block:03d}.safetensors"
        if not (self.run / name).is_file():
            self._commit(name, prune_block(self.loaded.module, self.plan, block, self.spec, self.method, walk, probe,
                                          self._session().learn_block if self._blockwise() else None, self.given))
        elif walk is not None:
            walk.pass_dense(block)
        self.team.wait()
        weights = load_file(self.run / name)
        with torch.no_grad():
            for key, value in weights.items():
                if _is_weight(key):
                    self.loaded.module.get_parameter(key).copy_(value)
        with safe_open(self.run / name, framework="numpy") as file:
            records = file.metadata()
        self.refinements += json.loads(records["refinements"])
        self.orders |= from_tensors(weights)
        return json.loads(records["layers"])

    def _blockwise(self) -> bool:
        return self.spec.learn is not None and self.spec.learn.objective == "block"

    def _session(self) -> Session:
        return Session(self.run, self.spec.learn, self.spec.calibration.seed, self.compute,
                       self.loaded.device, self.progress, self.priors)

    def learn_whole(self) -> None:
        """Learn all masks at once, where the recipe asks for it; the walk then writes them down."""
        if self.spec.learn is None or self._blockwise():
            return
        from nmsparse_deploy.find.learn.whole_model import learn_model

        assert self.sample is not None
        self.given, facts = learn_model(self._session(), self.loaded, self.plan, self.spec, self.sample)
        self.refinements.append({"block": None, **facts})

    def _finetune(self, rows: list[dict[str, Any]]) -> None:
        """Train the whole pruned model, where the recipe asks for it. Errors of single layers mean nothing after."""
        if self.spec.finetune is None:
            return
        from nmsparse_deploy.find.learn.finetune_model import refine_model

        assert self.sample is not None
        masks = self._masks(rows)
        found, facts = refine_model(Checkpoints(self.run, f"{FOLDER}/{self.spec.finetune.name}.safetensors"),
                                    self.loaded, self.plan, self.spec, masks, self.sample.inputs, self.compute,
                                    self.progress)
        for row in rows:
            row["relative_error"] = None
            row["negative_zeros_normalised"] += normalise_zeros(self.loaded.module.get_parameter(row["name"]).detach())
            kept, mask = found[row["name"]], masks[row["name"]]
            bits = from_rows(kept, mask.shape, mask.axis)
            self.moved[row["name"]] = Mask.pack(bits, mask.axis, mask.pattern, mask.dense_hash)
        self.refinements.append({"block": None, **facts})

    def _learned(self) -> dict[str, Any]:
        if self.spec.learn is None:
            return {}
        return {"learned": summary([row for row in self.refinements if row["name"] == self.spec.method])}

    def _scope(self) -> Scope | None:
        """What the method compared; None when a refinement may have moved places since."""
        moved = any(REFINEMENTS[step.name].changes != "weights" for step in self.spec.refine)
        return None if moved else self.method.facts.scope

    def _commit(self, name: str, pruned: PrunedBlock) -> None:
        """Write the block's weights and masks; from here on it survives a kill."""
        if not self.team.first:
            return
        tensors = {key: value.cpu().contiguous() for key, value in pruned.others.items()} | to_tensors(pruned.orders)
        records, scope = [], self._scope()
        for key, layer in pruned.layers.items():
            parameter = self.loaded.module.get_parameter(key).detach()
            if not mask_follows(layer.result.mask, layer.pattern, scope=scope):
                raise CheckFailed(f"The recipe broke the pattern {layer.pattern} on '{key}'.")
            weight, negative_zeros = layer.baked(parameter.dtype)
            mask = Mask.pack(from_rows(layer.result.mask, layer.shape, layer.axis), layer.axis, layer.pattern,
                             tensor_hash(parameter))
            if layer.result.grid is not None:
                if not layer.result.grid.holds(to_rows(weight, layer.axis)):
                    raise CheckFailed(f"The recipe left the {self.spec.wbits}-bit grid on '{key}'.")
                tensors[key + SCALES] = layer.result.grid.scales.cpu()
            error = layer.error(to_rows(weight, layer.axis).float())
            tensors |= {key: weight.cpu(), key + MASK: torch.from_numpy(mask.bits)}
            records.append({"name": key, "block": pruned.number, "axis": mask.axis, "pattern": str(mask.pattern),
                            "shape": mask.shape, "dense_hash": mask.dense_hash, "relative_error": error,
                            "negative_zeros_normalised": negative_zeros,
                            "seconds": round(pruned.seconds[key], 3), "peak_memory_mb": pruned.peaks[key],
                            **layer.reached()})
        with self.run.replacing(name) as temporary:
            told = {"layers": records, "refinements": pruned.refinements}
            save_file(tensors, temporary, {key: json.dumps(value) for key, value in told.items()})

    def _save(self, rows: list[dict[str, Any]]) -> VerifyReport:
        """Write weights, masks and records, and check the weights as they are on disk."""
        info = {"method": self.spec.method, "recipe": self.run.manifest().fingerprint, "model": self.loaded.source}
        with self.run.replacing("model") as folder:
            folder.mkdir()
            self.loaded.save(folder, self._changed(rows))
        masks = MaskSet(self._masks(rows), info)  # not in memory beside a shard
        with self.run.replacing("masks.safetensors") as file:
            masks.save(file)
        if self.spec.wbits:
            with self.run.replacing("scales.safetensors") as file:
                about = {"bits": self.spec.wbits, "group": self.spec.wgroup}  # one key: several come in any order
                save_file(self._scales(rows), file, {"grid": json.dumps(about)})
        if self.sample is not None:
            with self.run.replacing("calibration.safetensors") as file:
                save_file(self.sample.record(), file)
        self.run.write_json("layers.json", rows)
        if self.orders:
            with self.run.replacing("permutations.safetensors") as file:
                Permutations(self.orders, self._spaces()).save(file)
        if self.refinements:
            self.run.write_json("refinements.json", self.refinements)
        report = verify_checkpoint(self.run / "model", masks)
        self.run.write_json("verify.json", {"reports": [report.to_json()], "not_checked": list(NOT_CHECKED)})
        return report

    def _changed(self, rows: list[dict[str, Any]]) -> dict[str, Callable[[], torch.Tensor]]:
        """How to read what pruning changed from the blocks' files, by parameter name."""
        changed: dict[str, Callable[[], torch.Tensor]] = {}
        for block in sorted({row["block"] for row in rows}):
            path = self.run / f"blocks/{block:03d}.safetensors"
            with safe_open(path, framework="pt") as file:
                names = [key for key in file.keys() if _is_weight(key)]  # noqa: SIM118
            changed |= {name: partial(_stored, path, name, self.loaded.module.get_parameter(name).dtype)
                        for name in names}
        return changed

    def _spaces(self) -> list[dict[str, Any]]:
        named = ("consumers", "producers", "segments", "length", "copies")
        return [{name: space[name] for name in named} for told in self.refinements if told["name"] == "permute"
                for space in told["spaces"]]

    def _masks(self, rows: list[dict[str, Any]]) -> dict[str, Mask]:
        masks = {}
        for block in sorted({row["block"] for row in rows}):
            with safe_open(self.run / f"blocks/{block:03d}.safetensors", framework="numpy") as file:
                for row in (r for r in rows if r["block"] == block):
                    masks[row["name"]] = Mask(file.get_tensor(row["name"] + MASK), tuple(row["shape"]), row["axis"],
                                              parse_pattern(row["pattern"]), row["dense_hash"])
        return masks | self.moved

    def _scales(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Scales of the rounded weights by parameter, fp32, `[outputs, runs of inputs that share one]`."""
        scales: dict[str, torch.Tensor] = {}
        for block in sorted({row["block"] for row in rows}):
            found = load_file(self.run / f"blocks/{block:03d}.safetensors")
            scales |= {key.removesuffix(SCALES): value for key, value in found.items() if key.endswith(SCALES)}
        return scales
