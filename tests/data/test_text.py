"""Calibration and evaluation text: windows with identities, disjointness, markup."""

from __future__ import annotations

import pytest
import torch

from nmsparse_deploy.data.text import (
    NGRAM,
    Text,
    calibration_sample,
    check_disjoint,
    evaluation_sample,
    load_text,
)
from nmsparse_deploy.errors import NmsparseError, UsageError
from tests.fixtures import pico

TOKENIZER = pico.tokenizer()


def test_calibration_windows_are_seeded_and_distinct(texts):
    text = load_text(str(texts["calibration"]))
    one = calibration_sample(text, TOKENIZER, 8, 64, 0)
    again = calibration_sample(text, TOKENIZER, 8, 64, 0)
    other = calibration_sample(text, TOKENIZER, 8, 64, 1)
    assert (
        torch.equal(one.ids, again.ids)
        and one.windows == again.windows
        and one.windows != other.windows
    )
    assert len(set(one.windows)) == 8 and one.ids.shape == (8, 64)
    assert TOKENIZER.decode(one.ids[0]) in text.documents[0]


def test_evaluation_windows_are_fixed_and_spread(texts):
    text = load_text(str(texts["held_out"]))
    sample = evaluation_sample(text, TOKENIZER, 1000, 100)
    assert sample.ids.shape == (10, 100) and sample.windows[0] == 0
    assert max(sample.windows) == len(text.documents[0]) // 100 - 1


def test_folders_files_and_what_is_not_there(tmp_path):
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")  # not UTF-8
    assert load_text(str(tmp_path)).documents == ("café", "two")
    with pytest.raises(UsageError, match="There is no text"):
        load_text(str(tmp_path / "none.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="is empty"):
        load_text(str(tmp_path / "empty"))


@pytest.mark.parametrize("samples,length", [(0, 16), (5, 16), (1, 64)])
def test_zero_and_too_few_samples(samples, length):
    with pytest.raises(UsageError, match=r"Zero|windows of"):
        calibration_sample(Text("short", ("x" * 40,)), TOKENIZER, samples, length, 0)


def test_overlap_is_found():
    a = torch.arange(100).view(2, 50)
    b = torch.arange(1000, 1100).view(2, 50)
    assert check_disjoint(a, b) == 2 * (50 - NGRAM + 1)
    b[1, 9 : 9 + NGRAM] = a[0, 5 : 5 + NGRAM]
    with pytest.raises(NmsparseError, match="share a run"):
        check_disjoint(a, b)
    b[1, 9] += 1
    b[1, 9 + NGRAM - 1] += 1  # one token short of a run on both sides
    check_disjoint(a, b)


def test_data_sets_are_streamed_from_a_local_folder(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "test.jsonl").write_text('{"text": "three"}\n')
    assert load_text(f"datasets:{tmp_path}").documents == ("one", "two")
    assert load_text(f"datasets:{tmp_path}@test#text").documents == ("three",)
    with pytest.raises(UsageError, match="no field 'body'; it has text"):
        load_text(f"datasets:{tmp_path}#body")
    with pytest.raises(NmsparseError, match="could not be read"):
        load_text(f"datasets:{tmp_path}@nosuch")


def test_data_sets_without_the_library(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(NmsparseError, match="needs the package 'datasets'"):
        load_text("datasets:a/b")
    with pytest.raises(UsageError, match=r"NAME\[/CONFIG\]"):
        load_text("datasets:")
