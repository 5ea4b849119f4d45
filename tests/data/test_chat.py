"""Chat data: every form becomes text by the tokenizer's chat template, and a wrong row is named by
its line."""

from __future__ import annotations

import gzip
import json

import pytest

import nmsparse_deploy as nms
from nmsparse_deploy.data.chat import JOINED, TEMPLATE
from nmsparse_deploy.data.text import NGRAM, check_disjoint, load_text, windows
from nmsparse_deploy.errors import NmsparseError, UsageError
from tests.fixtures import pico

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ASKED = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
WRITTEN = "<|user|>Hi<end>\n<|assistant|>Hello<end>\n"
WITH_SYSTEM = "<|system|>Be brief<end>\n" + WRITTEN
SYSTEM = {"role": "system", "content": "Be brief"}
TALK = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]

FORMS = [
    ({"messages": ASKED}, WRITTEN),
    ({"prompt": "Hi", "prompt_id": "7", "messages": ASKED}, WRITTEN),
    ({"conversations": TALK}, WRITTEN),
    ({"conversation": ASKED, "system": "Be brief"}, WITH_SYSTEM),
    ({"conversations": [{"from": "system", "value": "Be brief"}, *TALK], "id": 3}, WITH_SYSTEM),
    ({"messages": [SYSTEM, *ASKED], "system": "unused"}, WITH_SYSTEM),
    ({"instruction": "Hi", "output": "Hello"}, WRITTEN),
    ({"instruction": "Hi", "input": "", "output": "Hello", "system": None}, WRITTEN),
    ({"instruction": "Hi", "input": "x", "output": "Hello"}, WRITTEN.replace("Hi", "Hi\n\nx")),
    ({"instruction": "Hi", "context": None, "response": "Hello"}, WRITTEN),
    ({"prompt": "Hi", "completion": "Hello"}, WRITTEN),
    ({"prompt": ASKED[:1], "completion": ASKED[1:]}, WRITTEN),
    ({"question": "Hi", "answer": "Hello"}, WRITTEN),
    ({"input": "Hi", "output": "Hello"}, WRITTEN),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ASKED[1]]},
        WRITTEN,
    ),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "url": "x.png"}, {"text": "Hi"}]},
                {"role": "assistant", "content": ["Hello"]},
            ]
        },
        WRITTEN,
    ),
    (
        {"image": "x.png", "conversations": [{"from": "human", "value": "<image>\nHi"}, TALK[1]]},
        WRITTEN,
    ),
    (
        {"messages": [ASKED[0], {"role": "assistant", "content": None, "tool_calls": []}]},
        "<|user|>Hi<end>\n<|assistant|><end>\n",
    ),
    ({"text": "as it stands", "messages": ASKED}, "as it stands"),
]


def tokenizer(template: str | None = CHATML):
    made = pico.tokenizer()
    made.chat_template = template
    return made


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("row,written", FORMS)
def test_every_form_goes_through_the_template(row, written, tmp_path):
    read = load_text(lines(tmp_path / "a.jsonl", [row]), tokenizer())
    assert read.documents == (written,)
    assert read.note == ("" if "text" in row else TEMPLATE)


