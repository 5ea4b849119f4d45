"""Text for calibration and evaluation: a file, a folder or a packaged sample, cut into windows with
identities."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nmsparse_deploy.data import chat
from nmsparse_deploy.data.packaged import corpora
from nmsparse_deploy.data.packaged.texts import packaged_documents
from nmsparse_deploy.data.table_rows import LINES, PARQUET, is_table, read_plain, read_table
from nmsparse_deploy.errors import NmsparseError, UsageError

MIX = "+"
"""`A+B` as a source: as many samples of each."""
IN_FOLDERS = (".txt", *PARQUET, *LINES)
"""How the files of a folder end that are read; a .json file among them is more often settings."""
NGRAM = 32
"""A run of this many equal tokens in two samples is the same text, not a coincidence."""


@dataclass(frozen=True)
class Text:
    """Documents in a fixed order."""

    name: str
    documents: tuple[str, ...]
    note: str = ""
    """How chats became text, if there are any."""

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(document.encode() + b"\0")
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class TokenSample:
    """Windows of `length` tokens, `ids` `[samples, length]` int64, with the window numbers they
    were cut from."""

    ids: torch.Tensor
    windows: tuple[int, ...]
    source: str
    fingerprint: str
    note: str = ""

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids}

    def record(self) -> dict[str, torch.Tensor]:
        """Return what a run keeps of the sample, to check later that an evaluation is held out."""
        return {"ids": self.ids.to(torch.int32)}

    def to_json(self) -> dict[str, object]:
        samples, length = self.ids.shape
        return {
            "source": self.source,
            "fingerprint": self.fingerprint,
            "samples": samples,
            "length": length,
            "windows": list(self.windows),
            **({"note": self.note} if self.note else {}),
        }


def load_text(source: str, tokenizer: Any = None) -> Text:
    """Read a packaged sample (`wikipedia`, `bbc`), `datasets:...`, a text file, a file of rows, or
    a folder of these.

    Rows come from parquet, a JSON list or JSON lines (also gzipped); `FILE#FIELD` names the field,
    which is `text` otherwise. Rows that hold a chat are written by the template of `tokenizer`.

    Raises `UsageError` for what is not there, of another form or empty.
    """
    path = Path(source)
    named, _, field = source.rpartition("#")
    if source.startswith("datasets:"):
        from nmsparse_deploy.data.streamed_text import streamed

        return _text(source, streamed(source, tokenizer), tokenizer)
    if (packaged := packaged_documents(source)) is not None:
        return Text(source, packaged)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.name.lower().endswith(IN_FOLDERS))
        documents = [document for file in files for document in _documents(file, None, tokenizer)]
    elif path.is_file():
        documents = _documents(path, None, tokenizer)
    elif field and Path(named).is_file():
        path, documents = Path(named), _documents(Path(named), field, tokenizer)
    else:
        named = ", ".join(corpora("text"))
        raise UsageError(
            f"There is no text '{source}': no file, folder or packaged sample ({named}) has this name."
        )
    if not any(document.text.strip() for document in documents):
        raise UsageError(f"The text '{source}' is empty.")
    return _text(path.name, documents, tokenizer)


def _documents(path: Path, field: str | None, tokenizer: Any) -> list[chat.Document]:
    """Read the rows of a table, or a plain file as one document."""
    if not is_table(path):
        return [chat.Document(read_plain(path), False)]
    fields = chat.FIELDS if field is None else (field,)
    return [chat.document(row, field, tokenizer) for row in read_table(path, fields)]


def _text(name: str, documents: Sequence[chat.Document], tokenizer: Any) -> Text:
    note = chat.note(tokenizer) if any(document.chat for document in documents) else ""
    return Text(name, tuple(document.text for document in documents), note)


def windows(text: Text, tokenizer: Any, length: int) -> torch.Tensor:
    """Join documents by blank lines and cut them into non-overlapping windows of `length` tokens;
    no BOS is added."""
    joined = "\n\n".join(text.documents)
    ids = torch.tensor(
        tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long
    )
    return ids[: len(ids) // length * length].view(-1, length)


def calibration_sample(
    text: Text, tokenizer: Any, samples: int, length: int, seed: int, at_most: bool = False
) -> TokenSample:
    """Draw `samples` distinct windows with `seed`.

    Raises `UsageError` when there are none or, unless `at_most`, too few.
    """
    cut = windows(text, tokenizer, length)
    samples = min(samples, max(len(cut), 1)) if at_most else samples
    return _choose(
        text,
        cut,
        samples,
        lambda count: (
            torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]
            .sort()
            .values
        ),
        length,
    )


def mixed(parts: Sequence[TokenSample], seed: int) -> TokenSample:
    """Mix the samples of all parts in an order that `seed` decides, so that any run of them holds
    some of each."""
    ids, windows = (
        torch.cat([part.ids for part in parts]),
        [window for part in parts for window in part.windows],
    )
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    digest = hashlib.sha256("".join(part.fingerprint for part in parts).encode()).hexdigest()[:16]
    return replace(
        parts[0],
        ids=ids[order],
        windows=tuple(windows[place] for place in order.tolist()),
        source=MIX.join(part.source for part in parts),
        note="; ".join(dict.fromkeys(part.note for part in parts if part.note)),
        fingerprint=digest,
    )


def evaluation_sample(text: Text, tokenizer: Any, tokens: int, length: int) -> TokenSample:
    """Take the same evenly spaced windows for everybody: no seed, at least `tokens` tokens."""
    samples = -(-tokens // length)
    return _choose(
        text,
        windows(text, tokenizer, length),
        samples,
        lambda count: torch.linspace(0, count - 1, samples).round().long(),
        length,
    )


def _choose(text: Text, cut: torch.Tensor, samples: int, pick: Any, length: int) -> TokenSample:
    if samples < 1:
        raise UsageError(
            "Zero calibration or evaluation tokens were asked for; at least one sample is needed."
        )
    if len(cut) < samples:
        raise UsageError(
            f"The text '{text.name}' gives {len(cut)} windows of {length} tokens, not {samples}.",
            "ask for fewer samples or shorter ones, or give more text",
        )
    chosen = pick(len(cut))
    return TokenSample(cut[chosen], tuple(chosen.tolist()), text.name, text.fingerprint, text.note)


def check_disjoint(
    calibration: torch.Tensor,
    evaluation: torch.Tensor,
    chats: Callable[[], torch.Tensor] | None = None,
) -> int:
    """Raise `NmsparseError` when calibration and evaluation share a run of `NGRAM` tokens; returns
    runs compared.

    `chats` gives all windows of the text that `evaluation` is from, if it holds chats. What recurs
    there, such as words of the template or a system prompt, is no overlap unless nothing else is
    evaluated.
    """
    seen, shared, compared = set(_runs(calibration)), set(), 0
    own = False
    for run in _runs(evaluation):
        compared += 1
        if run in seen:
            shared.add(run)
        else:
            own = True
    if shared and own and chats is not None:
        times = Counter(run for run in _runs(chats().reshape(1, -1)) if run in shared)
        shared = {run for run in shared if times[run] == 1}
    if shared:
        raise NmsparseError(
            f"Calibration and evaluation share a run of {NGRAM} tokens; a score on text that was "
            "calibrated on means nothing.",
            "choose another text for evaluate --data, or for the calibration",
        )
    return compared


def _runs(ids: torch.Tensor) -> Iterator[bytes]:
    for row in ids.to(torch.int32).numpy():
        data, step = row.tobytes(), row.itemsize
        for start in range(len(row) - NGRAM + 1):
            yield data[step * start : step * (start + NGRAM)]
