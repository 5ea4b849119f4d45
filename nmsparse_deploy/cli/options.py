"""Options of a verb, made from fields of the recipe or from parameters; what was typed, as sections
of a recipe again.

Name, default, help, bounds and choices of a field's option are those of the field. Pydantic, which
checks the values, is imported when a verb is asked for and not before.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel

S = TypeVar("S", bound="BaseModel")

NAMES = {
    "options": "option",
    "precisions": "precision",
    "protocols": "protocol",
    "shapes": "shape",
    "tasks": "task",
}
"""Options that are not called as their field is: each takes one value, and may be repeated."""
METAVARS = {"options": "NAME=VALUE", "refine": "NAME", "shapes": "INPUT=1x3x224x224"}
"""How a value is typed that is a section or a mapping in a recipe."""
PLAIN = (str, bool, int, float, Path)
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True)
class Fields:
    """Fields of a section of the recipe that a verb has options for: `method calibration.samples`.

    `note` stands before the help of each.
    """

    section: str
    paths: str
    note: str = ""

    @property
    def model(self) -> type[BaseModel]:
        return getattr(import_module("nmsparse_deploy.recipe"), self.section)


class Asked:
    """What was typed, by section of the recipe. What was left out is not there, so that the
    recipe's defaults hold."""

    def __init__(self, groups: Iterable[Fields], typed: Mapping[str, Any]) -> None:
        self.sections: dict[str, dict[str, Any]] = {group.section: {} for group in groups}
        self.flags: dict[str, str] = {}
        for group in groups:
            section, defaults = self.sections[group.section], group.model.model_fields
            for path in group.paths.split():
                head, _, deeper = path.partition(".")
                name = _name(path)
                self.flags[deeper or head] = _flag(name)
                if name in typed and deeper:
                    start = defaults[head].default
                    section.setdefault(head, start.model_dump() if start else {})[deeper] = typed[
                        name
                    ]
                elif name in typed:
                    section[head] = (
                        [{"name": step} for step in typed[name]]
                        if head == "refine"
                        else typed[name]
                    )

    def read(self, section: type[S], **more: Any) -> S:
        """Return the section, validated, with `more` of its fields. Raises `UsageError` that names
        the option."""
        from nmsparse_deploy.recipe import validate

        return validate(section, {**self.sections[section.__name__], **more}, self.flags)


def parameter(
    name: str, annotation: Any, default: Any, text: str, positional: bool = False, metavar: str = ""
) -> inspect.Parameter:
    """Return the parameter from which Typer makes an option (a flag, a value, a choice, or several)
    or an argument."""
    parts = _parts(annotation)
    choices = [part for part in parts if isinstance(part, (str, int))]
    kind: Any = type(choices[0]) if choices else next((p for p in parts if p in PLAIN), str)
    shown = f"<{metavar or '|'.join(map(str, choices)) or kind.__name__.lower()}>"
    flag = [_flag(name)] if kind is bool and not default else []  # without a --no-
    if any(get_origin(part) in (tuple, dict) for part in (annotation, *get_args(annotation))):
        kind, default = list[kind], default if positional else list(default)
        text = text if positional else f"{text}; may be repeated"
    made = (
        typer.Argument(help=text) if positional else typer.Option(*flag, help=text, metavar=shown)
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, made]
    )


def field_option(group: Fields, path: str) -> inspect.Parameter:
    """Return the parameter of a field's option."""
    head, _, deeper = path.partition(".")
    field = group.model.model_fields[head]
    default = field.default
    if deeper:
        inner = next(
            part for part in _parts(field.annotation) if deeper in getattr(part, "model_fields", {})
        )
        field = inner.model_fields[deeper]
        default = field.default if default is None else getattr(default, deeper)
    bounds = [
        f"{word} {limit:g}"
        for rule in field.metadata
        for name, word in BOUNDS.items()
        if (limit := getattr(rule, name, None)) is not None
    ]
    text = group.note + "; ".join([str(field.description), *bounds])
    return parameter(_name(path), field.annotation, default, text, metavar=METAVARS.get(path, ""))


def _parts(annotation: Any) -> list[Any]:
    """Return the plain types and the literal values that an annotation is made of."""
    return [leaf for part in get_args(annotation) for leaf in _parts(part)] or [annotation]


def _name(path: str) -> str:
    leaf = path.rpartition(".")[2]
    return NAMES.get(leaf, leaf)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
