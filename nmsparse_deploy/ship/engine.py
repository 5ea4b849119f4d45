"""What a runtime has to answer, and what it may answer besides.

A runtime is a class that derives from `Engine` and a line in the registry `ENGINES`. It has to
build, inspect and run; what can be derived from that, a subclass overrides where it knows better.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import torch
from pydantic import JsonValue

from nmsparse_deploy.errors import CheckFailed, UsageError
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.prove import VerifyReport
from nmsparse_deploy.prove.agreement import Agreement, NotCompared, compared
from nmsparse_deploy.recipe import Build, Frozen, validate
from nmsparse_deploy.runs.load import load_pruned
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.runs.section import Block, Facts, Paragraph, Section
from nmsparse_deploy.runs.stage_file import read_stage
from nmsparse_deploy.runs.wording import facts, megabytes, quantity
from nmsparse_deploy.ship.evidence import EngineEvidence
from nmsparse_deploy.ship.model_agreement import compare_with_model
from nmsparse_deploy.ship.onnx.link import LinkMap, verify_linked
from nmsparse_deploy.system.environment import environment
from nmsparse_deploy.system.progress import Progress

Tensor = torch.Tensor | np.ndarray
Recorded = dict[str, JsonValue]
"""Facts of which only the writer knows the names."""
RECORD = "engines.json"
EVERY_ENGINE = {"engine", "precision", "batch", "length", "options"}
"""Fields of `Build` that say what is built; all others are options of a runtime."""


class EngineSettings(Frozen):
    """Options of a runtime; a subclass lists them with their defaults and what they mean."""


S = TypeVar("S", bound=EngineSettings)


@dataclass(frozen=True)
class Inspection:
    """A runtime's statement about itself."""

    engine: str
    version: str
    sparse_kernels: bool | None
    """None: nobody here sees whether one was chosen."""
    reason: str
    """Why sparse kernels run, do not run, or cannot be seen; a clause."""
    facts: Recorded = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Return what may be said about sparse kernels, in one sentence."""
        known = {
            True: "Sparse kernels run",
            False: "No sparse kernel runs",
            None: "Sparse kernels were not seen",
        }
        return f"{known[self.sparse_kernels]}: {self.reason}."

    def to_json(self) -> Recorded:
        return {**asdict(self), "verdict": self.verdict}


@dataclass(frozen=True)
class BuiltEngine:
    """A row of `engines.json`: one engine, what it was built from, and what is known of it."""

    engine: str
    """Its runtime, as the registry calls it."""
    name: str
    path: str
    onnx: str
    """What it was built from."""
    bytes: int
    settings: Recorded
    environment: Mapping[str, object]
    seconds: float
    evidence: EngineEvidence | Inspection
    statistics: dict[str, int] = field(default_factory=dict)
    """What the runtime tells about sizes, in bytes."""
    agreement: Agreement | NotCompared | None = None

    @property
    def key(self) -> tuple[str, str]:
        """Return what tells it from the other engines of a run."""
        return self.engine, self.path

    @property
    def line(self) -> str:
        """Return the engine in one line for the terminal."""
        return f"{self.path}: {self.bytes / 1e6:.0f} MB, built in {self.seconds:.0f} s. {self.evidence.verdict}"

    def to_json(self) -> Recorded:
        return {**asdict(self), "evidence": self.evidence.to_json()}


@dataclass(frozen=True)
class EngineFile:
    """`engines.json`."""

    engines: tuple[BuiltEngine, ...]


class Case(NamedTuple):
    """An arm of a benchmark before it is built."""

    artefact: Path
    settings: Mapping[str, Any] = {}


class Engine(Protocol):
    """A runtime that executes an artefact; an instance is one that is ready to run."""

    name: ClassVar[str]
    """As the registry calls it."""
    title: ClassVar[str]
    """As sentences call it."""
    label: ClassVar[str]
    """As arms of a benchmark call it."""
    settings_type: ClassVar[type[EngineSettings]] = EngineSettings
    exported_by: ClassVar[str] = "export"
    """The command that writes what it runs."""
    twins: ClassVar[Mapping[str, str]] = {}
    """Arms of a benchmark -> the arm that differs in sparse weights alone."""

    @classmethod
    def build(cls, artefact: Path, settings: Mapping[str, Any] | None = None) -> Self:
        """Make `artefact` ready to run. Raises `UsageError` for a setting it does not know."""
        ...

    def inspect(self) -> Inspection:
        """Return evidence of what really runs: versions, providers, whether sparse kernels can be
        chosen."""
        ...

    def run(self, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Return outputs by name. bf16 outputs come back as float32."""
        ...

    def bound(self, batch: Mapping[str, Tensor]) -> Callable[[], object]:
        """Return a call that runs `batch` and waits until all is done. It has run once already."""
        self.run(batch)
        return lambda: self.run(batch)

    @classmethod
    def artefacts(cls, run: RunDir) -> dict[str, Path]:
        """Return what it can run of a run, by precision: here its exported graphs."""
        return {path.parent.name: path for path in run.graphs(whole=True)}

    @classmethod
    def verify(cls, artefact: Path, masks: MaskSet, progress: Progress) -> VerifyReport:
        """Check an artefact against the masks of its run."""
        link = LinkMap.load(artefact.with_suffix(".link.json"))
        return verify_linked(artefact, masks, link, progress)

    @classmethod
    def arms(cls, run: RunDir) -> dict[str, dict[str, Case]]:
        """Return what a benchmark on a GPU compares: by workload and arm an artefact and the
        settings to build it."""
        return {
            f"{cls.label} {name}": {cls.name: Case(path)}
            for name, path in cls.artefacts(run).items()
        }

    @classmethod
    def deploy(cls, run: RunDir, spec: Build, progress: Progress) -> Sequence[BuiltEngine]:
        """Build what `spec` asks for from a run: here one engine, verified before and compared with
        the model after.

        Raises `UsageError` when there is nothing to build from, `CheckFailed` when it does not hold
        the masks.
        """
        artefact = cls.artefacts(run).get(spec.precision)
        if artefact is None:
            raise UsageError(
                f"The run '{run.path}' holds nothing in {spec.precision} that {cls.title} runs.",
                f"nmsparse-deploy {cls.exported_by} {run.path} --precision {spec.precision}",
            )
        settings = _asked(cls, spec)
        report = cls.verify(artefact, MaskSet.load(run / "masks.safetensors"), progress)
        if not report.ok:
            raise CheckFailed(
                f"'{artefact}' fails verification, so nothing is built from it: {report.summary()}"
            )
        progress(f"building with {cls.title}", 0, 0)
        start = time.perf_counter()
        engine = cls.build(artefact, settings)
        seconds = round(time.perf_counter() - start, 1)
        progress(f"comparing {cls.title} with the model", 0, 0)
        same = compare_with_model(load_pruned(run), engine.run, spec.batch, spec.length)
        path = str(artefact.relative_to(run.path))
        return [
            BuiltEngine(
                cls.name,
                cls.name,
                path,
                path,
                _size(artefact),
                settings,
                environment(),
                seconds,
                engine.inspect(),
                agreement=same,
            )
        ]

    @classmethod
    def section(cls, row: BuiltEngine) -> Section:
        """Return what a report shows of one engine."""
        about: dict[str, object] = dict(row.settings)
        if isinstance(row.evidence, Inspection):
            about = {"version": row.evidence.version, **about, **row.evidence.facts}
        same = f" {cls.title} and the model: {compared(row.agreement)}." if row.agreement else ""
        blocks: tuple[Block, ...] = (
            Paragraph(row.evidence.verdict, "callout"),
            Paragraph(
                f"{megabytes(row.bytes)}, ready in {quantity(row.seconds, 's')}.{same}", "soft"
            ),
            Facts(facts(about)),
        )
        return Section(f"{cls.title}: {row.path}", blocks)


