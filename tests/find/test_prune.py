"""The prune stage end to end on two-block models: exactness on disk, resume, refusal, damaged
input."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nmsparse_deploy.errors import CheckFailed, NmsparseError, UsageError
from nmsparse_deploy.find.methods.base import Method
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.prove import verify_checkpoint
from nmsparse_deploy.prove.group_counter import check
from nmsparse_deploy.recipe import Prune, validate
from nmsparse_deploy.registry import METHODS
from tests import ROOT
from tests.find.methods.test_methods import METHODS_HERE
from tests.fixtures import pico


def spec(texts, method="sparsegpt", **changes) -> Prune:
    calibration = {"data": str(texts["calibration"]), "samples": 6, "length": 32, "batch": 2}
    return validate(Prune, {"method": method, "calibration": calibration, **changes})


def mask_bytes(run) -> bytes:
    return (run / "masks.safetensors").read_bytes()


@pytest.mark.parametrize("name", METHODS_HERE)
def test_every_method_ends_verified_and_loads_in_the_stock_library(
    name, llama_dir, texts, tmp_path
):
    run = prune(str(llama_dir), spec(texts, name), tmp_path / "run")
    masks = MaskSet.load(run / "masks.safetensors")
    dense = dict(AutoModelForCausalLM.from_pretrained(llama_dir).named_parameters())
    masks.check_base(dense)
    pruned = dict(AutoModelForCausalLM.from_pretrained(run / "model").named_parameters())
    assert len(masks.masks) == 14
    for key, weight in pruned.items():
        if key in masks.masks:
            assert check(weight, masks.masks[key].pattern).bad == 0
            assert (weight[~masks.masks[key].unpack()] == 0).all()
        else:
            assert torch.equal(weight, dense[key])
        if not METHODS[name].updates_weights and key in masks.masks:
            assert torch.equal(weight, masks.masks[key].apply(dense[key]))
    assert verify_checkpoint(run / "model", masks).ok
    record = run.manifest().stages["prune"]
    assert record.layers == 14 and not (run / "blocks").exists()
    layers = run.read_json("layers.json")
    assert all(0 < row["peak_memory_mb"] <= record.peak_memory_mb for row in layers)
    assert all(
        (row["relative_error"] is not None) == (METHODS[name].needs == "gram") for row in layers
    )


def test_conv1d_groups_along_its_first_axis(texts, tmp_path):
    folder = pico.save(pico.gpt2(), tmp_path / "gpt2")
    run = prune(str(folder), spec(texts), tmp_path / "run")
    masks = MaskSet.load(run / "masks.safetensors").masks
    assert {mask.axis for mask in masks.values()} == {0}
    weights = load_file(run / "model" / "model.safetensors")
    name = next(n for n in weights if n.endswith("h.0.mlp.c_fc.weight"))
    assert check(weights[name], masks["transformer.h.0.mlp.c_fc.weight"].pattern, axis=0).bad == 0


def test_bf16_checkpoints_stay_bf16(texts, tmp_path):
    folder = pico.save(pico.llama().to(torch.bfloat16), tmp_path / "bf16")
    run = prune(str(folder), spec(texts), tmp_path / "run")
    assert {t.dtype for t in load_file(run / "model" / "model.safetensors").values()} == {
        torch.bfloat16
    }


class Stop(Exception):
    pass


def stop_at(block: int):
    def progress(text: str, done: int = 0, total: int = 0) -> None:
        if f"block {block}" in text:
            raise Stop

    return progress


def test_resume_gives_the_same_bits(llama_dir, texts, tmp_path):
    whole = prune(str(llama_dir), spec(texts), tmp_path / "whole")
    with pytest.raises(Stop):
        prune(str(llama_dir), spec(texts), tmp_path / "broken", progress=stop_at(1))
    assert [f.name for f in (tmp_path / "broken" / "blocks").iterdir()] == ["000.safetensors"]
    resumed = prune(str(llama_dir), spec(texts), tmp_path / "broken")
    assert mask_bytes(resumed) == mask_bytes(whole)
    one, two = (load_file(r / "model" / "model.safetensors") for r in (whole, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_killed_process_resumes_to_the_same_bits(llama_dir, texts, tmp_path):
    """A real SIGKILL in the middle of the second block's write."""
    script = textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        from nmsparse_deploy.runs import run_dir as rundir
        from nmsparse_deploy.find.prune import prune
        from nmsparse_deploy.recipe import Prune
        whole = rundir._sync
        def sync(path):
            if path.name == "001.safetensors":
                os.kill(os.getpid(), signal.SIGKILL)
            whole(path)
        rundir._sync = sync
        prune({str(llama_dir)!r}, Prune.model_validate_json({spec(texts).model_dump_json()!r}), Path({str(tmp_path / "run")!r}))
    """)
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [f.name for f in (tmp_path / "run" / "blocks").glob("*.safetensors")] == [
        "000.safetensors"
    ]
    resumed = prune(str(llama_dir), spec(texts), tmp_path / "run")
    whole = prune(str(llama_dir), spec(texts), tmp_path / "whole")
    assert mask_bytes(resumed) == mask_bytes(whole)


def test_a_finished_run_is_kept_and_another_recipe_refused(llama_dir, texts, tmp_path):
    run = prune(str(llama_dir), spec(texts), tmp_path / "run")
    stamp = os.stat(run / "masks.safetensors").st_mtime_ns
    said = []
    prune(
        str(llama_dir), spec(texts), tmp_path / "run", progress=lambda text, *_: said.append(text)
    )
    assert os.stat(run / "masks.safetensors").st_mtime_ns == stamp and "finished" in said[0]
    with pytest.raises(UsageError, match=r"method \('sparsegpt' there, 'wanda' now\)"):
        prune(str(llama_dir), spec(texts, "wanda"), tmp_path / "run")
    prune(str(llama_dir), spec(texts, "wanda"), tmp_path / "run", force=True)
    assert run.manifest().recipe.method == "wanda"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["manifest.json", "mine.txt"])
def test_a_foreign_folder_is_refused_before_the_model_is_loaded(
    llama_dir, texts, tmp_path, force, name
):
    (tmp_path / name).write_text('{"name": "an app"}')
    said = []
    with pytest.raises(UsageError, match=r"not that of a run|not a run folder|not written by"):
        prune(
            str(llama_dir),
            spec(texts, "magnitude"),
            tmp_path,
            force,
            progress=lambda text, *_: said.append(text),
        )
    assert not said and [path.name for path in tmp_path.iterdir()] == [name]


def test_default_folders_of_two_recipes_differ(llama_dir, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = prune(str(llama_dir), spec(texts, "wanda"))
    two = prune(str(llama_dir), spec(texts, "wanda", exclude=["*down_proj*"]))
    assert one.path == Path("runs/pico-llama-wanda-2-4") and two.path.name.startswith(
        "pico-llama-wanda-2-4-"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value, texts, tmp_path):
    module = pico.llama()
    module.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    folder = pico.save(module, tmp_path / "bad")
    with pytest.raises(NmsparseError, match=r"layers.1.mlp.up_proj.weight.*NaN or Inf"):
        prune(str(folder), spec(texts), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_problems_leave_no_folder_behind(llama_dir, texts, tmp_path):
    for data in ({"samples": 0}, {"samples": 10**6}, {"data": str(tmp_path / "none.txt")}):
        calibration = spec(texts).calibration.model_dump() | data
        with pytest.raises(UsageError):
            prune(str(llama_dir), spec(texts, calibration=calibration), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_models_that_cannot_be_loaded(texts, tmp_path):
    for name, files in {
        "empty": {},
        "junk": {"config.json": "{"},
        "odd": {"config.json": '{"model_type": "nope"}'},
    }.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
        with pytest.raises(NmsparseError) as caught:
            prune(str(tmp_path / name), spec(texts), tmp_path / "run")
        assert "\n" not in caught.value.message and name in caught.value.message
    (tmp_path / "x.gguf").write_bytes(b"nonsense")
    with pytest.raises(UsageError, match="not a GGUF file"):
        prune(str(tmp_path / "x.gguf"), spec(texts), tmp_path / "run")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(UsageError, match="cannot be read"):
        prune(str(tmp_path / "x.gguf"), spec(texts), tmp_path / "run")
    with pytest.raises(NmsparseError, match="hub cannot be reached"):
        prune("nobody/no-such-model", spec(texts), tmp_path / "run")
    with pytest.raises(UsageError, match="There is no model"):
        prune("./no/such/folder", spec(texts), tmp_path / "run")


def test_truncated_and_lying_weights(llama_dir, texts, tmp_path):
    import shutil

    folder = tmp_path / "cut"
    shutil.copytree(llama_dir, folder)
    whole = (folder / "model.safetensors").read_bytes()
    for damaged in (whole[:-100], whole[:50], b"\xff" * 8 + whole[8:]):
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(UsageError, match="damaged or truncated"):
            prune(str(folder), spec(texts), tmp_path / "run")


def test_a_damaged_result_is_not_called_done(llama_dir, texts, tmp_path, monkeypatch):
    """If what was saved does not hold the pattern, the stage fails and is not marked as
    finished."""
    real = LoadedModel.save

    def spoil(model, folder, changed):
        real(model, folder)
        state = load_file(folder / "model.safetensors")
        state["model.layers.0.mlp.up_proj.weight"].fill_(1.0)
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(LoadedModel, "save", spoil)
    with pytest.raises(CheckFailed, match="fails verification"):
        prune(str(llama_dir), spec(texts), tmp_path / "run")
    monkeypatch.undo()
    run = prune(str(llama_dir), spec(texts), tmp_path / "run")  # the blocks are still there
    assert run.finished("prune")


def test_conv1d_is_its_transposed_linear():
    """Property 22."""
    from nmsparse_deploy.find.calibration.layer_stats import LayerStats
    from nmsparse_deploy.models.base import from_rows, to_rows
    from nmsparse_deploy.pattern import TWO_FOUR

    weight = torch.randn(32, 12)  # [in, out]
    x = torch.randn(64, 32)
    stats = LayerStats(64, x.square().sum(0), x.T @ x)
    for name in METHODS_HERE:
        method = Method.load(name)
        stored = from_rows(
            method.prune_layer(to_rows(weight, 0), stats, TWO_FOUR).mask, weight.shape, 0
        )
        linear = method.prune_layer(to_rows(weight.T.contiguous(), 1), stats, TWO_FOUR).mask
        assert torch.equal(stored, linear.T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_pattern_survives_saving_and_casting(dtype, llama_dir, texts, tmp_path):
    """Property 24; the ONNX part is in tests/ship/onnx."""
    run = prune(str(llama_dir), spec(texts), tmp_path / "run")
    masks = MaskSet.load(run / "masks.safetensors")
    AutoModelForCausalLM.from_pretrained(run / "model", dtype=dtype).save_pretrained(
        tmp_path / "again"
    )
    report = verify_checkpoint(tmp_path / "again", masks)
    assert report.ok and report.checked == 14
