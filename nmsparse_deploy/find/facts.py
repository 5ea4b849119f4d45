"""Reports of refinements and learned methods, as they stand in `refinements.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Json = dict[str, Any]
"""An object of a JSON file."""


class RefinementFacts(Protocol):
    """A report; each refinement has its own."""

    def to_json(self) -> Json: ...


@dataclass(frozen=True)
class RefinementRecord:
    """One refinement of one block, or of the whole model (None): a row of `refinements.json`."""

    block: int | None
    name: str
    facts: Json
    """What `RefinementFacts.to_json` gave."""

    def to_json(self) -> Json:
        return {"block": self.block, "name": self.name, **self.facts}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> RefinementRecord:
        return cls(
            row["block"],
            row["name"],
            {key: row[key] for key in row if key not in ("block", "name")},
        )
