"""The papers' protocols: the same windows from parquet, JSON lines and plain text; the papers' own
arithmetic."""

from __future__ import annotations

import gzip
import json
import math

import pyarrow
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from nmsparse_deploy.data import streamed_text as streamed
from nmsparse_deploy.data.table_rows import read_rows
from nmsparse_deploy.data.text import load_text
from nmsparse_deploy.errors import MissingExtra, NmsparseError, UsageError
from nmsparse_deploy.measure.evaluate.protocols import (
    PROTOCOLS,
    find_file,
    protocol_perplexity,
    protocol_sample,
)
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.registry import ADAPTERS
from tests.fixtures import pico

ROWS = {
    "wikitext2": [
        "",
        " = A title = \n",
        "",
        " One paragraph , tokenised . \n",
        " Another one . \n",
        "",
    ],
    "ptb": ["no it was n't black monday", "but <unk> the N shares", "x"],
    "c4": [f"document {number}, of some length\nwith two lines" for number in range(1200)],
}


def stored(folder, name: str, kind: str):
    """The rows of a set as a hub, a table or its own file keeps them."""
    field, rows = PROTOCOLS[name].field, ROWS[name]
    if kind == "parquet":
        parquet.write_table(
            pyarrow.table({"id": list(range(len(rows))), field: rows}), folder / f"{name}.parquet"
        )
        return folder / f"{name}.parquet"
    lines = "".join(json.dumps({field: row, "url": "u"}) + "\n" for row in rows)
    if kind == "jsonl":
        (folder / f"{name}.jsonl").write_text(lines)
        return folder / f"{name}.jsonl"
    if kind == "json.gz":
        with gzip.open(folder / f"{name}.json.gz", "wt") as file:
            file.write(lines)
        return folder / f"{name}.json.gz"
    text = (
        "".join(row or " \n" for row in rows)
        if name == "wikitext2"
        else "".join(f" {row} \n" for row in rows)
    )
    (folder / f"{name}.txt").write_text(text)
    return folder / f"{name}.txt"


class WithStart:
    """A tokenizer that puts a BOS at the start of a text, as those of OPT and LLaMA do."""

    bos_token_id = 257

    def __init__(self):
        self.core = pico.tokenizer()
        self.seen: list[str] = []

    def __call__(self, text, **_):
        self.seen.append(text)
        return {"input_ids": [self.bos_token_id, *self.core(text)["input_ids"]]}


def papers_text(name: str) -> str:
    """What `datautils.py` of SparseGPT joins, written down by hand."""
    rows = ROWS[name]
    return {"wikitext2": "\n\n".join(rows), "ptb": " ".join(rows), "c4": " ".join(rows[:1100])}[
        name
    ]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json.gz", "txt"])
