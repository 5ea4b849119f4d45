"""The stage files of a run, read once into types. A missing stage is None; a damaged one is a
sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.measure.evaluate.result import Evaluation, NotChecked
from nmsparse_deploy.models.base import Skipped
from nmsparse_deploy.models.roofline import Prediction
from nmsparse_deploy.prove.report import VerifyReport
from nmsparse_deploy.runs.manifest import Manifest
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.runs.stage_file import read_stage
from nmsparse_deploy.runs.wording import clean
from nmsparse_deploy.ship.onnx.record import ExportFile
from nmsparse_deploy.system.timing import SpeedUp, TimedArm

Recorded = Mapping[str, object]
"""Facts of which only the writer knows the names."""


@dataclass(frozen=True)
class Circumstances:
    """Versions and hardware of a measurement."""

    versions: dict[str, str] = field(default_factory=dict)
    hardware: Recorded = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedMatrix:
    """A row of `plan.json`; without a pattern the matrix stays dense."""

    name: str
    module: str
    k: int
    n: int
    pattern: str | None
    reason: str
    shape_verdict: str | None = None


@dataclass(frozen=True)
class PlanStage:
    """`plan.json`."""

    rows: tuple[PlannedMatrix, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class PrunedMatrix:
    """A row of `layers.json`."""

    name: str
    block: int
    pattern: str
    shape: tuple[int, ...]
    axis: int
    relative_error: float | None
    seconds: float


@dataclass(frozen=True)
class VerifyFile:
    """`verify.json`."""

    reports: tuple[VerifyReport, ...]
    not_checked: tuple[NotChecked, ...] = ()


@dataclass(frozen=True)
class EvaluateFile(Evaluation):
    """`evaluate.json`."""

    versions: dict[str, str] = field(default_factory=dict)
    hardware: Recorded = field(default_factory=dict)


@dataclass(frozen=True)
class BenchFile:
    """`bench.json`."""

    where: str
    shape: dict[str, int]
    arms: tuple[TimedArm, ...]
    ratios: dict[str, SpeedUp]
    verdict: str
    predicted: tuple[Prediction, ...] = ()
    environment: Circumstances = Circumstances()


@dataclass(frozen=True)
class Stages:
    """What the run holds so far."""

    path: Path
    manifest: Manifest
    plan: PlanStage | None
    layers: tuple[PrunedMatrix, ...]
    verify: VerifyFile | None
    evaluate: EvaluateFile | None
    export: ExportFile | None
    bench: BenchFile | None

    @classmethod
    def read(cls, run: RunDir) -> Stages:
        """Raise `UsageError` when nothing is pruned yet or a file is damaged."""
        manifest = Manifest.parse(clean(run.read_json("manifest.json"), numbers=False), run.path)
        layers = read_stage(run, "layers.json", tuple[PrunedMatrix, ...])
        if layers is None:
            raise UsageError(
                f"The run '{run.path}' is not pruned yet.",
                "nmsparse-deploy prune with the same options resumes it",
            )
        return cls(
            run.path,
            manifest,
            read_stage(run, "plan.json", PlanStage),
            layers,
            read_stage(run, "verify.json", VerifyFile),
            read_stage(run, "evaluate.json", EvaluateFile),
            read_stage(run, "export.json", ExportFile),
            read_stage(run, "bench.json", BenchFile),
        )
