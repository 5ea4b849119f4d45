"""Perplexity as the papers measure it: named test sets, each joined, tokenised and cut in one
published way.

    ppl = exp(1/W Σ_w l_w),   l_w = -1/(L-1) Σ_{t=2..L} log p(x_wt | x_w1 ... x_w,t-1)

over W windows of L tokens that do not overlap. A window has no prediction for its first token;
every window predicts L - 1 tokens, so the mean over windows weighs every predicted token alike. The
papers' code multiplies l_w by L and divides by L W, which cancels. The text is tokenised in one
piece, with the special tokens that the tokenizer adds to a text (one BOS at the very start for OPT
and LLaMA), and what is left over behind the last window is dropped.

Source: Frantar & Alistarh 2023, arXiv:2301.00774, released code (`datautils.py`, `opt.py`), which
Wanda, ALPS, MixGPT and most others took over. L is 2048 there; Wanda and MaskLLM report LLaMA-2 at
4096, and the two differ (5.47 and 5.12 for the dense 7B model).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from nmsparse_deploy.data.streamed_text import hub_rows
from nmsparse_deploy.data.table_rows import is_table, read_rows
from nmsparse_deploy.data.text import TokenSample
from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.measure.evaluate.perplexity import perplexity
from nmsparse_deploy.measure.evaluate.result import EvalResult
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.recipe import AUTO
from nmsparse_deploy.system.progress import Progress, silent


@dataclass(frozen=True)
class TextProtocol:
    """A test set and how it becomes one text. `files` are the names that it has in a local folder,
    as globs."""

    name: str
    hub: tuple[str, str | None]
    split: str
    field: str
    joined: str
    files: tuple[str, ...]
    quirk: str
    hub_file: str | None = None
    """Of a data set that is read by file."""
    revision: str | None = None
    rows: int | None = None
    """The first so many rows; None = all."""
    windows: int | None = None
    """The first so many windows; None = all."""
    line_ends: bool = False
    """A row of plain text keeps the end of its line, and a blank line is an empty row."""


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        TextProtocol(
            "wikitext2",
            ("Salesforce/wikitext", "wikitext-2-raw-v1"),
            "test",
            "text",
            "\n\n",
            ("wiki.test.raw", "wikitext-2-raw-v1/test-*.parquet", "wikitext2.*"),
            "raw edition; rows keep their line ends, so paragraphs are three line ends apart",
            line_ends=True,
        ),
        TextProtocol(
            "ptb",
            ("ptb-text-only/ptb_text_only", None),
            "test",
            "sentence",
            " ",
            ("ptb.test.txt", "penn_treebank/*test*.parquet", "ptb.*"),
            "test split joined by spaces: lower case, <unk> and N for numbers; GPTQ's older variant joins the "
            "validation split by blank lines",
            revision="refs/convert/parquet",
        ),
        TextProtocol(
            "c4",
            ("allenai/c4", None),
            "validation",
            "text",
            " ",
            ("c4-validation.00000-of-00008.json.gz", "c4.*"),
            "first 1100 documents of the first validation shard joined by spaces, first 256 windows",
            hub_file="en/c4-validation.00000-of-00008.json.gz",
            rows=1100,
            windows=256,
        ),
    )
}


def protocol_perplexity(
    model: LoadedModel,
    protocol: TextProtocol,
    sample: TokenSample,
    where: str,
    label: str = "",
    limit: int | None = None,
    progress: Progress = silent,
) -> EvalResult:
    """Perplexity of a model on the windows of a protocol; the metric carries the protocol's name
    and context."""
    result = perplexity(model.module, sample, where, f"{protocol.name}, {label}", progress)
    first = getattr(model.processor, "bos_token_id", None)
    facts = {
        "split": protocol.split,
        "joined_by": protocol.joined,
        "quirk": protocol.quirk,
        "bos": first is not None and int(sample.ids[0, 0]) == first,
        "source": "Frantar & Alistarh 2023, arXiv:2301.00774 (released code)",
    }
    name = f"{protocol.name}_ppl@{sample.ids.shape[1]}" + (f"-first{limit}" if limit else "")
    return replace(result, metric=name, protocol={**result.protocol, **facts})


def protocol_sample(
    protocol: TextProtocol, data: str, tokenizer: Any, context: int, limit: int | None = None
) -> TokenSample:
    """Cut the protocol's windows of `context` tokens from `data` (a file, a folder that holds one,
    or `auto`: the hub).

    `limit` takes only the first so many windows, which is no published protocol any more. Raises
    `UsageError` when the file is not there or too short, `NmsparseError` when the hub cannot be
    reached.
    """
    text = protocol.joined.join(islice(_rows(protocol, data), protocol.rows))
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
    count = min(len(ids) // context, protocol.windows or len(ids), limit or len(ids))
    if not count:
        raise UsageError(
            f"The test set of '{protocol.name}' has {len(ids)} tokens here, less than one window of "
            f"{context}.",
            "give the whole set",
        )
    digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
    return TokenSample(
        ids[: count * context].view(count, context), tuple(range(count)), protocol.name, digest
    )


def _rows(protocol: TextProtocol, data: str) -> Iterable[str]:
    if data == AUTO:
        return hub_rows(
            *protocol.hub,
            protocol.split,
            protocol.field,
            protocol.revision,
            protocol.hub_file,
            f"--data FILE, with {protocol.files[0]} or its rows as parquet or JSON lines",
        )
    path = find_file(protocol, Path(data))
    if is_table(path):
        return read_rows(path, protocol.field)
    lines = read_rows(path)
    if protocol.line_ends:
        return (line if line.strip() else "" for line in lines)
    return (line.strip() for line in lines)


def find_file(protocol: TextProtocol, path: Path) -> Path:
    """Find the set's file: `path` itself, or the first in that folder which goes by one of its
    names."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UsageError(
            f"There is no file or folder '{path}' with the test set of '{protocol.name}'."
        )
    match = next(
        (file for glob in protocol.files for file in sorted(path.rglob(glob)) if file.is_file()),
        None,
    )
    if match is None:
        raise UsageError(
            f"'{path}' holds no test set of '{protocol.name}': no {' or '.join(protocol.files)}.",
            "give the file itself",
        )
    return match
