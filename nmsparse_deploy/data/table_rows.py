"""Rows of a data set from a local file: parquet, JSON, JSON lines (plain or gzipped), or plain text,
a row a line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmsparse_deploy.errors import MissingExtra, UsageError

PARQUET = (".parquet",)
LINES = (".jsonl", ".jsonl.gz", ".json.gz")
LIST = (".json",)
"""One list of rows, or JSON lines."""
TABLES = (*PARQUET, *LINES, *LIST)
"""How files end that hold rows with fields; any other file is plain text."""


@dataclass(frozen=True)
class Row:
    """Fields of one row that were asked for, and the names of all that it has."""

    position: str
    """`Line 3`."""
    file: str
    names: tuple[str, ...]
    values: Mapping[str, object]

    @property
    def place(self) -> str:
        """Begin a sentence about the row."""
        return f"{self.position} of '{self.file}'"

    def text(self, field: str) -> str:
        """Return a field that holds text. Raises `UsageError` where it is missing or holds
        something else."""
        if field not in self.names:
            raise UsageError(
                f"{self.place} has no field '{field}'; it has {self.fields()}.",
                f"write {self.file.partition('#')[0]}#FIELD",
            )
        value = self.values[field]
        if not isinstance(value, str):
            raise UsageError(
                f"{self.place} holds {type(value).__name__} in '{field}', where text is wanted."
            )
        return value

    def fields(self) -> str:
        """List the names of the fields, for a sentence."""
        return ", ".join(self.names) or "none"


def is_table(path: Path) -> bool:
    """Tell a file of rows with fields by how its name ends."""
    return path.name.lower().endswith(TABLES)


def read_plain(path: Path) -> str:
    """Read a plain file as one text: UTF-8, or Latin-1 where it is no UTF-8."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError:
        return data.decode("latin-1").strip()


def read_rows(path: Path, field: str = "text") -> Iterator[str]:
    """Yield one field of every row, in order; of plain text the lines, each with its end.

    Raises `UsageError` for a file that is damaged or lacks the field, `MissingExtra` for parquet
    without pyarrow.
    """
    if is_table(path):
        yield from (row.text(field) for row in read_table(path, (field,)))
    else:
        with open(path, encoding="utf-8", errors="replace") as file:
            yield from file


def read_table(path: Path, fields: Collection[str]) -> Iterator[Row]:
    """Yield the rows of a table with those of `fields` that they have; raises as `read_rows`
    does."""
    name = path.name.lower()
    try:
        if name.endswith(PARQUET):
            yield from _parquet(path, fields)
        else:
            rows = _json(path) if name.endswith(LIST) else None
            yield from _json_lines(path) if rows is None else rows
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise UsageError(f"'{path}' is damaged or truncated: {error}.") from error


def _parquet(path: Path, fields: Collection[str]) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtra("pyarrow", "eval", f"Reading '{path}'") from error
    try:
        file = parquet.ParquetFile(path)
        names = tuple(file.schema_arrow.names)
        number = 0
        for batch in file.iter_batches(columns=[name for name in names if name in fields]):
            for values in batch.to_pylist():
                number += 1
                yield Row(f"Row {number}", str(path), names, values)
    except pyarrow.ArrowException as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise UsageError(f"'{path}' is not a readable parquet file: {reason}.") from error


def _json(path: Path) -> list[Row] | None:
    """Return the rows of a file that is one list of them, or one row; None for a row a line."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise UsageError(f"'{path}' is not JSON: {error}.") from error
        return None
    rows = content if isinstance(content, list) else [content]
    return [_row(f"Row {number}", path, row) for number, row in enumerate(rows, start=1)]


def _json_lines(path: Path) -> Iterator[Row]:
    unpack: Any = gzip.open if path.suffix.lower() == ".gz" else open
    with unpack(path, "rt", encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"Line {number} of '{path}' is not JSON: {error}.") from error
            yield _row(f"Line {number}", path, row)


def _row(position: str, path: Path, row: object) -> Row:
    if not isinstance(row, dict):
        raise UsageError(
            f"{position} of '{path}' is no row with fields: it is of type {type(row).__name__}."
        )
    return Row(position, str(path), tuple(row), row)
