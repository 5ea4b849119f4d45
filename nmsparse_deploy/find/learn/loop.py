"""The one training loop: whatever a learner learns and whatever it is learned on.

A step accumulates micro-batches, averages gradients over processes, clips, and lets the optimiser
and then the learner move. Data order, noise and schedules are functions of seed and step
(`step_context.py`), and a checkpoint holds the rest: a run that is killed and resumed ends with the
bits of an unbroken one (on the CPU; GPU kernels may sum in another order).

What counts is the hard mask on held-out batches. It is evaluated before the first step, every
`evaluate_every` steps and after the last; the best is returned, and that is the prior when nothing
beats it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from nmsparse_deploy.errors import MissingExtra, NmsparseError, UsageError
from nmsparse_deploy.find.facts import Json
from nmsparse_deploy.find.learn.checkpoint import (
    Checkpoints,
    TrainingProgress,
    flat_masks,
    flat_optimiser,
    restore_optimiser,
    unflat_masks,
    with_prefix,
    without_prefix,
)
from nmsparse_deploy.find.learn.learner import LearnedMask, Learner, Subject
from nmsparse_deploy.find.learn.mask_parametrization import detach, showing
from nmsparse_deploy.find.learn.sharded import put, shard, shell, whole
from nmsparse_deploy.find.learn.step_context import StepContext, order, rate_factor
from nmsparse_deploy.models.discovery import find_blocks
from nmsparse_deploy.recipe import Training
from nmsparse_deploy.system import distributed
from nmsparse_deploy.system.memory import peak_since_reset_mb, reset_peak
from nmsparse_deploy.system.progress import Progress, silent

QUIET = 10.0
"""Seconds between two progress messages at least, evaluations aside."""


@dataclass(frozen=True)
class TrainingFacts:
    """The report of a training run."""

    prior: float
    """Held-out loss before the first step."""
    best: float
    best_step: int
    seconds: float
    history: list[dict[str, float]]
    judged_at: list[float]
    steps: int
    samples_per_step: int
    processes: int
    sharded: bool
    peak_memory_mb: int
    learner: Mapping[str, float] = field(default_factory=dict)
    """What the method reports besides."""

    def to_json(self) -> Json:
        facts: Json = {
            key: value for key, value in asdict(self).items() if key not in ("learner", "sharded")
        }
        if self.processes > 1:
            facts |= {"each_process": "its own noise, its own batches", "sharded": self.sharded}
        return {**facts, **self.learner}


@dataclass(frozen=True)
class Outcome:
    """The best hard masks by `MaskSite.name`, and the report of the run."""

    masks: dict[str, LearnedMask]
    facts: TrainingFacts


def fit(
    subject: Subject,
    learner: Learner,
    priors: Mapping[str, torch.Tensor],
    spec: Training,
    seed: int,
    checkpoints: Checkpoints | None = None,
    progress: Progress = silent,
    title: str = "learning",
) -> Outcome:
    """Train until `spec.steps`, from the checkpoint if there is one, and return the best masks.

    The subject's module has no mask on it any more afterwards, also after an error. With
    `spec.shard` several processes work on a shell of it, split over them. Raises `NmsparseError`
    when the loss is not finite or memory runs out; checkpoints stay.
    """
    if not subject.training or not subject.held_out:
        raise UsageError(
            f"{title}: there is too little data to learn from some batches and judge by others.",
            "more calibration samples, or a smaller calibration batch",
        )
    module = subject.module
    try:
        return _Fit(subject, learner, priors, spec, seed, checkpoints, progress, title).work()
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(
            error
        ):
            raise
        raise NmsparseError(
            f"{title}: out of memory; what was learned up to the last checkpoint is kept.",
            "free memory and run the same command again, or start another run with "
            "gradient_checkpointing or a smaller calibration batch",
        ) from error
    finally:
        subject.module = module
        detach(module)


class _Fit:
    """One run of the loop."""

    def __init__(
        self,
        subject: Subject,
        learner: Learner,
        priors: Mapping[str, torch.Tensor],
        spec: Training,
        seed: int,
        checkpoints: Checkpoints | None,
        progress: Progress,
        title: str,
    ) -> None:
        self.subject, self.learner, self.spec, self.seed = subject, learner, spec, seed
        self.checkpoints, self.progress, self.title = checkpoints, progress, title
        self.team = distributed.current()
        self.accelerator = _accelerator(spec, title)
        self.rank, self.world = self.team.rank, self.team.world
        self.parts = _parts(spec.batch or subject.samples, subject.samples, self.world)
        self.sharded = spec.shard and self.world > 1
        if self.sharded:
            if not learner.shards:
                raise UsageError(
                    f"{title}: this method's values are needed whole in every process.",
                    "shard: false",
                )
            blocks, subject.module = find_blocks(subject.module), shell(subject.module)
        self.optimiser = learner.prepare(subject, priors)
        if self.sharded:
            shard(subject.module, blocks, self.optimiser, self.world)
        self.peaks = [group["lr"] for group in self.optimiser.param_groups]
        self.trained = [value for group in self.optimiser.param_groups for value in group["params"]]
        self.so_far = TrainingProgress()
        self.best: dict[str, LearnedMask] = {}
        self.start = self.reported = time.perf_counter()

    def work(self) -> Outcome:
        """Train from the checkpoint, or from the start, to the last step."""
        reset_peak()
        if not self._resume():
            self.so_far.prior = self._evaluate()
        while self.so_far.step < self.spec.steps:
            step = self.so_far.step
            loss = self._step(step)
            self.so_far.step = done = step + 1
            if evaluated := done % self.spec.evaluate_every == 0 or done == self.spec.steps:
                self._evaluate(loss)
            self._report_progress(loss, evaluated)
            if done % self.spec.checkpoint_every == 0 or done == self.spec.steps:
                self._save()
        for (
            tracker
        ) in self.accelerator.trackers:  # end_training would also part the processes for good
            tracker.finish()
        return Outcome(self.best, self._facts())

    def _step(self, step: int) -> float:
        """Take one optimiser step; return its loss."""
        factor = rate_factor(
            step, self.spec.steps, self.spec.warmup, self.spec.schedule, self.spec.floor
        )
        for group, peak in zip(self.optimiser.param_groups, self.peaks):
            group["lr"] = peak * factor
        total = torch.zeros((), device=self.trained[0].device)
        context = StepContext()
        for part, place in enumerate(self._batches_of(step)):
            context = StepContext(
                self.seed, step, self.spec.steps, part, self.parts, self.rank, self.world
            )
            terms = self.learner.loss_terms(self.subject, self.subject.training[place], context)
            loss = torch.stack([term.float() for term in terms.values()]).sum() / self.parts
            loss.backward()
            total += loss.detach()
        if self.world > 1 and not self.sharded:  # FSDP has averaged its own gradients
            for value in self.trained:
                gradient = torch.zeros_like(value) if value.grad is None else value.grad
                value.grad = self.team.add(gradient) / self.world
        if self.world > 1:
            total = self.team.add(total) / self.world
        norm = whole(torch.nn.utils.clip_grad_norm_(self.trained, self.spec.clip or math.inf))
        if not math.isfinite(loss_now := float(total)) or not torch.isfinite(norm):
            self._fail(step)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.learner.after_step(context)
        return loss_now

    def _batches_of(self, step: int) -> list[int]:
        """Return which training batches this process takes in a step."""
        each = self.parts * self.world
        return order(self.seed, len(self.subject.training), step * each, each)[
            self.rank :: self.world
        ]

    def _evaluate(self, loss: float | None = None) -> float:
        """Return the held-out loss of the hard mask; keep the mask if it is the best."""
        mine = self.subject.held_out[self.rank :: self.world]
        with torch.no_grad(), showing(self.subject.module, "hard"):
            scores = [self.subject.score(number).double() for number in mine]
            if self.sharded and len(mine) * self.world < len(self.subject.held_out):
                self.subject.score(
                    self.subject.held_out[0]
                )  # blocks are gathered by all processes together
        score = sum(scores, torch.zeros((), dtype=torch.float64, device=self.trained[0].device))
        hard = float(self.team.add(score)) / len(self.subject.held_out)
        if not self.best or hard < self.so_far.best:
            self.best = self.learner.finish()
            self.so_far.best, self.so_far.best_step = hard, self.so_far.step
        entry = {"step": self.so_far.step, "hard": hard} | ({} if loss is None else {"loss": loss})
        self.so_far.history.append(entry)
        self.so_far.judged_at.append(round(self._seconds(), 3))
        if self.spec.track:
            self.accelerator.log(entry, step=self.so_far.step)
        return hard

    def _fail(self, step: int) -> None:
        self._save()
        best = f"step {self.so_far.best_step}, held-out loss {self.so_far.best:.4g}"
        raise NmsparseError(
            f"{self.title}: the loss or its gradient is not finite at step {step + 1} of {self.spec.steps}; the best "
            f"mask so far ({best}) is in the checkpoint.",
            "start another run with a smaller step_size, or with compute fp32",
        )

    def _save(self) -> None:
        if self.checkpoints is None or not (self.team.first or self.sharded):
            return
        self.so_far.seconds, self.start = self._seconds(), time.perf_counter()
        values = {str(index): whole(value) for index, value in enumerate(self.trained)}
        tensors = {
            **with_prefix("value", values),
            **with_prefix("optimiser", flat_optimiser(self.optimiser)),
            **with_prefix("best", flat_masks(self.best)),
            **with_prefix("learner", self.learner.state()),
        }
        if self.team.first:
            self.checkpoints.save(self.so_far, tensors)

    def _resume(self) -> bool:
        checkpoint = self.checkpoints.load() if self.checkpoints else None
        if checkpoint is None:
            return False
        self.so_far, tensors = checkpoint
        values = without_prefix("value", tensors)
        if [tuple(values[str(i)].shape) for i in range(len(values))] != [
            tuple(v.shape) for v in self.trained
        ]:
            raise UsageError(
                f"{self.title}: the checkpoint was written for other weights.",
                "start over with --force",
            )
        with torch.no_grad():
            for index, value in enumerate(self.trained):
                put(value, values[str(index)])
        restore_optimiser(self.optimiser, self.trained, without_prefix("optimiser", tensors))
        self.learner.restore(without_prefix("learner", tensors))
        self.best = unflat_masks(without_prefix("best", tensors))
        self.progress(f"{self.title}: going on from step {self.so_far.step}", 0, 0)
        return True

    def _seconds(self) -> float:
        """Return the time of training so far, in all processes that worked on it one after the
        other."""
        return self.so_far.seconds + time.perf_counter() - self.start

    def _report_progress(self, loss: float, evaluated: bool) -> None:
        now = time.perf_counter()
        if not evaluated and now - self.reported < QUIET:
            return
        self.reported = now
        done, steps = self.so_far, self.spec.steps
        left = self._seconds() / done.step * (steps - done.step)
        self.progress(
            f"{self.title}: loss {loss:.4g}, hard mask {done.best:.4g} (prior {done.prior:.4g}), "
            f"{left:.0f} s left, {peak_since_reset_mb():,} MB",
            done.step,
            steps,
        )

    def _facts(self) -> TrainingFacts:
        done = self.so_far
        return TrainingFacts(
            done.prior,
            done.best,
            done.best_step,
            round(self._seconds(), 3),
            done.history,
            done.judged_at,
            done.step,
            self.parts * self.subject.samples * self.world,
            self.world,
            self.sharded,
            peak_since_reset_mb(),
            self.learner.facts(),
        )


def _parts(batch: int, samples: int, world: int) -> int:
    """Return the micro-batches per step and process."""
    if batch % (samples * world):
        raise UsageError(
            f"{batch} samples per step cannot be split into micro-batches of {samples} on {world} "
            "processes.",
            "learn.batch has to be a multiple of calibration.batch times the processes",
        )
    return batch // (samples * world)


def _accelerator(spec: Training, title: str) -> Accelerator:
    available = [str(tracker) for tracker in get_available_trackers()]
    if spec.track and spec.track not in available:
        raise MissingExtra(spec.track, "track", f"The tracker '{spec.track}'")
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), log_with=spec.track)
    if spec.track:
        settings = {
            key: value
            for key, value in spec.model_dump().items()
            if isinstance(value, (int, float, str))
        }
        accelerator.init_trackers("nmsparse-deploy", {**settings, "title": title})
    return accelerator
