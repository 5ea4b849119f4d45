"""A run is bound to the content of what it is made from: a resumed or finished run whose weights,
tokenizer or text were replaced is refused by name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nmsparse_deploy.cli import app, invoke
from nmsparse_deploy.data import calibration_sample
from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.find import offload
from nmsparse_deploy.find.footprint import Footprint
from nmsparse_deploy.find.import_masks import import_result
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.runs.load import load_dense
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.system import memory
from tests.find.test_prune import Stop, mask_bytes, spec, stop_at
from tests.fixtures import pico


@pytest.fixture
def inputs(tmp_path, texts) -> tuple[Path, dict[str, Path]]:
    """A model's folder and a text that the test may change."""
    folder = pico.save(pico.llama(), tmp_path / "model")
    (folder / "README.md").write_text("A model.")
    text = tmp_path / "text.txt"
    shutil.copy(texts["calibration"], text)
    return folder, {"calibration": text}


def other_weights(folder: Path, _: Path) -> None:
    pico.llama(seed=1).save_pretrained(folder)


def other_number(folder: Path, _: Path) -> None:
    """One value of a tensor that is never pruned; the file has the same size and time."""
    file = folder / "model.safetensors"
    stamp, tensors = file.stat(), load_file(file)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, file, {"format": "pt"})
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert file.stat().st_size == stamp.st_size


def other_config(folder: Path, _: Path) -> None:
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | {"rms_norm_eps": 1e-3}))


