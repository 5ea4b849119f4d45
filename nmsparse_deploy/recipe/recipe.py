"""A recipe: everything that decides a result, validated before anything is loaded, frozen, and
fingerprinted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.recipe.prune import Prune
from nmsparse_deploy.recipe.section import Frozen
from nmsparse_deploy.recipe.stages import Bench, Build, Evaluate, Export, Published

DEFAULT_MODEL = "demo"
M = TypeVar("M", bound=BaseModel)


class Recipe(Frozen):
    """One model through every stage."""

    model: str = DEFAULT_MODEL
    prune: Prune = Prune()
    export: Export | None = Export()
    build: Build | None = None
    evaluate: Evaluate | None = Evaluate()
    bench: Bench | None = Bench()
    config: dict[str, Any] | None = Field(
        None,
        description="the model's config.json as far as it decides shapes; "
        "--dry-run prices from it, nothing else reads it",
    )
    published: tuple[Published, ...] = Field(
        (), description="what others measured with this model and method"
    )

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read a YAML recipe. Raises `UsageError` naming the field that is wrong."""
        if not path.is_file():
            raise UsageError(f"There is no recipe '{path}'.")
        try:
            data = yaml.safe_load(path.read_text()) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(
                f"'{path}' is not valid YAML: {' '.join(str(error).split())}."
            ) from error
        if not isinstance(data, dict):
            raise UsageError(f"'{path}' is not a recipe: expected a mapping at the top.")
        recipe: Recipe = validate(cls, data)
        return recipe


def validate(
    model: type[M], data: dict[str, Any], options: Mapping[str, str] = MappingProxyType({})
) -> M:
    """Build a recipe model from plain data; the first problem becomes one `UsageError` sentence.

    `options` are those of the command line by field; the sentence names the option where there is
    one.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "recipe"
        named = [options[str(part)] for part in first["loc"] if str(part) in options]
        field = f"{named[-1]} ({field})" if named else field
        raise UsageError(f"{field}: {first['msg']} (got {first['input']!r}).") from error


LATER = (
    ("through", 0),
    ("shard", False),
    ("moments", 32),
    ("labels", False),
    ("augment", None),
    ("prior_samples", 0),
)
"""Settings of steps and of learning that came later than runs, with the values that ask for nothing
new."""


def fingerprint(model: str, prune: Prune) -> str:
    """Return the identity of a prune stage: 16 hex digits over everything that can change its
    result.

    Fields that ask for nothing are left out, so that a new option does not make every older run
    another one.
    """
    asked = {
        name: value
        for name, value in prune.model_dump(mode="json").items()
        if value not in ([], None, False)
    }
    if prune.refine:
        asked["refine"] = [
            {name: value for name, value in step.items() if (name, value) not in LATER}
            for step in asked["refine"]
        ]
    if prune.learn:
        asked["learn"] = {
            name: value for name, value in asked["learn"].items() if (name, value) not in LATER
        }
    canonical = json.dumps({"model": model, **asked}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted names of the fields in which two recipes differ, with both values."""
    differing: list[str] = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            differing += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            differing.append(f"{prefix}{name} ({a!r} there, {b!r} now)")
    return differing