def test_every_kind_of_file_is_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"messages": ASKED}, {"messages": [SYSTEM, *ASKED]}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8-sig")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "lines.json").write_text(text)
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    table = pyarrow.Table.from_pylist([{**row, "picture": b"png"} for row in rows])
    parquet.write_table(table, tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.jsonl.gz", "lines.json", "list.json", "a.parquet"):
        for source in (tmp_path / name, f"{tmp_path / name}#messages"):
            assert load_text(str(source), tokenizer()).documents == (WRITTEN, WITH_SYSTEM), name
    (tmp_path / "one.json").write_text(json.dumps(rows[0], indent=1))
    assert load_text(str(tmp_path / "one.json"), tokenizer()).documents == (WRITTEN,)


def test_a_streamed_data_set_is_read_as_a_file_is(tmp_path):
    pytest.importorskip("datasets")
    lines(tmp_path / "train.jsonl", [{"messages": ASKED}])
    read = load_text(f"datasets:{tmp_path}", tokenizer())
    assert read.documents == (WRITTEN,) and read.note == TEMPLATE


def test_without_a_template_the_contents_are_joined(tmp_path):
    file = lines(tmp_path / "a.jsonl", [{"messages": [SYSTEM, *ASKED]}])
    read = load_text(file, tokenizer(None))
    assert read.documents == ("Be brief\n\nHi\n\nHello",) and read.note == JOINED


def test_a_template_without_a_system_gets_it_with_the_question(tmp_path):
    gemma = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    file = lines(tmp_path / "a.jsonl", [{"messages": [SYSTEM, *ASKED]}])
    expected = WRITTEN.replace("Hi", "Be brief\n\nHi")
    assert load_text(file, tokenizer(gemma + CHATML)).documents == (expected,)


def test_a_template_that_writes_the_date_gives_the_same_text_every_day(tmp_path):
    file = lines(tmp_path / "a.jsonl", [{"messages": ASKED}])
    read = load_text(
        file, tokenizer("\n{{ strftime_now('%d %b %Y') }}{{ strftime_now('%Y-%m-%d') }}")
    )
    assert read.documents == ("\n26 Jul 20242024-07-26",)


GOOD = {"messages": ASKED}
WRONG = [
    ({"body": "x", "id": 1}, r"Line 2 of .* has no field 'text' and no chat .*; it has body, id"),
    ({}, "it has none"),
    ([GOOD], "Line 2 of .* is no row with fields: it is of type list"),
    (None, "Line 2 of .* it is of type NoneType"),
    ({"messages": "Hi"}, "Line 2 of .* holds str in 'messages', where a list of messages"),
    ({"messages": {"role": "user"}}, "holds dict in 'messages'"),
    ({"messages": []}, "Line 2 of .* has no message in 'messages'"),
    ({"messages": ["Hi"]}, "Line 2 .* message 1 of 'messages', is of type str"),
    ({"messages": [ASKED[0], {"role": "user"}]}, "Line 2 .*message 2 .*no 'content'.*it has role"),
    ({"messages": [{"content": "Hi"}]}, "no 'role' or 'from'; it has content"),
    ({"messages": [{"role": "user", "content": None}]}, "that is not null"),
    ({"messages": [{"role": "user", "content": 7}]}, "a content of type int"),
    ({"messages": [{"role": 7, "content": "Hi"}]}, "a role of type int"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "neither text nor an image"),
    ({"messages": [{"role": "user", "content": [7]}]}, "neither text nor an image"),
    ({"conversations": [{"from": "human"}]}, "no 'content' or 'value'; it has from"),
    ({"instruction": "Hi", "input": ""}, "Line 2 .*no answer to it .*; it has instruction, input"),
    ({"instruction": 7, "output": "Hello"}, "Line 2 of .* holds int in 'instruction'"),
    ({"instruction": "Hi", "output": None}, "holds NoneType in 'output'"),
    ({"text": None}, "holds NoneType in 'text'"),
]


@pytest.mark.parametrize("row,sentence", WRONG)
def test_a_wrong_row_is_named_by_its_line(row, sentence, tmp_path):
    with pytest.raises(UsageError, match=sentence) as caught:
        load_text(lines(tmp_path / "a.jsonl", [GOOD, row]), tokenizer())
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "name,content,sentence",
    [
        ("a.jsonl", "", "is empty"),
        ("a.json", " \n", "is empty"),
        ("a.json", "[]", "is empty"),
        ("a.jsonl", '{"messages": [', "Line 1 of .* is not JSON"),
        ("a.json", '[{"messages": [', "is not JSON"),
        ("a.json", "[1]", "Row 1 of .* is no row"),
        ("a.jsonl", "[" * 100_000, "Line 1 of .* is not JSON"),
        ("a.json", "[" * 100_000, "is not JSON"),
        ("a.json", '{"data": [{"messages": []}]}', "it has data"),
        ("a.json", b'[{"text": "\xff"}]', "damaged"),
    ],
)
def test_hostile_files(name, content, sentence, tmp_path):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=sentence) as caught:
        load_text(str(tmp_path / name), tokenizer())
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("template", ["{{ raise_exception('roles must alternate') }}", "{% if %}"])
def test_a_template_that_fails_is_one_sentence(template, tmp_path):
    file = lines(tmp_path / "a.jsonl", [GOOD])
    with pytest.raises(
        UsageError, match=r"Line 1 of .* does not fit the tokenizer's chat template"
    ):
        load_text(file, tokenizer(template))


def test_what_every_chat_begins_with_is_no_overlap(tmp_path):
    def cut(name, words):
        system = {"role": "system", "content": "You answer in one short sentence, always."}
        rows = [{"messages": [system, {"role": "user", "content": word * 9}]} for word in words]
        return windows(load_text(lines(tmp_path / name, rows), tokenizer()), tokenizer(), 100)

    ours, theirs = (
        cut("a.jsonl", ["red", "green", "blue", "black"]),
        cut("b.jsonl", ["one", "three", "seven", "eight"]),
    )
    assert check_disjoint(ours, theirs[1:3], lambda: theirs) == 2 * (100 - NGRAM + 1)
    for evaluation, chats in ((theirs, None), (ours[:2], lambda: ours)):
        with pytest.raises(NmsparseError, match="share a run"):
            check_disjoint(ours, evaluation, chats)
    repeated = ours[:1].repeat(3, 1)
    with pytest.raises(NmsparseError, match="share a run"):
        check_disjoint(repeated, repeated, lambda: repeated)


def test_prune_and_evaluate_on_chats(tmp_path):
    folder = pico.save(pico.llama(), tmp_path / "model")
    tokenizer().save_pretrained(folder)
    words = pico.text(tmp_path, "words.txt", 3, 400).read_text().split()
    rows = [
        {"instruction": " ".join(words[i : i + 8]), "input": "", "output": words[i]}
        for i in range(0, 400, 8)
    ]
    train = lines(tmp_path / "train.jsonl", rows[:25])
    held_out = lines(tmp_path / "held-out.jsonl", rows[25:])
    calibration = nms.Calibration(data=train, samples=8, length=32)
    run = nms.prune(
        str(folder), nms.Prune(method="wanda", calibration=calibration), tmp_path / "run"
    )
    recorded = json.loads((run.path / "manifest.json").read_text())
    assert TEMPLATE in json.dumps(recorded)
    nms.evaluate(run, nms.Evaluate(data=held_out, tokens=256, context=64, continuation=0))
    assert all(report.ok for report in nms.verify(run))
    with pytest.raises(NmsparseError, match="share a run"):
        nms.evaluate(run, nms.Evaluate(data=train, tokens=256, context=64, continuation=0))


def test_an_encoder_without_a_template_reads_chats(tmp_path):
    from types import SimpleNamespace

    from nmsparse_deploy.data.sequences import calibration_sequences, paired

    text = load_text(lines(tmp_path / "a.jsonl", [{"messages": ASKED}] * 9), tokenizer(None))
    sample = calibration_sequences(text, tokenizer(None), 2, 16, 0)
    assert sample.to_json()["note"] == JOINED
    both = paired(sample, SimpleNamespace(decoder_start_token_id=5))
    assert both.to_json()["note"] == JOINED and both.inputs["decoder_input_ids"][0, 0] == 5
