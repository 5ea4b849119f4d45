"""A plan on disk: YAML or JSON, whose `patterns` a recipe takes over as they are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.find.facts import Json
from nmsparse_deploy.models import absolute, files
from nmsparse_deploy.runs.inputs import hashes
from nmsparse_deploy.runs.manifest import InputsRecord
from nmsparse_deploy.runs.wording import first_names

SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True)
class PlanFile:
    """The part of a plan that pruning needs; the rest of the file is for readers."""

    model: str
    pattern: str
    patterns: dict[str, str]
    weights: dict[str, str]
    """SHA-256 of the model's files; empty where the plan does not say."""

    def check_model(self, model: str, path: Path) -> None:
        """Raise `UsageError` when `model` is the one of this plan, which is at `path`, and its
        files have changed since."""
        if absolute(model) != self.model or not self.weights:
            return
        made_from, now = InputsRecord(model=self.weights), InputsRecord(model=hashes(files(model)))
        if changed := made_from.changes(now):
            raise UsageError(
                f"The plan '{path}' was made from other inputs; changed since: "
                f"{first_names(changed, 3)}.",
                "nmsparse-deploy plan makes it again",
            )


def check_name(path: Path) -> None:
    """Raise `UsageError` for a name that says no format."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"'{path}' is neither YAML nor JSON.", "end its name in .yaml or .json")


def save(plan: Json, path: Path) -> None:
    """Write what `Allocation.to_json` gave; appears by rename."""
    check_name(path)
    json_wanted = path.suffix == ".json"
    text = (
        json.dumps(plan, indent=1) + "\n"
        if json_wanted
        else yaml.safe_dump(plan, sort_keys=False, width=120)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> PlanFile:
    """Read a plan. Its patterns are checked where they are used. Raises `UsageError`."""
    if not path.is_file():
        raise UsageError(
            f"There is no plan '{path}'.", "nmsparse-deploy plan --out FILE writes one"
        )
    check_name(path)
    try:
        data = (
            json.loads(path.read_text())
            if path.suffix == ".json"
            else yaml.safe_load(path.read_text())
        )
        patterns = {str(name): str(text) for name, text in data["patterns"].items()}
        weights = dict((data.get("inputs") or {}).get("model") or {})
        return PlanFile(str(data["model"]), str(data["pattern"]), patterns, weights)
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = " ".join(f"{type(error).__name__} {error}".split())
        raise UsageError(
            f"'{path}' is not a plan: {what}.", "nmsparse-deploy plan --out FILE writes one"
        ) from error
