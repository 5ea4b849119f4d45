"""Zero-shot tasks offline: the harness's own wrapper on the model, and our class on its exported
graph, agree."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import nmsparse_deploy as nms
from nmsparse_deploy import models
from nmsparse_deploy.cli import app, invoke
from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.recipe import Evaluate, Export, Prune, validate
from nmsparse_deploy.ship.onnx.onnxruntime import OnnxRuntime

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402

from nmsparse_deploy.measure.evaluate.engine_lm import EngineLM  # noqa: E402
from nmsparse_deploy.measure.evaluate.harness import engine_lm, torch_lm, zero_shot  # noqa: E402

CHOICE = """
task: pico_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1.0}}
"""
ROLLING = """
task: pico_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
metadata: {{version: 1.0}}
"""
SAID = """
task: pico_said
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["zz"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="module")
def run(llama_dir, texts, tmp_path_factory):
    spec = validate(
        Prune,
        {
            "method": "wanda",
            "compute": "fp32",
            "calibration": {"data": str(texts["calibration"]), "samples": 4, "length": 32},
        },
    )
    found = prune(str(llama_dir), spec, tmp_path_factory.mktemp("harness") / "run")
    nms.export(found, Export(precisions=("fp32",)))
    return found


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "question": f"Is {n} more than {3 * n % 7}? " * (1 + n % 3),
            "choices": ["yes", " no", "it may be so"],
            "label": n % 3,
        }
        for n in range(12)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in {"choice": CHOICE, "text": ROLLING, "said": SAID}.items():
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    return [str(folder / f"{name}.yaml") for name in ("choice", "text", "said")]


@pytest.fixture(scope="module")
def both(run):
    loaded = models.load(str(run / "model"))
    return torch_lm(loaded), engine_lm(loaded, OnnxRuntime.build(run / "onnx/fp32/model.onnx"))


def asked(kind: str, arguments: list) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=tuple(row), idx=0) for row in arguments]


def test_every_request_is_answered_alike(both):
    theirs, ours = both
    pairs = [
        ("What is it?", " it"),
        ("", "from nothing"),
        ("trailing space ", "word"),
        ("x" * 400, " too long"),
        ("<end>started", " text"),
    ]
    for (a, greedy), (b, said) in zip(
        theirs.loglikelihood(asked("loglikelihood", pairs), disable_tqdm=True),
        ours.loglikelihood(asked("loglikelihood", pairs), disable_tqdm=True),
    ):
        assert b == pytest.approx(a, abs=1e-3) and greedy == said
    whole = [("a text of some length " * 40,), ("short",)]  # more and less than the context of 256
    a = theirs.loglikelihood_rolling(asked("loglikelihood_rolling", whole), disable_tqdm=True)
    b = ours.loglikelihood_rolling(asked("loglikelihood_rolling", whole), disable_tqdm=True)
    assert b == pytest.approx(a, abs=1e-2)
    settings = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    calls = [("Once upon a time", settings), ("y" * 300, settings)]
    assert ours.generate_until(asked("generate_until", calls)) == theirs.generate_until(
        asked("generate_until", calls), disable_tqdm=True
    )


def test_tasks_give_the_same_figures(both, tasks):
    theirs, ours = both
    a = zero_shot(theirs, tasks, None, "cpu", "float32")
    b = zero_shot(ours, tasks, None, "onnxruntime", "fp32")
    assert (
        [row.metric for row in a]
        == [row.metric for row in b]
        == [
            "acc@pico_choice",
            "acc_norm@pico_choice",
            "word_perplexity@pico_text",
            "bits_per_byte@pico_text",
            "exact_match@pico_said",
        ]
    )
    for theirs_row, ours_row in zip(a, b):
        assert ours_row.value == pytest.approx(theirs_row.value, rel=1e-4)
        assert theirs_row.samples == 12 and theirs_row.protocol["task_version"] == 1.0
    spread = (a[0].value * (1 - a[0].value) / 11) ** 0.5
    assert a[0].standard_error == pytest.approx(spread)


