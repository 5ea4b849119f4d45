"""What can go wrong with learning is one sentence, and the run goes on from where it was."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from nmsparse_deploy import cli
from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.find.learn.checkpoint import Checkpoints
from nmsparse_deploy.find.learn.loop import fit
from nmsparse_deploy.find.methods.maskllm import LEARNED
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.recipe import Prune, validate
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.system.distributed import Processes
from tests.fixtures import pico
from tests.fixtures.toy_learner import NAME, Planted, settings


def spec(data, **changes) -> Prune:
    learn = {"objective": "global", "steps": 4, "priors": ["magnitude"], **changes.pop("learn", {})}
    calibration = {"data": str(data), "samples": 12, "length": 32, "batch": 2}
    return validate(
        Prune, {"method": "maskllm", "calibration": calibration, "learn": learn, **changes}
    )


def test_memory_that_runs_out_is_not_the_end(tmp_path):
    """The run that follows goes on from the checkpoint, to the bits of one that never failed."""
    recipe = settings(steps=12, checkpoint_every=2, evaluate_every=3)

    def learn(subject, name):
        return fit(
            subject,
            LEARNED.make(recipe),
            subject.prior,
            recipe,
            0,
            checkpoints=Checkpoints(RunDir(tmp_path), name),
        )

    whole = learn(Planted(), "whole.safetensors")
    subject, calls = Planted(), []
    terms = subject.loss_terms

    def loss_terms(number, context):
        calls.append(number)
        if len(calls) == 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return terms(number, context)

    subject.loss_terms = loss_terms
    with pytest.raises(NmsparseError, match="out of memory") as caught:
        learn(subject, "broken.safetensors")
    assert "same command again" in caught.value.hint
    again = learn(Planted(), "broken.safetensors")
    assert again.facts.history == whole.facts.history
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(one[key], two[key]) for key in one) and torch.equal(
        again.masks[NAME].mask, whole.masks[NAME].mask
    )


@pytest.mark.parametrize("tokens", [[-1, 3], [5, pico.VOCABULARY], [5, 10**6]])
def test_tokens_of_another_vocabulary_are_named(tokens, llama_dir, tmp_path):
    ids = torch.full((12, 16), 7)
    ids[3, :2] = torch.tensor(tokens)
    save_file({"input_ids": ids}, tmp_path / "inputs.safetensors")
    for method in ("maskllm", "wanda"):
        settings_ = spec(tmp_path / "inputs.safetensors").model_dump()
        settings_ |= {
            "method": method,
            "learn": settings_["learn"] if method == "maskllm" else None,
        }
        with pytest.raises(UsageError, match=r"the vocabulary of .* has 260") as caught:
            prune(str(llama_dir), validate(Prune, settings_), tmp_path / "run")
        assert str(tokens[0] if tokens[0] < 0 else tokens[1]) in caught.value.message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("", "is empty"), (" \n\n ", "is empty"), ("a few words", "windows of 32 tokens")],
)
def test_data_that_is_not_there_is_said(text, sentence, llama_dir, tmp_path):
    (tmp_path / "data.txt").write_text(text)
    with pytest.raises(UsageError, match=sentence):
        prune(str(llama_dir), spec(tmp_path / "data.txt"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_prior_that_is_no_mask_file_is_refused(llama_dir, texts, tmp_path):
    (tmp_path / "masks.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    for name in ("masks.safetensors", "other.safetensors"):
        with pytest.raises(NmsparseError) as caught:
            prune(
                str(llama_dir),
                spec(texts["calibration"], learn={"priors": [str(tmp_path / name)]}),
                tmp_path / "run",
            )
        assert name in caught.value.message
    assert not (tmp_path / "run").exists()


def test_ctrl_c_keeps_what_was_learned(llama_dir, texts, tmp_path, monkeypatch, capfd):
    """A real SIGINT in the middle of learning: exit code 1 and a sentence; the same command ends
    the run."""
    command = [
        "prune",
        str(llama_dir),
        "--method",
        "maskllm",
        "--steps",
        "3",
        "--objective",
        "block",
        "--data",
        str(texts["calibration"]),
        "--samples",
        "12",
        "--length",
        "32",
        "--out",
        str(tmp_path / "run"),
        "--include",
        "*layers.*.mlp*",
    ]
    progress, sent = cli.output.progress, []

    def interrupted(text, done=0, total=0):
        if text.startswith("block 1: loss") and not sent:
            sent.append(text)
            os.kill(os.getpid(), signal.SIGINT)
        progress(text, done, total)

    before = signal.signal(signal.SIGINT, cli._interrupted)
    monkeypatch.setattr(cli.output, "progress", interrupted)
    try:
        assert cli.invoke(lambda: cli.app(command, standalone_mode=False)) == 1
    finally:
        signal.signal(signal.SIGINT, before)
    assert sent and "Interrupted; what was finished is kept" in capfd.readouterr().err
    assert (tmp_path / "run/blocks/000.safetensors").is_file() and not (
        tmp_path / "run/masks.safetensors"
    ).exists()
    assert cli.invoke(lambda: cli.app(command, standalone_mode=False)) == 0
    assert (tmp_path / "run/masks.safetensors").is_file()


@pytest.mark.parametrize(
    "changes", [{"learn": {"objective": "block"}}, {"refine": [{"name": "finetune"}]}]
)
def test_several_processes_share_whole_models_only(
    changes, llama_dir, texts, tmp_path, monkeypatch
):
    monkeypatch.setattr("nmsparse_deploy.system.distributed.current", lambda: Processes(0, 2))
    section = {**spec(texts["calibration"]).model_dump(), **changes}
    with pytest.raises(UsageError, match="2 processes cannot share"):
        prune(str(llama_dir), validate(Prune, section), tmp_path / "run")
