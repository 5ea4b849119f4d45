"""The prune stage: load, plan, walk block by block, commit each block, bake, verify, save.

A block is finished when `blocks/NNN.safetensors` exists. After a kill, finished blocks are read
back, the calibration stream is recomputed through them, and the walk goes on: the masks are the
same bits as in an unbroken run.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from nmsparse_deploy import models
from nmsparse_deploy.data.calibration_sample import Sample, draw, sample_hash, some
from nmsparse_deploy.find.block_file import BlockContent, BlockFile, LayerRecord
from nmsparse_deploy.find.calibration.block_walk import BlockWalk
from nmsparse_deploy.find.calibration.buffers import DiskBuffers
from nmsparse_deploy.find.facts import Json, RefinementRecord
from nmsparse_deploy.find.learn.checkpoint import Checkpoints
from nmsparse_deploy.find.learn.prior_selection import Masks
from nmsparse_deploy.find.learn.session import FOLDER, LearningSession, stored_priors, summary
from nmsparse_deploy.find.methods.base import LayerResult, Method
from nmsparse_deploy.find.offload import OpenedModel, open_model
from nmsparse_deploy.find.plan.make_plan import Plan
from nmsparse_deploy.find.prune_block import PrunedBlock, prune_block
from nmsparse_deploy.find.prune_checks import check_finite, check_scales_fit, check_shared
from nmsparse_deploy.find.write_run import stored_masks, verify_model, write_blocks
from nmsparse_deploy.masks import Mask, normalise_zeros
from nmsparse_deploy.models.base import from_rows
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.recipe import DEFAULT_MODEL, Prune, fingerprint
from nmsparse_deploy.registry import METHODS, REFINEMENTS
from nmsparse_deploy.runs.inputs import hashes, read_inputs
from nmsparse_deploy.runs.manifest import InputsRecord, RecipeRecord
from nmsparse_deploy.runs.run_dir import RUNS, RunDir
from nmsparse_deploy.system import distributed, hardware
from nmsparse_deploy.system.distributed import ALONE, Processes
from nmsparse_deploy.system.memory import give_back, peak_memory_mb, run_peak, start_run
from nmsparse_deploy.system.progress import Progress, silent


def prune(
    model: str = DEFAULT_MODEL,
    spec: Prune = Prune(),
    out: Path | None = None,
    force: bool = False,
    progress: Progress = silent,
    max_memory: int | None = None,
) -> RunDir:
    """Prune `model` as `spec` says into a run folder (default `runs/MODEL-METHOD-PATTERN`) and
    verify what was saved.

    Weights are streamed from their files where the model does not fit into memory, or into
    `max_memory` bytes. The same recipe resumes an unfinished run and returns a finished one as it
    is. Raises `UsageError` for a folder that holds another recipe's run, `NmsparseError` for
    weights or data that cannot be used, `CheckFailed` when the saved model does not hold the
    pattern. Several processes (`torchrun`) share the calibration sequences, or what is learned
    through the whole model; the first one writes.
    """
    model = models.absolute(model)
    recipe = RecipeRecord.of(model, spec)
    identity = fingerprint(model, spec)
    path = out or _default_path(model, spec, identity)
    team = distributed.current()
    if team.first:
        RunDir(path).refuse_foreign(force)  # before anything is read
    begun = not force and (path / "manifest.json").is_file()
    if begun:  # refuses another recipe before anything is read
        run = RunDir.create(path, recipe, identity, force=False)
    files = models.files(model) if team.first else {}
    read = (spec.calibration.data, spec.learn.prior_files if spec.learn else (), progress)
    inputs = read_inputs(files, *read) if team.first else InputsRecord()
    if begun:
        run.check_inputs(inputs)
        if run.finished("prune"):
            progress(f"'{path}' is finished; --force starts over", 0, 0)
            return run
    start_run()
    device = hardware.device()
    spec = spec.settled(gpu=device.type == "cuda")
    if team.world > 1:
        progress = progress if team.first else silent
        check_shared(spec, team)
    METHODS[spec.one_shot_method].require(f"The method '{spec.method}'")
    method = Method.load(spec.one_shot_method)
    compute = hardware.compute_dtype(spec.compute, device)
    progress(f"loading {model}", 0, 0)
    opened = open_model(model, spec, compute, max_memory, progress)
    loaded, plan = opened.loaded, opened.plan
    check_finite(loaded, plan)
    stored = stored_priors(spec.learn, loaded.module, plan) if spec.learn else {}
    check_scales_fit(plan, spec)
    idle = spec.needs == "none" and not spec.learn and not spec.finetune
    sample = None if idle else draw(loaded, spec.calibration, progress, compute)
    if team.first:
        if (loaded_from := models.files(loaded.source)) != files:  # it has just been downloaded
            inputs = read_inputs(loaded_from, *read)
        inputs = inputs.model_copy(update={"sample": sample and sample_hash(sample)})
        RunDir.create(path, recipe, identity, force, inputs)
    team.wait()
    run = RunDir(path)
    loaded.to(device)
    stage = _Stage(
        run,
        opened,
        loaded,
        plan,
        spec,
        method,
        sample,
        compute,
        progress,
        stored,
        ALONE if spec.learn else team,
    )
    if spec.learn and not team.first:
        stage.learn_whole()
    else:
        with run.lock() if team.first else nullcontext():
            stage.work()
    team.wait()
    return run


def _default_path(model: str, spec: Prune, identity: str) -> Path:
    how = "-".join(
        [
            *(["permute"] if spec.permute else []),
            spec.method,
            *([f"w{spec.wbits}"] if spec.wbits else []),
            *(step.name for step in spec.refine),
            *(["plan"] if spec.patterns else []),
        ]
    )
    path = RUNS / f"{models.short_name(model)}-{how}-{spec.pattern.replace(':', '-')}"
    if (path / "manifest.json").is_file() and RunDir(path).manifest().fingerprint != identity:
        return path.with_name(f"{path.name}-{identity[:8]}")
    return path


def _experts_by_magnitude(records: Sequence[LayerRecord]) -> dict[str, Json]:
    """Count the experts that too few calibration tokens reached, among all; nothing where there are
    none."""
    experts = [record.experts for record in records if record.experts]
    if not experts:
        return {}
    return {
        "experts_by_magnitude": {
            "matrices": sum(len(stack.by_magnitude) for stack in experts),
            "of": sum(len(stack.tokens) for stack in experts),
        }
    }


ACTIVATIONS = "activations"
"""In the run folder while hidden states are on disk."""


@dataclass
class _Stage:
    """One prune stage while it runs."""

    run: RunDir
    opened: OpenedModel
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
    team: Processes = ALONE
    files: list[BlockFile] = field(default_factory=list)
    """The finished blocks."""
    refinements: list[RefinementRecord] = field(default_factory=list)
    """In the order in which they were made."""
    given: dict[str, LayerResult] | None = None
    """Masks that were learned for the whole model."""

    def work(self) -> None:
        """Prune block by block, fine-tune, save and verify."""
        start = time.perf_counter()
        if self.team.first:
            self.run.write_json("plan.json", self.plan.to_json())
        self.learn_whole()
        self._walk_blocks()
        records, masks = self._finetune([record for file in self.files for record in file.layers])
        if self.team.first:
            self._finish(records, masks, time.perf_counter() - start)

    def _walk_blocks(self) -> None:
        blocks = sorted({row.target.block for row in self.plan.pruned()})
        walk, probe = self._walk(), self._probe()
        for number in range(blocks[-1] + 1):
            self.progress(
                f"{self.spec.method} {self.spec.pattern}, block {number}",
                number,
                len(self.plan.blocks),
            )
            with self.loaded.weights.materialise(self.plan.blocks[number]):
                if number in blocks:
                    self.files.append(file := self._block(walk, probe, number))
                    self.refinements += file.refinements
                elif walk is not None:
                    walk.pass_dense(number)
                if walk is not None and number < blocks[-1]:
                    walk.advance(number)
            if self.loaded.streamed:
                give_back()
            self.opened.check(run_peak(), f"Block {number}")

    def _finish(
        self, records: Sequence[LayerRecord], retuned: Mapping[str, Mask], seconds: float
    ) -> None:
        files = models.files(self.loaded.source)  # read until now: weights in memory are mapped
        self.run.check_inputs(InputsRecord(model=hashes(files, self.progress)))
        self.progress("saving and verifying", 0, 0)
        masks = write_blocks(
            self.run, self.loaded, self.spec, self.files, records, self.refinements, retuned
        )
        if self.sample is not None:
            with self.run.replacing("calibration.safetensors") as path:
                save_file(self.sample.record(), path)
        verify_model(self.run, masks, "saved")
        self.opened.check(run_peak(), "Saving and verifying")
        learned = [record for record in self.refinements if record.name == self.spec.method]
        self.run.finish(
            "prune",
            seconds,
            layers=len(records),
            peak_memory_mb=peak_memory_mb(),
            negative_zeros_normalised=sum(record.negative_zeros_normalised for record in records),
            memory={**self.opened.to_json(), "peak_bytes": run_peak()},
            provenance=self.loaded.provenance,
            compute=str(self.compute).removeprefix("torch."),
            calibration=self.sample.to_json() if self.sample else None,
            **_experts_by_magnitude(records),
            **({"learned": summary(learned).to_json()} if self.spec.learn else {}),
        )
        for folder in ("blocks", FOLDER, ACTIVATIONS):
            shutil.rmtree(self.run / folder, ignore_errors=True)

    def _walk(self) -> BlockWalk | None:
        """Make the calibration stream, or None when the method needs no data."""
        if self.sample is None or self.spec.needs == "none":
            return None
        batches = self.loaded.batches(
            some(self.sample, self.spec.walked), self.spec.calibration.batch
        )
        batches = batches[self.team.rank :: self.team.world]
        self.progress("capturing the inputs of the first block", 0, 0)
        both = self.spec.dense_stream or self._blockwise()
        buffers = (
            DiskBuffers(self.run / f"{ACTIVATIONS}/{self.team.rank}")
            if self.opened.on_disk
            else list
        )
        return BlockWalk(
            self.loaded.module,
            self.plan.blocks,
            batches,
            self.compute,
            both,
            self.loaded.weights,
            buffers,
            self.team,
            self.opened.spare(),
        )

    def _probe(self) -> BlockWalk | None:
        """Make a stream of a few tokens in fp32, on which a block is asked which of its channels
        may be permuted."""
        if not self.spec.permute:
            return None
        inputs = self.loaded.trial_inputs()
        batches = self.loaded.batches(inputs, max(map(len, inputs.values())))
        return BlockWalk(
            self.loaded.module, self.plan.blocks, batches[:1], weights=self.loaded.weights
        )

    def _block(self, walk: BlockWalk | None, probe: BlockWalk | None, number: int) -> BlockFile:
        """Prune one block, unless an earlier process finished it, and put its file's parameters
        into the model."""
        name = f"blocks/{number:03d}.safetensors"
        if not (self.run / name).is_file():
            self._commit(
                name,
                prune_block(
                    self.loaded.module,
                    self.plan,
                    number,
                    self.spec,
                    self.method,
                    walk,
                    probe,
                    self._session().learn_block if self._blockwise() else None,
                    self.given,
                ),
            )
        elif walk is not None:
            walk.pass_dense(number)
        self.team.wait()
        file = BlockFile.load(self.run / name)
        with torch.no_grad():
            for key, read in file.parameters(self.loaded.module).items():
                self.loaded.module.get_parameter(key).copy_(read())
        return file

    def _commit(self, name: str, pruned: PrunedBlock) -> None:
        """Write the block's file; from here on it survives a kill."""
        if self.team.first:
            moved = any(REFINEMENTS[step.name].changes != "weights" for step in self.spec.refine)
            content = BlockContent.of(
                pruned, self.loaded.module, None if moved else self.method.facts.scope
            )
            with self.run.replacing(name) as path:
                BlockFile.save(path, content)

    def _blockwise(self) -> bool:
        return self.spec.learn is not None and self.spec.learn.scope == "block"

    def _session(self) -> LearningSession:
        assert self.spec.learn is not None
        return LearningSession(
            self.run,
            self.spec.learn,
            self.spec.calibration.seed,
            self.compute,
            self.loaded.device,
            self.progress,
            self.priors,
        )

    def learn_whole(self) -> None:
        """Learn all masks at once, where the recipe asks for it; the walk then writes them down."""
        if self.spec.learn is None or self._blockwise():
            return
        from nmsparse_deploy.find.learn.whole_model import learn_model

        assert self.sample is not None
        self.given, record = learn_model(
            self._session(), self.loaded, self.plan, self.spec, self.sample
        )
        self.refinements.append(record)

    def _finetune(
        self, records: Sequence[LayerRecord]
    ) -> tuple[Sequence[LayerRecord], dict[str, Mask]]:
        """Train the whole pruned model, where the recipe asks for it; return new records, and the
        masks that changed.

        Errors of single layers mean nothing afterwards.
        """
        if self.spec.finetune is None:
            return records, {}
        from nmsparse_deploy.find.learn.finetune_model import refine_model

        assert self.sample is not None
        masks = stored_masks(self.files)
        rows, report = refine_model(
            Checkpoints(self.run, f"{FOLDER}/{self.spec.finetune.name}.safetensors"),
            self.loaded,
            self.plan,
            self.spec,
            masks,
            self.sample.inputs,
            self.compute,
            self.progress,
        )
        self.refinements.append(report)
        zeros = {
            record.name: normalise_zeros(self.loaded.module.get_parameter(record.name).detach())
            for record in records
        }
        tuned = [
            replace(
                record,
                relative_error=None,
                negative_zeros_normalised=record.negative_zeros_normalised + zeros[record.name],
            )
            for record in records
        ]
        return tuned, {
            name: Mask.pack(
                from_rows(rows[name], mask.shape, mask.axis),
                mask.axis,
                mask.pattern,
                mask.dense_hash,
            )
            for name, mask in masks.items()
        }
