"""The manifest of a run: recipe, fingerprint, versions, hardware, and what every finished stage
wrote down.

It is read once into types, and written back with every key that was there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.recipe import Calibration, Prune, validate
from nmsparse_deploy.system.environment import Hardware, environment, now

FORMAT = 1
Json = dict[str, JsonValue]


class Recorded(BaseModel):
    """A part of the manifest. Unknown keys are kept, and keys that were not given are not
    written."""

    model_config = ConfigDict(frozen=True, extra="allow", ser_json_inf_nan="constants")

    def to_json(self) -> Json:
        """Return the part as it is written."""
        return self.model_dump(mode="json", exclude_unset=True)


class ImportedFrom(Recorded):
    """The source of imported masks: a file, or a sparse checkpoint; neither where the model itself
    is sparse."""

    masks: str | None
    sparse: str | None


class RecipeRecord(Recorded):
    """The recipe as it was asked for, read without asking whether its methods are installed."""

    model: str
    method: str
    pattern: str
    permute: bool = False
    calibration: Calibration = Calibration()
    wbits: int | None = None
    wgroup: int | None = None
    learn: Json | None = None
    refine: tuple[Json, ...] = ()
    sequential: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    patterns: dict[str, str] | None = None
    compute: str = "auto"
    imported: ImportedFrom | None = None

    @classmethod
    def of(cls, model: str, spec: Prune) -> Self:
        """Return what is recorded of pruning `model` as `spec` says."""
        record: Self = validate(cls, {"model": model, **spec.model_dump(mode="json")})
        return record


class MemoryRecord(Recorded):
    """The memory that pruning took, in bytes, and how the model was held."""

    weights: str
    hidden_states: str
    predicted_bytes: int
    limit_bytes: int | None
    peak_bytes: int


class ExpertsRecord(Recorded):
    """Matrices of experts that too few calibration tokens reached, among all of them."""

    matrices: int
    of: int


class LearnedRecord(Recorded):
    """The outcome of learning, over all blocks or for the whole model."""

    objective: str
    prior: float
    best: float
    changed: float
    unmoved: int
    parts: int
    steps: int
    learning_seconds: float


class StageRecord(Recorded):
    """The record of a finished stage. Pruning alone has the fields from `layers` on."""

    finished: str
    seconds: float
    spec: Json | None = None
    peak_memory_mb: int | None = None
    layers: int | None = None
    negative_zeros_normalised: int | None = None
    memory: MemoryRecord | None = None
    provenance: Json | None = None
    compute: str | None = None
    calibration: Json | None = None
    experts_by_magnitude: ExpertsRecord | None = None
    learned: LearnedRecord | None = None
    inputs: dict[str, str] | None = None
    """SHA-256 of the local files that the stage read besides the run."""
    ambiguous: dict[str, int] | None = None
    """Imported masks: groups whose kept places had to be guessed, by parameter."""


class InputsRecord(Recorded):
    """What a run is made from, by content: SHA-256 by file, and of the calibration sample."""

    model: dict[str, str] = {}
    data: dict[str, str] = {}
    """Local files of calibration data, and masks that learning may start from."""
    sample: str | None = None

    def changes(self, now: InputsRecord) -> list[str]:
        """Say which inputs are others now. What is not known on one side is not compared."""
        changed = [
            change
            for before, after in ((self.model, now.model), (self.data, now.data))
            if before and after
            for change in _changed_files(before, after)
        ]
        if not changed and self.sample and now.sample and self.sample != now.sample:
            return ["the calibration sample"]
        return changed


def _changed_files(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Name the files that are others in `after`, or in one of both alone."""
    changed = [f"'{name}'" for name in before if after.get(name, before[name]) != before[name]]
    gone = [f"'{name}' (gone)" for name in before if name not in after]
    return [*changed, *gone, *(f"'{name}' (new)" for name in after if name not in before)]


class Manifest(Recorded):
    """The content of `manifest.json`."""

    format: Literal[1]
    fingerprint: str
    recipe: RecipeRecord
    created: str
    versions: dict[str, str]
    hardware: Hardware
    stages: dict[str, StageRecord]
    inputs: InputsRecord | None = None

    @classmethod
    def new(cls, recipe: RecipeRecord, fingerprint: str, inputs: InputsRecord | None) -> Self:
        """Return the manifest of a run that begins here and now."""
        return cls(
            format=FORMAT,
            fingerprint=fingerprint,
            recipe=recipe,
            created=now(),
            **environment(),
            stages={},
            **({"inputs": inputs} if inputs is not None else {}),
        )

    @classmethod
    def parse(cls, data: object, run: Path) -> Self:
        """Validate the manifest of a run folder. Raises `UsageError` when it is damaged or
        foreign."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(str(part) for part in first["loc"])
            if field == "format":
                raise UsageError(f"'{run}' was not written by this version of the tool.") from error
            raise UsageError(
                f"'{run / 'manifest.json'}' is damaged: {f'{field}: ' if field else ''}{first['msg']}."
            ) from error

    def with_stage(self, stage: str, seconds: float, facts: Mapping[str, object]) -> Self:
        """Return the manifest with a stage that has just finished."""
        written = json.loads(json.dumps({"finished": now(), "seconds": round(seconds, 1), **facts}))
        return self.model_copy(
            update={"stages": {**self.stages, stage: StageRecord.model_validate(written)}}
        )

    def spec(self, stage: str) -> Json | None:
        """Return the settings with which a stage finished; None where it has not, or has none."""
        return self.stages[stage].spec if stage in self.stages else None
