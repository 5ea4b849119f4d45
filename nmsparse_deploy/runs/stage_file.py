"""Stage files as types: what a stage wrote, whoever shows it reads back. A damaged file is a
sentence."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.runs.wording import clean

FILES: dict[str, str] = {
    "verify": "verify",
    "evaluate": "evaluate",
    "export": "export",
    "bench": "bench",
    "engines": "build",
    "torch": "export --torch",
    "bench-gpu": "bench --device cuda",
}
"""Stage files that a verb writes again."""
T = TypeVar("T")


def read_stage(run: RunDir, name: str, kind: type[T]) -> T | None:
    """Read a stage file into its type; None where there is none. Raises `UsageError` when it is
    damaged."""
    return read_as(run, name, kind, run.read_json(name)) if (run / name).is_file() else None


def read_as(run: RunDir, name: str, kind: type[T], data: object) -> T:
    """Read `data`, which the file `name` holds, into a type. Raises `UsageError` when it does not
    fit."""
    try:
        return TypeAdapter(kind).validate_python(clean(data, numbers=False))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        stage = Path(name).stem
        raise UsageError(
            f"'{run / name}' is damaged: {where or 'the whole file'}: {first['msg']}.",
            f"nmsparse-deploy {FILES[stage]} writes it again"
            if stage in FILES
            else "nmsparse-deploy prune --force starts over",
        ) from error