@pytest.mark.parametrize("name", ["wikitext2", "ptb", "c4"])
def test_the_text_is_the_papers(name, kind, tmp_path):
    if (name, kind) == ("c4", "txt"):
        pytest.skip("its documents have several lines")
    tokenizer = WithStart()
    sample = protocol_sample(PROTOCOLS[name], str(stored(tmp_path, name, kind)), tokenizer, 16)
    assert tokenizer.seen == [papers_text(name)]
    ids = [257, *pico.tokenizer()(papers_text(name))["input_ids"]]
    count = min(len(ids) // 16, 256 if name == "c4" else len(ids))
    assert sample.ids.tolist() == torch.tensor(ids[: 16 * count]).view(-1, 16).tolist()
    assert sample.ids[0, 0] == 257 and (sample.ids[1:] != 257).all()  # one start, not one a window


def model() -> LoadedModel:
    return LoadedModel(
        pico.llama(), "pico", "pico", "llm", ADAPTERS.load("transformers"), WithStart()
    )


@torch.no_grad()
def test_perplexity_is_what_the_papers_code_computes(tmp_path):
    found = model()
    sample = protocol_sample(
        PROTOCOLS["c4"], str(stored(tmp_path, "c4", "jsonl")), found.processor, 32, limit=5
    )
    result = protocol_perplexity(found, PROTOCOLS["c4"], sample, "cpu", limit=5)
    nlls = []
    for row in sample.ids:  # loss times the window, summed, over windows times the window
        logits = found.module(input_ids=row[None]).logits
        loss = torch.nn.CrossEntropyLoss()(logits[0, :-1], row[1:])
        nlls.append(loss.float() * 32)
    assert result.value == pytest.approx(
        float(torch.exp(torch.stack(nlls).sum() / (5 * 32))), rel=1e-5
    )
    assert result.metric == "c4_ppl@32-first5" and result.protocol["bos"] and result.samples == 5
    words = sum(
        float(
            torch.nn.functional.cross_entropy(
                found.module(input_ids=row[None]).logits[0, :-1], row[1:], reduction="sum"
            )
        )
        for row in sample.ids
    )
    assert result.value == pytest.approx(
        math.exp(words / (5 * 31)), rel=1e-5
    )  # every predicted token weighs the same


def test_a_folder_is_searched_for_the_sets_own_names(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/wiki.test.raw").write_text("x")
    assert find_file(PROTOCOLS["wikitext2"], tmp_path).name == "wiki.test.raw"
    with pytest.raises(UsageError, match="holds no test set of 'ptb'"):
        find_file(PROTOCOLS["ptb"], tmp_path)
    with pytest.raises(UsageError, match="no file or folder"):
        find_file(PROTOCOLS["ptb"], tmp_path / "nothing")


def test_a_set_that_is_too_short(tmp_path):
    with pytest.raises(UsageError, match="less than one window of 2048"):
        protocol_sample(PROTOCOLS["ptb"], str(stored(tmp_path, "ptb", "txt")), WithStart(), 2048)


def test_without_library_network_and_file_one_sentence_says_what_to_do(monkeypatch):
    import sys

    import datasets

    def offline(*_, **__):
        raise ConnectionError(
            "Couldn't reach 'Salesforce/wikitext' on the Hub (OfflineModeIsEnabled)\nmore"
        )

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(NmsparseError) as caught:
        protocol_sample(PROTOCOLS["wikitext2"], "auto", WithStart(), 16)
    assert caught.value.message == (
        "The data set 'Salesforce/wikitext/wikitext-2-raw-v1@test' is not on this machine and "
        "the hub did not give it: Couldn't reach 'Salesforce/wikitext' on the Hub "
        "(OfflineModeIsEnabled)."
    )
    assert (
        caught.value.hint == "--data FILE, with wiki.test.raw or its rows as parquet or JSON lines"
    )
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match="needs the package 'datasets'"):
        protocol_sample(PROTOCOLS["wikitext2"], "auto", WithStart(), 16)


def test_the_hub_is_asked_for_the_published_split(monkeypatch):
    import datasets

    asked = []

    def load(name, config, **options):
        asked.append((name, config, options))
        return [{"text": "a b c " * 40, "sentence": "a b c " * 40}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in PROTOCOLS:
        protocol_sample(PROTOCOLS[name], "auto", WithStart(), 16)
    assert asked == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", {"split": "test", "revision": None}),
        (
            "ptb-text-only/ptb_text_only",
            None,
            {"split": "test", "revision": "refs/convert/parquet"},
        ),
        (
            "allenai/c4",
            None,
            {
                "split": "validation",
                "revision": None,
                "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
            },
        ),
    ]
    with pytest.raises(UsageError, match="has no field 'other'"):
        list(streamed.hub_rows("x", None, "test", "other", None, None, ""))


LINE = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)


@given(rows=st.lists(LINE, min_size=1, max_size=8))
def test_rows_survive_every_table(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    parquet.write_table(pyarrow.table({"t": rows}), folder / "a.parquet")
    (folder / "a.jsonl").write_text("".join(json.dumps({"t": row}) + "\n" for row in rows))
    assert (
        list(read_rows(folder / "a.parquet", "t"))
        == rows
        == list(read_rows(folder / "a.jsonl", "t"))
    )


@pytest.mark.parametrize(
    "name,content,sentence",
    [
        ("a.jsonl", b'{"text": "x"}\nnot json\n', "Line 2"),
        ("a.jsonl", b"[1]\n", "no row with fields"),
        ("a.jsonl", b'{"other": "x"}\n', "has no field 'text'; it has other"),
        ("a.jsonl", b'{"text": 7}\n', "holds int"),
        ("a.json.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-4], "damaged or truncated"),
        ("a.json.gz", b"plain", "damaged or truncated"),
        ("a.parquet", b"PAR1 no", "not a readable parquet"),
        ("a.jsonl", b'{"text": "\xff\xfe"}\n', "damaged or truncated"),
    ],
)
def test_hostile_files(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        list(read_rows(tmp_path / name))
    assert sentence in caught.value.message and "\n" not in caught.value.message


def test_tables_are_texts_to_calibrate_on(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "one", "story": "uno"}\n{"text": "two", "story": "due"}\n'
    )
    parquet.write_table(pyarrow.table({"text": ["three"]}), tmp_path / "b.parquet")
    assert load_text(str(tmp_path / "a.jsonl")).documents == ("one", "two")
    assert load_text(f"{tmp_path / 'a.jsonl'}#story").documents == ("uno", "due")
    assert load_text(str(tmp_path)).documents == ("one", "two", "three")
    with pytest.raises(UsageError, match="has no field 'nothing'"):
        load_text(f"{tmp_path / 'a.jsonl'}#nothing")
