"""The stage files of a run, read once into types. A missing stage is None; a damaged one is a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.measure.evaluate.result import Evaluation, NotChecked
from nmsparse_deploy.models.roofline import Prediction
from nmsparse_deploy.prove.agreement import Agreement
from nmsparse_deploy.prove.report import VerifyReport
from nmsparse_deploy.runs.manifest import Manifest
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.runs.wording import clean
from nmsparse_deploy.system.timing import TimedArm

Recorded = Mapping[str, object]
"""Facts of which only the writer knows the names."""
T = TypeVar("T")


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


@dataclass(frozen=True)
class NeverPruned:
    """A weight that was never a candidate."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class PlanStage:
    """`plan.json`."""

    rows: tuple[PlannedMatrix, ...]
    skipped: tuple[NeverPruned, ...]


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
class NotCompared:
    """Why two models, or a graph and a compiler, could not be held against each other here."""

    not_checked: str


@dataclass(frozen=True)
class RoundedGraph:
    """How the GEMMs of a graph were brought to 8 bits."""

    gemms: int
    requantised: int
    vanished: int
    scales: str


@dataclass(frozen=True)
class CachedGraphs:
    """Graphs with a key/value cache that share a model's weights."""

    graphs: tuple[str, ...]
    agreement: Agreement | NotCompared


@dataclass(frozen=True)
class CompiledGraph:
    """What TensorRT-RTX made of a graph: one of the three."""

    summary: str | None = None
    refused: str | None = None
    not_checked: str | None = None


@dataclass(frozen=True)
class ExportedGraph:
    """An entry of `export.json`."""

    path: str
    precision: str
    files: dict[str, int]
    links: int
    dense_bytes: int
    opset: int | None = None
    seconds: float | None = None
    size_note: str = ""
    dynamic: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    agreement: Agreement | NotCompared | None = None
    quantisation: RoundedGraph | None = None
    cached: CachedGraphs | None = None
    tensorrt_rtx: dict[str, CompiledGraph] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportFile:
    """`export.json`."""

    files: tuple[ExportedGraph, ...]


@dataclass(frozen=True)
class SpeedUp:
    """The time of one arm over that of another, with its 95 % interval."""

    speedup: float
    low: float
    high: float


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


FILES: dict[str, str] = {"verify": "verify", "evaluate": "evaluate", "export": "export", "bench": "bench",
                         "engines": "build", "torch": "export --torch", "bench-gpu": "bench --device cuda"}
"""Stage files that a verb writes again."""


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
            raise UsageError(f"The run '{run.path}' is not pruned yet.",
                             "nmsparse-deploy prune with the same options resumes it")
        return cls(run.path, manifest, read_stage(run, "plan.json", PlanStage), layers,
                   read_stage(run, "verify.json", VerifyFile), read_stage(run, "evaluate.json", EvaluateFile),
                   read_stage(run, "export.json", ExportFile), read_stage(run, "bench.json", BenchFile))


def read_stage(run: RunDir, name: str, kind: type[T]) -> T | None:
    """Read a stage file into its type; None where there is none. Raises `UsageError` when it is damaged."""
    if not (run / name).is_file():
        return None
    try:
        return TypeAdapter(kind).validate_python(clean(run.read_json(name), numbers=False))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        stage = Path(name).stem
        raise UsageError(f"'{run / name}' is damaged: {where or 'the whole file'}: {first['msg']}.",
                         f"nmsparse-deploy {FILES[stage]} writes it again" if stage in FILES else
                         "nmsparse-deploy prune --force starts over") from error
