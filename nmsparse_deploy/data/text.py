"""Text for calibration and evaluation: packaged samples, a file or a folder, cut into windows with identities."""

from __future__ import annotations

import bz2
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nmsparse_deploy.data.table_rows import TABLES, is_table, read_rows
from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.system.assets import assets, fetch

DEVELOPMENT = {"wikitext2": "wikitext-2/test.txt", "wikitext2-valid": "wikitext-2/valid.txt"}
"""Texts of the development data folder; `wikitext2-valid` is for choosing settings, never for reporting."""
_WIKITEXT = [(re.compile(pattern, re.M), plain) for pattern, plain in (
    (r" @([-,.])@ ", r"\1"), (r" ([,.:;!?%)\]])", r"\1"), (r"([(\[]) ", r"\1"),
    (r" (n't|'s|'re|'ve|'ll|'d|'m)\b", r"\1"), (r'" ([^"]*?) "', r'"\1"'), (r"^ *(?:= )+(.*?)(?: =)+ *$", r"\1"),
    (r" ?<unk>", ""), (r"^ +| +$", ""), (r"\n{3,}", "\n\n"))]
MIX = "+"
"""`A+B` as a source: as many samples of each."""
NGRAM = 32
"""A run of this many equal tokens in two samples is the same text, not a coincidence."""


@dataclass(frozen=True)
class Text:
    """Documents in a fixed order."""

    name: str
    documents: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(document.encode() + b"\0")
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class TokenSample:
    """Windows of `length` tokens, `ids` `[samples, length]` int64, with the window numbers they were cut from."""

    ids: torch.Tensor
    windows: tuple[int, ...]
    source: str
    fingerprint: str

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids}

    def record(self) -> dict[str, torch.Tensor]:
        """What a run keeps of the sample, to check later that an evaluation is held out."""
        return {"ids": self.ids.to(torch.int32)}

    def to_json(self) -> dict[str, Any]:
        samples, length = self.ids.shape
        return {"source": self.source, "fingerprint": self.fingerprint, "samples": samples, "length": length,
                "windows": list(self.windows)}


def load_text(source: str) -> Text:
    """A packaged sample (`wikipedia`, `bbc`), `datasets:...`, a text file, a file of rows, or a folder of such files.

    Rows come from parquet or JSON lines (also gzipped); `FILE#FIELD` names the field, which is `text` otherwise.

    Raises `UsageError` for what is not there or empty.
    """
    path = Path(source)
    named, _, field = source.rpartition("#")
    if source.startswith("datasets:"):
        from nmsparse_deploy.data.streamed_text import streamed

        return Text(source, streamed(source))
    if source in DEVELOPMENT:
        return Text(source, (_detokenise(_read(development_data(source) / DEVELOPMENT[source])),))
    if source == "wikipedia":
        return Text(source, tuple(_wikipedia(next(fetch(source).rglob("*.bz2")))))
    if source in assets() and assets()[source].kind == "text":
        return Text(source, tuple(_read(file) for file in sorted(fetch(source).rglob("*.txt"))))
    if path.is_dir():
        documents = tuple(document for file in sorted(path.rglob("*")) if file.name.lower().endswith((".txt", *TABLES))
                          for document in _documents(file, "text"))
    elif path.is_file():
        documents = _documents(path, "text")
    elif field and Path(named).is_file():
        path, documents = Path(named), _documents(Path(named), field)
    else:
        packaged = ", ".join(key for key, asset in assets().items() if asset.kind == "text")
        raise UsageError(f"There is no text '{source}': no file, folder or packaged sample ({packaged}) has this name.")
    if not any(document.strip() for document in documents):
        raise UsageError(f"The text '{source}' is empty.")
    return Text(path.name, documents)


def _documents(path: Path, field: str) -> tuple[str, ...]:
    """The rows of a table, or a plain file as one document."""
    return tuple(read_rows(path, field)) if is_table(path) else (_read(path),)


def development_data(source: str) -> Path:
    """The folder of data that no package carries, named by `NMSPARSE_DATA`. Raises `UsageError` when it is not set."""
    folder = os.environ.get("NMSPARSE_DATA")
    if not folder or not Path(folder).is_dir():
        raise UsageError(f"'{source}' is development data, and NMSPARSE_DATA does not name its folder.",
                         "use 'bbc' or a file of your own")
    return Path(folder)


def _detokenise(text: str) -> str:
    """WikiText's tokenised edition as prose. Never compare with figures on the raw edition."""
    for pattern, plain in _WIKITEXT:
        text = pattern.sub(plain, text)
    return text


