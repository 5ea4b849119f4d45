"""Pairs of sentences or words with human ratings of their similarity."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nmsparse_deploy.data.packaged import corpus_folder, development_file, development_path
from nmsparse_deploy.errors import UsageError

WORDS = "word-pairs"
STSB = "stsb"
_STSB_FILE = "stsb/sts-test.csv"


@dataclass(frozen=True)
class Pairs:
    """`rated[i]` is (text, text, rating)."""

    name: str
    rated: tuple[tuple[str, str, float], ...]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self.rated).encode()).hexdigest()[:16]


def load_pairs(source: str) -> list[Pairs]:
    """Read a file, `word-pairs` (two packaged lists), `stsb` (development data), or `auto` (what is
    here).

    A file has one pair a line, tab-separated: text, text, rating. Raises `UsageError`.
    """
    if source == "auto":
        return [*(load_pairs(STSB) if development_path(_STSB_FILE) else []), *load_pairs(WORDS)]
    if (folder := corpus_folder(source, "ratings")) is not None:
        return [_file(path, path.stem) for path in sorted(folder.rglob("*.t*")) if path.is_file()]
    if source == STSB:
        path = development_file(STSB, _STSB_FILE, f"use {WORDS}, or give a file of pairs")
        lines = (row for row in _rows(path) if len(row) >= 7)
        return [_pairs("stsb-test", path, ((row[5], row[6], row[4]) for row in lines))]
    if not Path(source).is_file():
        named = ", ".join((WORDS, STSB))
        raise UsageError(
            f"There are no rated pairs '{source}': no file has this name, and it is none of {named}."
        )
    return [_file(Path(source), Path(source).stem)]


def _file(path: Path, name: str) -> Pairs:
    rows = [row for row in _rows(path) if len(row) >= 3 and not row[0].startswith("#")]
    return _pairs(name, path, ((row[0], row[1], row[2]) for row in rows))


def _rows(path: Path) -> list[list[str]]:
    try:
        return list(
            csv.reader(path.read_text("utf-8").splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
        )
    except UnicodeDecodeError as error:
        raise UsageError(f"'{path}' is not UTF-8 text.") from error


def _pairs(name: str, path: Path, rows: Iterable[tuple[str, str, str]]) -> Pairs:
    rated = []
    for number, (first, second, rating) in enumerate(rows):
        try:
            rated.append((first.strip(), second.strip(), float(rating)))
        except ValueError:
            if number:  # the first line may be a heading
                raise UsageError(f"'{path}': '{rating[:40]}' is not a rating.") from None
    if len(rated) < 3:
        raise UsageError(f"'{path}' holds no rated pairs (text, text, rating, tab-separated).")
    return Pairs(name, tuple(rated))
