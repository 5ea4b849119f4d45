"""Rows of a data set from a local file: parquet, JSON lines (plain or gzipped), or plain text, a
row a line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nmsparse_deploy.errors import MissingExtra, UsageError

PARQUET = (".parquet",)
LINES = (".jsonl", ".jsonl.gz", ".json.gz")
TABLES = (*PARQUET, *LINES)
"""How files end that hold rows with fields; any other file is plain text."""


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
    try:
        if path.name.lower().endswith(PARQUET):
            yield from _parquet(path, field)
        elif is_table(path):
            yield from _json_lines(path, field)
        else:
            with open(path, encoding="utf-8", errors="replace") as file:
                yield from file
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise UsageError(f"'{path}' is damaged or truncated: {error}.") from error


def _parquet(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtra("pyarrow", "eval", f"Reading '{path}'") from error
    try:
        file = parquet.ParquetFile(path)
        _check_field(path, field, file.schema_arrow.names)
        for batch in file.iter_batches(columns=[field]):
            yield from (_text(path, value) for value in batch.column(0).to_pylist())
    except pyarrow.ArrowException as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise UsageError(f"'{path}' is not a readable parquet file: {reason}.") from error


def _json_lines(path: Path, field: str) -> Iterator[str]:
    unpack: Any = gzip.open if path.suffix == ".gz" else open
    with unpack(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UsageError(f"Line {number} of '{path}' is not JSON: {error}.") from error
            if not isinstance(row, dict):
                raise UsageError(f"Line {number} of '{path}' is no row with fields.")
            _check_field(path, field, list(row))
            yield _text(path, row[field])


def _check_field(path: Path, field: str, names: list[str]) -> None:
    if field not in names:
        raise UsageError(
            f"'{path}' has no field '{field}'; it has {', '.join(map(str, names)) or 'none'}.",
            f"write {path}#FIELD",
        )


def _text(path: Path, value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError(f"A row of '{path}' holds {type(value).__name__} where text is wanted.")
    return value
