"""Text of the `datasets` library, streamed: `datasets:NAME[/CONFIG][@SPLIT][#FIELD]`, or a local
folder for NAME.

`datasets:Salesforce/wikitext/wikitext-2-raw-v1@train#text` reads the field `text` of the split
`train`. Only as many documents are fetched as `CHARACTERS` needs, always the first ones, so that
the sample is the same on every machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nmsparse_deploy.data.chat import Document, document
from nmsparse_deploy.data.table_rows import Row
from nmsparse_deploy.errors import MissingExtra, NmsparseError, UsageError, first_line

CHARACTERS = 8_000_000
"""About two million tokens: plenty for calibration, and read in a minute."""
_SPEC = re.compile(r"datasets:(?P<name>[^@#]+)(?:@(?P<split>[^#]+))?(?:#(?P<field>.+))?")


def streamed(source: str, tokenizer: Any = None) -> list[Document]:
    """Read the first documents of a data set; chats as the template of `tokenizer` writes them.

    Raises `UsageError` for a wrong spec, `NmsparseError` for what cannot be had.
    """
    match = _SPEC.fullmatch(source)
    if match is None:
        raise UsageError(f"'{source}' is not datasets:NAME[/CONFIG][@SPLIT][#FIELD].")
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "eval", f"Reading '{source}'") from error
    name, config = _name(match["name"])
    split, field = match["split"] or "train", match["field"]
    documents: list[Document] = []
    size = 0
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for number, values in enumerate(rows, start=1):
            row = Row(f"Row {number}", source, tuple(values), values)
            documents.append(document(row, field, tokenizer))
            size += len(documents[-1].text)
            if size >= CHARACTERS:
                break
    except NmsparseError:
        raise
    except Exception as error:
        raise NmsparseError(
            f"'{source}' could not be read: {first_line(error)}.",
            "give a text file or a folder instead",
        ) from error
    if not any(each.text.strip() for each in documents):
        raise UsageError(f"The text '{source}' is empty.")
    return documents


def _name(text: str) -> tuple[str, str | None]:
    """Split a local folder, OWNER/NAME, or OWNER/NAME/CONFIG."""
    if Path(text).exists():
        return text, None
    parts = text.split("/")
    return ("/".join(parts[:2]), "/".join(parts[2:])) if len(parts) > 2 else (text, None)


def hub_rows(
    name: str,
    config: str | None,
    split: str,
    field: str,
    revision: str | None,
    file: str | None,
    instead: str,
) -> Iterator[str]:
    """Yield one field of every row of a hub data set, in order; `file` picks one file of it.

    Raises `MissingExtra` without the library, `NmsparseError` when the set is neither cached nor
    reachable; `instead` says what else would do.
    """
    what = f"{name}{f'/{config}' if config else ''}@{split}"
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "eval", f"Reading '{what}'") from error
    files = {"data_files": {split: file}} if file else {}
    try:
        rows = datasets.load_dataset(name, config, split=split, revision=revision, **files)
    except Exception as error:
        raise NmsparseError(
            f"The data set '{what}' is not on this machine and the hub did not give it: "
            f"{first_line(error)}.",
            instead,
        ) from error
    for number, values in enumerate(rows, start=1):
        yield Row(f"Row {number}", what, tuple(values), values).text(field)
