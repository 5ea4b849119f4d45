"""Corpora that a package carries, and the development data that none does: for demonstration and
for measurements."""

from __future__ import annotations

import os
from pathlib import Path

from nmsparse_deploy.data.packaged.deb import DEB
from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.system.assets import WHEEL, assets, fetch

VARIABLE = "NMSPARSE_DATA"
"""Names the folder of the development data."""


def corpora(kind: str) -> list[str]:
    """List the packaged corpora of one kind: `text`, `images` or `ratings`."""
    return [key for key, asset in assets().items() if asset.kind == kind]


def corpus_folder(source: str, kind: str) -> Path | None:
    """Return the folder of a packaged corpus, downloaded on first use; None for any other name."""
    if source not in corpora(kind):
        return None
    return fetch(source, DEB if assets()[source].source == "debian" else WHEEL)


def development_path(name: str) -> Path | None:
    """Return a file of the development data, if it is here."""
    path = Path(os.environ.get(VARIABLE) or "-") / name
    return path if path.is_file() else None


def development_file(source: str, name: str, instead: str) -> Path:
    """Return a file of the development data. Raises `UsageError`, with what to use `instead`, when
    it is not here."""
    path = development_path(name)
    if path is None:
        raise UsageError(
            f"'{source}' is not in any package, and {VARIABLE} names no folder that holds {name}.",
            instead,
        )
    return path