def settings_of(engine: type[Engine], kind: type[S], given: Mapping[str, Any] | None) -> S:
    """Read the settings of a runtime. Raises `UsageError` for one that it does not have or cannot
    take."""
    unknown = set(given or {}) - set(kind.model_fields)
    if unknown:
        has = ", ".join(kind.model_fields) or "none"
        raise UsageError(f"{engine.title} has no setting '{min(unknown)}'; it has {has}.")
    settings: S = validate(kind, dict(given or {}))
    return settings


def built_engines(run: RunDir) -> tuple[BuiltEngine, ...]:
    """Return the engines of a run. Raises `UsageError` when their record is damaged."""
    held = read_stage(run, RECORD, EngineFile)
    return held.engines if held else ()


def _asked(engine: type[Engine], spec: Build) -> Recorded:
    """Return the settings in `spec`. Raises `UsageError` for an option of other runtimes."""
    plain = Build()
    own = {
        name: getattr(spec, name)
        for name in engine.settings_type.model_fields
        if name in Build.model_fields
    }
    asked = {name for name in Build.model_fields if getattr(spec, name) != getattr(plain, name)}
    others = {name: getattr(spec, name) for name in asked - EVERY_ENGINE - set(own)}
    return settings_of(engine, engine.settings_type, {**own, **others, **spec.options}).model_dump(
        mode="json"
    )


def _size(artefact: Path) -> int:
    files = artefact.rglob("*") if artefact.is_dir() else artefact.parent.glob(f"{artefact.name}*")
    return sum(file.stat().st_size for file in files if file.is_file())