def test_the_whole_evaluation(run, tasks, capfd):
    arguments = ["--json", "evaluate", str(run.path), "--task", tasks[0], "--limit", "5", "--onnx"]
    code = invoke(lambda: app(arguments))
    data = json.loads(capfd.readouterr().out)
    assert code == 0 and list(data["results"]) == ["dense", "pruned", "pruned, ONNX fp32"]
    for rows in data["results"].values():
        assert [row["metric"] for row in rows] == [
            "acc@pico_choice-first5",
            "acc_norm@pico_choice-first5",
        ]
        assert rows[0]["samples"] == 5
    assert nms.report(run).is_file() and "acc@pico" in (
        run / "report/report.md"
    ).read_text().replace("\\", "")
    assert "--task" in (run / "report/report.md").read_text()


def test_protocols_and_tasks_in_one_evaluation(run, texts):
    spec = Evaluate(protocols=("ptb",), data=str(texts["held_out"]), paper_context=64, limit=3)
    data = nms.evaluate(run, spec)
    assert (
        data["results"]["pruned"][0]["metric"] == "ptb_ppl@64-first3"
        and data["ratio"]["low"] <= data["ratio"]["ratio"]
    )
    assert data["held_out"]["runs_compared"] > 0
    with pytest.raises(NmsparseError, match="share a run"):
        nms.evaluate(
            run, Evaluate(protocols=("ptb",), data=str(texts["calibration"]), paper_context=64)
        )
    with pytest.raises(UsageError, match="longer than the 256"):
        nms.evaluate(run, Evaluate(protocols=("ptb",), data=str(texts["held_out"])))


def test_bad_tasks_are_one_sentence(both, tmp_path):
    lm = both[0]
    for task, sentence in (
        ("nonesuch_task", "has no task 'nonesuch_task'"),
        ("no.yaml", "no task file"),
    ):
        with pytest.raises(UsageError, match=sentence):
            zero_shot(lm, [task], None, "cpu", "")
    file = tmp_path / "bad.yaml"
    for text, sentence in (
        ("{", "not valid YAML"),
        ("- 1", "describes no task"),
        ("group: x", "describes no task"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=sentence):
            zero_shot(lm, [str(file)], None, "cpu", "")
    file.write_text(CHOICE.format(data=tmp_path / "missing.jsonl"))
    with pytest.raises(NmsparseError) as caught:
        zero_shot(lm, [str(file)], None, "cpu", "")
    assert "\n" not in caught.value.message and "pico_choice" in caught.value.message


def table_lm(table: np.ndarray, longest: int = 8) -> EngineLM:
    """Logits that depend on the last token alone."""
    from tests.fixtures import pico

    return EngineLM(lambda ids: table[ids], pico.tokenizer(), longest)


def test_scores_are_those_of_a_table():
    table = np.random.default_rng(0).normal(size=(260, 260)).astype(np.float32)
    logp = torch.from_numpy(table).log_softmax(-1)
    lm = table_lm(table)
    a, b, c = (lm.tok_encode(x)[0] for x in "abc")
    ((score, greedy),) = lm.loglikelihood(asked("loglikelihood", [("a", "bc")]), disable_tqdm=True)
    assert score == pytest.approx(float(logp[a, b] + logp[b, c]), abs=1e-5)
    assert greedy == (int(logp[a].argmax()) == b and int(logp[b].argmax()) == c)
    ids = lm.tok_encode("abc" * 9)  # 27 tokens, windows of 8: every token once
    (total,) = lm.loglikelihood_rolling(asked("loglikelihood_rolling", [("abc" * 9,)]))
    assert total == pytest.approx(
        float(sum(logp[x, y] for x, y in zip([256, *ids], ids))), abs=1e-4
    )


def test_generation_stops_where_it_should():
    table = np.full((260, 260), -9.0, dtype=np.float32)
    lm = table_lm(table, longest=64)
    letters = [lm.tok_encode(x)[0] for x in "abcd"]
    for here, then in zip(letters, [*letters[1:], letters[0]]):
        table[here, then] = 9.0  # a b c d a b ...

    def call(**settings):
        return lm.generate_until(asked("generate_until", [("a", {"max_gen_toks": 6, **settings})]))[
            0
        ]

    assert (
        call() == "bcdabc"
        and call(until=["d"]) == "bc"
        and call(until="cd") == "b"
        and call(until=["x"]) == "bcdabc"
    )
    table[letters[2]] = -9.0
    table[letters[2], 256] = 9.0  # the end after c
    assert call() == "bc"
    with pytest.raises(ValueError, match="greedily"):
        call(do_sample=True)
    with pytest.raises(ValueError, match="longer than"):
        call(max_gen_toks=64)