def other_tokenizer(folder: Path, _: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"<end>"', '"<stop>"'))


def other_text(_: Path, text: Path) -> None:
    text.write_text(text.read_text().replace("a", "b"))


CHANGES = {
    other_weights: "'model.safetensors'",
    other_number: "'model.safetensors'",
    other_config: "'config.json'",
    other_tokenizer: "'tokenizer.json'",
    other_text: "text.txt'",
}


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_inputs_are_refused_by_name(change, finished, inputs, tmp_path):
    folder, texts = inputs
    run = tmp_path / "run"
    if finished:
        prune(str(folder), spec(texts), run)
    else:
        with pytest.raises(Stop):
            prune(str(folder), spec(texts), run, progress=stop_at(1))
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    change(folder, texts["calibration"])
    with pytest.raises(UsageError, match="begun with other inputs") as caught:
        prune(str(folder), spec(texts), run)
    assert caught.value.exit_code == 2 and CHANGES[change] in caught.value.message
    assert "\n" not in caught.value.message and "--force" in (caught.value.hint or "")
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    afresh = prune(str(folder), spec(texts), run, force=True)
    assert mask_bytes(afresh) == mask_bytes(prune(str(folder), spec(texts), tmp_path / "new"))


def test_what_is_not_read_and_times_do_not_matter(inputs, tmp_path):
    folder, texts = inputs
    with pytest.raises(Stop):
        prune(str(folder), spec(texts), tmp_path / "run", progress=stop_at(1))
    (folder / "README.md").write_text("The same model.")
    for file in folder.iterdir():
        os.utime(file, (0, 0))
    run = prune(str(folder), spec(texts), tmp_path / "run")
    assert run.finished("prune")
    record = run.manifest().inputs
    assert record is not None and record.sample is not None
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= record.model.keys()
    assert "README.md" not in record.model and [*record.data] == [str(texts["calibration"])]


def test_files_that_came_and_went_are_told_apart(inputs, tmp_path):
    folder, texts = inputs
    run = prune(str(folder), spec(texts), tmp_path / "run")
    (folder / "added_tokens.json").write_text("{}")
    with pytest.raises(UsageError, match=r"'added_tokens.json' \(new\)"):
        prune(str(folder), spec(texts), run.path)
    (folder / "added_tokens.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UsageError, match=r"'tokenizer_config.json' \(gone\)"):
        prune(str(folder), spec(texts), run.path)


def test_the_drawn_sample_is_compared_where_its_files_are_not(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration_sample, "MAX_HASHED", 0)
    folder, texts = inputs
    with pytest.raises(Stop):
        prune(str(folder), spec(texts), tmp_path / "run", progress=stop_at(1))
    other_text(folder, texts["calibration"])
    with pytest.raises(UsageError, match="changed since: the calibration sample"):
        prune(str(folder), spec(texts), tmp_path / "run")
    assert not RunDir(tmp_path / "run").finished("prune")


def test_a_folder_of_texts_and_one_of_several_sources(inputs, tmp_path, texts):
    folder, own = inputs
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/page.txt").write_bytes(own["calibration"].read_bytes())
    mixed = {"calibration": f"{tmp_path / 'corpus'}+{texts['held_out']}"}
    prune(str(folder), spec(mixed), tmp_path / "run")
    (tmp_path / "corpus/page.txt").write_bytes(texts["held_out"].read_bytes()[::-1])
    with pytest.raises(UsageError, match=r"page\.txt'"):
        prune(str(folder), spec(mixed), tmp_path / "run")


def test_shards_and_files_of_pytorch(inputs, tmp_path):
    folder, texts = inputs
    shards = tmp_path / "shards"
    pico.llama().save_pretrained(shards, max_shard_size="100KB")
    pico.tokenizer().save_pretrained(shards)
    prune(str(shards), spec(texts, "magnitude"), tmp_path / "run")
    last = sorted(shards.glob("*.safetensors"))[-1]
    save_file({k: v + 1 for k, v in load_file(last).items()}, last, {"format": "pt"})
    with pytest.raises(UsageError, match=f"'{last.name}'"):
        prune(str(shards), spec(texts, "magnitude"), tmp_path / "run")

    old = tmp_path / "old"
    shutil.copytree(folder, old)
    (old / "model.safetensors").unlink()
    torch.save(pico.llama().state_dict(), old / "pytorch_model.bin")
    prune(str(old), spec(texts, "magnitude"), tmp_path / "old-run")
    torch.save(pico.llama(seed=1).state_dict(), old / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"'pytorch_model.bin'"):
        prune(str(old), spec(texts, "magnitude"), tmp_path / "old-run")


@pytest.mark.parametrize("streamed", [False, True])
def test_weights_that_change_while_they_are_read(streamed, inputs, tmp_path, monkeypatch):
    """Blocks before and after are of two checkpoints, so nothing is saved: weights that are read
    into memory are pages of their file."""
    folder, texts = inputs

    def overwrite_at_block_1(text: str, done: int = 0, total: int = 0) -> None:
        if "block 1" in text:
            other = pico.save(pico.llama(seed=1), tmp_path / "other")
            with open(folder / "model.safetensors", "r+b") as file:
                file.write((other / "model.safetensors").read_bytes())

    if streamed:
        monkeypatch.setattr(offload, "footprint", lambda *_: Footprint(10**15, 0, 0))
        monkeypatch.setattr(memory, "free_memory", lambda: 1)
    with pytest.raises(UsageError, match=r"'model.safetensors'"):
        prune(str(folder), spec(texts), tmp_path / "run", progress=overwrite_at_block_1)
    assert not (tmp_path / "run/model").exists()


def test_learning_is_not_continued_on_other_weights(inputs, tmp_path):
    folder, texts = inputs
    learn = {"steps": 4, "objective": "global", "checkpoint_every": 1, "evaluate_every": 2}
    learned = spec(texts, "maskllm", learn=learn)

    def stop(text: str, done: int = 0, total: int = 0) -> None:
        if (tmp_path / "run/learning").is_dir() and [*(tmp_path / "run/learning").iterdir()]:
            raise Stop

    with pytest.raises(Stop):
        prune(str(folder), learned, tmp_path / "run", progress=stop)
    other_weights(folder, folder)
    with pytest.raises(UsageError, match=r"'model.safetensors'"):
        prune(str(folder), learned, tmp_path / "run")


def test_masks_that_learning_starts_from_are_inputs(inputs, tmp_path):
    folder, texts = inputs
    prior = prune(str(folder), spec(texts, "magnitude"), tmp_path / "prior")
    shutil.copy(prior / "masks.safetensors", tmp_path / "prior.safetensors")
    learn = {"steps": 1, "objective": "block", "priors": [str(tmp_path / "prior.safetensors")]}
    prune(str(folder), spec(texts, "maskllm", learn=learn), tmp_path / "run")
    other = prune(str(folder), spec(texts, "wanda"), tmp_path / "other")
    shutil.copy(other / "masks.safetensors", tmp_path / "prior.safetensors")
    with pytest.raises(UsageError, match=r"prior.safetensors'"):
        prune(str(folder), spec(texts, "maskllm", learn=learn), tmp_path / "run")


@pytest.mark.parametrize("imported", [False, True])
def test_the_dense_twin_is_the_very_model(imported, inputs, tmp_path):
    folder, texts = inputs
    run = prune(str(folder), spec(texts, "magnitude"), tmp_path / "run")
    if imported:
        run = import_result(str(folder), sparse=str(run / "model"), out=tmp_path / "imported").run
    load_dense(run)
    other_number(folder, folder)  # no masked weight, so its hash does not tell
    with pytest.raises(UsageError, match=r"'model.safetensors'"):
        load_dense(run)


def test_the_command_exits_2_in_one_sentence(inputs, tmp_path, capsys):
    folder, _ = inputs
    command = ["prune", str(folder), "--method", "magnitude", "--out", str(tmp_path / "run")]
    assert invoke(lambda: app(command)) == 0
    other_weights(folder, folder)
    assert invoke(lambda: app(command)) == 2
    error = capsys.readouterr().err
    assert "model.safetensors" in error and "Traceback" not in error
    assert invoke(lambda: app([*command, "--force"])) == 0


def test_a_plan_belongs_to_the_weights_it_was_made_from(inputs, tmp_path, capsys):
    folder, texts = inputs
    data = ["--data", str(texts["calibration"]), "--samples", "2", "--length", "32"]
    plan = tmp_path / "plan.yaml"
    asked = ["plan", str(folder), "--budget", "0.5", *data, "--out", str(plan)]
    follow = ["prune", str(folder), "--method", "magnitude", "--plan", str(plan), "--force"]
    follow += ["--out", str(tmp_path / "run")]
    assert invoke(lambda: app(asked)) == 0 and invoke(lambda: app(follow)) == 0
    other_weights(folder, folder)
    capsys.readouterr()
    assert invoke(lambda: app(follow)) == 2
    error = capsys.readouterr().err
    assert "model.safetensors" in error and "made from other inputs" in " ".join(error.split())
    plan.write_text(plan.read_text().replace("inputs:", "before:"))  # it does not say
    assert invoke(lambda: app(follow)) == 0