def _read(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError:
        return data.decode("latin-1").strip()


def windows(text: Text, tokenizer: Any, length: int) -> torch.Tensor:
    """All documents joined by blank lines, cut into non-overlapping windows of `length` tokens; no BOS is added."""
    joined = "\n\n".join(text.documents)
    ids = torch.tensor(tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    return ids[: len(ids) // length * length].view(-1, length)


def calibration_sample(text: Text, tokenizer: Any, samples: int, length: int, seed: int,
                       at_most: bool = False) -> TokenSample:
    """`samples` distinct windows drawn with `seed`. Raises `UsageError` when there are none or, unless `at_most`, too
    few."""
    cut = windows(text, tokenizer, length)
    samples = min(samples, max(len(cut), 1)) if at_most else samples
    return _choose(text, cut, samples, lambda count: torch.randperm(
        count, generator=torch.Generator().manual_seed(seed))[:samples].sort().values, length)


def mixed(parts: Sequence[TokenSample], seed: int) -> TokenSample:
    """The samples of all parts in an order that `seed` decides, so that any stretch holds something of each."""
    ids, windows = torch.cat([part.ids for part in parts]), [window for part in parts for window in part.windows]
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    digest = hashlib.sha256("".join(part.fingerprint for part in parts).encode()).hexdigest()[:16]
    return replace(parts[0], ids=ids[order], windows=tuple(windows[place] for place in order.tolist()),
                   source=MIX.join(part.source for part in parts), fingerprint=digest)


def evaluation_sample(text: Text, tokenizer: Any, tokens: int, length: int) -> TokenSample:
    """The same evenly spaced windows for everybody: no seed, at least `tokens` tokens."""
    samples = -(-tokens // length)
    return _choose(text, windows(text, tokenizer, length), samples,
                   lambda count: torch.linspace(0, count - 1, samples).round().long(), length)


def _choose(text: Text, cut: torch.Tensor, samples: int, pick: Any, length: int) -> TokenSample:
    if samples < 1:
        raise UsageError("Zero calibration or evaluation tokens were asked for; at least one sample is needed.")
    if len(cut) < samples:
        raise UsageError(f"The text '{text.name}' gives {len(cut)} windows of {length} tokens, not {samples}.",
                         "ask for fewer samples or shorter ones, or give more text")
    chosen = pick(len(cut))
    return TokenSample(cut[chosen], tuple(chosen.tolist()), text.name, text.fingerprint)


def check_disjoint(calibration: torch.Tensor, evaluation: torch.Tensor) -> int:
    """Raise `NmsparseError` when calibration and evaluation share a run of `NGRAM` tokens; returns runs compared."""
    seen = set(_runs(calibration))
    compared = 0
    for run in _runs(evaluation):
        compared += 1
        if run in seen:
            raise NmsparseError(f"Calibration and evaluation share a run of {NGRAM} tokens; a score on text that was "
                                "calibrated on means nothing.", "choose another --eval-data or calibration text")
    return compared


def _runs(ids: torch.Tensor) -> Iterator[bytes]:
    for row in ids.to(torch.int32).numpy():
        data, step = row.tobytes(), row.itemsize
        for start in range(len(row) - NGRAM + 1):
            yield data[step * start : step * (start + NGRAM)]


# --- Wikipedia markup -> prose ----------------------------------------------------------------------------------------

_PAGE = re.compile(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", re.S)
_NOT_PROSE = [re.compile(p, re.S) for p in (r"<!--.*?-->", r"<ref[^>/]*/>", r"<ref.*?</ref>", r"<math.*?</math>",
                                            r"\{\|.*?\|\}")]
_TAG = re.compile(r"<[^>]+>")
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_FILE = re.compile(r"\[\[(?:File|Image|Category):[^\[\]]*(?:\[\[[^\]]*\]\][^\[\]]*)*\]\]", re.I)
_LINK = re.compile(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]")
_URL = re.compile(r"\[https?://\S+ ?([^\]]*)\]")
_ENTITIES = {"&lt;": "<", "&gt;": ">", "&quot;": '"', "&amp;": "&", "&nbsp;": " ", "&ndash;": "–", "&mdash;": "—"}
PARAGRAPH = 150
"""Shorter lines are captions, lists and headings."""


def _wikipedia(path: Path) -> Iterator[str]:
    xml = bz2.decompress(path.read_bytes()).decode("utf-8", "replace")
    for title, markup in _PAGE.findall(xml):
        prose = _prose(markup)
        if prose:
            yield f"{title}\n\n{prose}"


def _prose(markup: str) -> str:
    for _ in range(2):  # entities are escaped twice inside the XML
        for entity, character in _ENTITIES.items():
            markup = markup.replace(entity, character)
    if markup.lstrip().lower().startswith("#redirect"):
        return ""
    for pattern in _NOT_PROSE:
        markup = pattern.sub("", markup)
    while True:
        shorter = _TEMPLATE.sub("", markup)
        if shorter == markup:
            break
        markup = shorter
    markup = _URL.sub(r"\1", _LINK.sub(r"\1", _FILE.sub("", markup)))
    markup = _TAG.sub("", markup).replace("'''", "").replace("''", "")
    lines = (line.strip() for line in markup.splitlines())
    return "\n\n".join(line for line in lines if len(line) > PARAGRAPH and line[0] not in "=*#:;|!{}")
