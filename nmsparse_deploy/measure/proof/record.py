"""The file of a proof: what ran on which card, part by part. `results/gpu/` takes nothing that does
not fit it."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from nmsparse_deploy.errors import CheckFailed, UsageError
from nmsparse_deploy.runs.run_dir import RunDir

State = Literal["done", "failed", "stopped at its limit", "no time left"]


class Record(BaseModel):
    """Part of the file: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")


class PartRecord(Record):
    """One part: how it ended and what it wrote until then."""

    state: State
    reason: str | None = None
    seconds: float = Field(ge=0)
    data: dict[str, JsonValue] | None = None
    output: str | None = Field(
        None, description="the end of what it printed, where it did not finish"
    )


class ProofRecord(Record):
    """A whole proof."""

    format: Literal["nmsparse-proof-1"] = "nmsparse-proof-1"
    command: str
    dry: bool = Field(
        description="walked on a processor with stand-in kernels: nothing in it is a measurement"
    )
    gpu: str = Field(min_length=1)
    machine: dict[str, JsonValue] = Field(
        description="versions, driver, libraries, clocks and power before the start"
    )
    started: datetime
    finished: datetime | None = None
    parts: dict[str, PartRecord] = {}

    @model_validator(mode="after")
    def _names_its_machine(self) -> ProofRecord:
        missing = [name for name in ("versions", "libraries", "state") if name not in self.machine]
        if missing:
            raise ValueError(f"the machine has no {missing[0]}")
        return self

    @property
    def complete(self) -> bool:
        """Did every part finish?"""
        return all(part.state == "done" for part in self.parts.values())

    def save(self, path: Path) -> None:
        """Write the file by rename."""
        with RunDir(path.parent).replacing(path.name) as temporary:
            temporary.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> ProofRecord:
        """Read and check a file. Raises `UsageError` when it is not there, `CheckFailed` when it
        does not fit."""
        if not path.is_file():
            raise UsageError(f"There is no file '{path}'.")
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "the file"
            raise CheckFailed(
                f"'{path}' is no record of a proof: {field}: {first['msg']}."
            ) from error
