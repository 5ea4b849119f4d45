"""Weights that stay in their files: the same bits as with the whole model in memory, and no more
than a part of it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nmsparse_deploy import models
from nmsparse_deploy.cli import app, invoke
from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.find import offload as opening
from nmsparse_deploy.find.footprint import Footprint
from nmsparse_deploy.find.offload import open_model
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.recipe import Prune, validate
from nmsparse_deploy.system import memory
from tests import ROOT
from tests.find.test_prune import mask_bytes, spec
from tests.fixtures import pico
from tests.fixtures.zoo import FAMILIES

RECIPES = {
    "wanda": {"method": "wanda"},
    "magnitude": {"method": "magnitude"},
    "closed form": {"method": "group-obs", "refine": [{"name": "refit"}], "sequential": True},
    "permuted": {"method": "wanda", "permute": True},
    "reconstructed": {
        "method": "wanda",
        "refine": [{"name": "reconstruct", "epochs": 1, "holdout": 0}],
    },
}
LANGUAGE = [
    "OPT-350M",
    "LLaMA 3",
    "Qwen3",
    "Gemma 3",
    "Phi-3",
    "GPT-2",
    "GPT-NeoX",
    "BLOOM",
    "Falcon (ALiBi)",
    "Mixtral",
    "GPT-OSS",
]


@pytest.fixture
def streaming(monkeypatch):
    """Whatever the size of the model, its weights are streamed; `hold(on_disk)` says where hidden
    states are."""

    def hold(on_disk: bool = False) -> None:
        def footprint(*_args) -> Footprint:
            return Footprint(10**15, 10**15 if on_disk else 0, 0)

        monkeypatch.setattr(opening, "footprint", footprint)
        monkeypatch.setattr(memory, "free_memory", lambda: 1)

    return hold


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: value
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def same_model(one: Path, two: Path) -> None:
    a, b = tensors(one), tensors(two)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name
    for file in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        assert (one / file).is_file() == (two / file).is_file(), file
        if (one / file).is_file():
            assert (one / file).read_text() == (two / file).read_text(), file


def held(run) -> tuple[str, str]:
    memory = run.manifest().stages["prune"].memory
    return memory.weights, memory.hidden_states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RECIPES)
def test_the_same_bits_with_and_without_streaming(
    name, dtype, texts, tmp_path, streaming, monkeypatch
):
    folder = pico.save(pico.llama(num_hidden_layers=3).to(dtype), tmp_path / "model")
    recipe = spec(texts, **{"compute": "fp32", **RECIPES[name]})
    whole = prune(str(folder), recipe, tmp_path / "whole")
    streaming(on_disk=name != "magnitude")
    monkeypatch.setattr("nmsparse_deploy.models.adapters.streamed.SHARD", 100_000)
    streamed = prune(str(folder), recipe, tmp_path / "streamed")
    assert held(whole) == ("in memory", "in memory") and held(streamed)[0] == "streamed"
    assert mask_bytes(whole) == mask_bytes(streamed)
    same_model(whole / "model", streamed / "model")
    assert (streamed / "model/model.safetensors.index.json").is_file()
    assert not (streamed / "activations").exists()
    rows = [
        [
            {k: v for k, v in row.items() if k not in ("seconds", "peak_memory_mb")}
            for row in run.read_json("layers.json")
        ]
        for run in (whole, streamed)
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("name", LANGUAGE)
def test_families_give_the_same_bits(name, texts, tmp_path, streaming):
    FAMILIES[name].build(tmp_path / "model")
    recipe = spec(texts, "wanda", compute="bf16")
    whole = prune(str(tmp_path / "model"), recipe, tmp_path / "whole")
    streaming()
    streamed = prune(str(tmp_path / "model"), recipe, tmp_path / "streamed")
    assert held(streamed) == ("streamed", "in memory")
    assert mask_bytes(whole) == mask_bytes(streamed)
    same_model(whole / "model", streamed / "model")
    assert AutoModelForCausalLM.from_pretrained(streamed / "model").dtype == torch.float32


@pytest.mark.parametrize("name", ["BERT", "T5", "ViT", "DINOv2"])
def test_encoders_and_pictures_give_the_same_plan(name, tmp_path):
    FAMILIES[name].build(tmp_path / "model")
    whole, streamed = (
        models.load(str(tmp_path / "model"), stream=stream) for stream in (False, True)
    )
    one, two = (m.discover() for m in (whole, streamed))
    assert one == two


def test_only_the_parts_that_run_have_weights(llama_dir):
    loaded = models.load(str(llama_dir), stream=True)
    module, blocks = loaded.module, ["model.layers.0", "model.layers.1"]

    def present() -> set[str]:
        return {name for name, parameter in module.named_parameters() if not parameter.is_meta}

    assert not present()
    seen = []
    for path in (*blocks, "model.norm", "lm_head"):
        module.get_submodule(path).register_forward_pre_hook(lambda *_: seen.append(present()))
    with torch.no_grad(), loaded.weights.on_demand():
        out = module(**loaded.sample_inputs())
    assert not any(seen), "weights come after the hooks of a module, so nothing else has any"
    assert not present()
    whole = models.load(str(llama_dir))
    with torch.no_grad():
        assert torch.equal(out.logits, whole.module(**whole.sample_inputs()).logits)
    with loaded.weights.materialise(blocks[1]):
        assert present() == {
            name for name, _ in module.named_parameters() if name.startswith(blocks[1] + ".")
        }
        assert torch.equal(
            module.get_parameter(f"{blocks[1]}.mlp.up_proj.weight"),
            whole.module.get_parameter(f"{blocks[1]}.mlp.up_proj.weight"),
        )
    assert not present()


def test_tied_embeddings_are_one_tensor(tmp_path, texts, streaming):
    folder = pico.save(pico.llama(tie_word_embeddings=True), tmp_path / "model")
    streaming()
    run = prune(str(folder), spec(texts, "wanda"), tmp_path / "run")
    assert "lm_head.weight" not in tensors(run / "model")
    module = AutoModelForCausalLM.from_pretrained(run / "model")
    assert module.lm_head.weight is module.model.embed_tokens.weight


def test_killed_in_the_middle_and_resumed(texts, tmp_path, streaming):
    """A real SIGKILL while the second of three blocks is written, with weights and hidden states on
    disk."""
    folder = pico.save(pico.llama(num_hidden_layers=3).to(torch.bfloat16), tmp_path / "model")
    recipe = spec(texts, "sparsegpt", refine=[{"name": "refit"}])
    script = textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        from nmsparse_deploy.find import offload as opening
        from nmsparse_deploy.runs import run_dir as rundir
        from nmsparse_deploy.system import memory
        from nmsparse_deploy.find.footprint import Footprint
        from nmsparse_deploy.find.prune import prune
        from nmsparse_deploy.recipe import Prune
        opening.footprint = lambda *_: Footprint(10**15, 10**15, 0)
        memory.free_memory = lambda: 1
        whole = rundir._sync
        def sync(path):
            if path.name == "001.safetensors":
                os.kill(os.getpid(), signal.SIGKILL)
            whole(path)
        rundir._sync = sync
        prune({str(folder)!r}, Prune.model_validate_json({recipe.model_dump_json()!r}), Path({str(tmp_path / "run")!r}))
    """)
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [f.name for f in (tmp_path / "run" / "blocks").glob("*.safetensors")] == [
        "000.safetensors"
    ]
    assert any((tmp_path / "run" / "activations").rglob("0"))
    whole = prune(str(folder), recipe, tmp_path / "whole")
    streaming(on_disk=True)
    resumed = prune(str(folder), recipe, tmp_path / "run")
    assert held(resumed) == ("streamed", "on disk")
    assert mask_bytes(resumed) == mask_bytes(whole)
    same_model(whole / "model", resumed / "model")


def test_a_limit_is_predicted_and_refused(llama_dir, texts, tmp_path):
    with pytest.raises(
        NmsparseError, match=r"predicted to take .*--max-memory allows 1 MB"
    ) as caught:
        prune(str(llama_dir), spec(texts), tmp_path / "run", max_memory=10**6)
    assert "wanda" in caught.value.hint and not (tmp_path / "run").exists()


def test_a_limit_that_the_whole_model_fits_changes_nothing(llama_dir, texts, tmp_path):
    run = prune(str(llama_dir), spec(texts), tmp_path / "run", max_memory=10**12)
    memory = run.manifest().stages["prune"].memory
    assert held(run) == ("in memory", "in memory") and memory.limit_bytes == 10**12
    assert 0 < memory.peak_bytes < 10**12


def test_a_limit_that_is_passed_stops_the_run_and_a_larger_one_resumes(
    llama_dir, texts, tmp_path, streaming
):
    streaming()
    with pytest.raises(NmsparseError, match=r"Block 0 took .*finished blocks are kept"):
        prune(str(llama_dir), spec(texts), tmp_path / "run", max_memory=10**6)
    assert (tmp_path / "run/blocks/000.safetensors").is_file()
    run = prune(str(llama_dir), spec(texts), tmp_path / "run", max_memory=10**12)
    assert run.finished("prune")


def test_what_needs_the_whole_model_says_so(llama_dir, texts, tmp_path, streaming):
    streaming()
    with pytest.raises(NmsparseError, match="finetune needs the whole model in memory"):
        prune(
            str(llama_dir), spec(texts, refine=[{"name": "finetune", "steps": 2}]), tmp_path / "run"
        )
    looks_on = validate(
        Prune, {**spec(texts).model_dump(), "refine": [{"name": "reconstruct", "through": 1}]}
    )
    with pytest.raises(NmsparseError, match="reconstruct with an outlook"):
        prune(str(llama_dir), looks_on, tmp_path / "run")


def test_checkpoints_that_cannot_be_streamed(llama_dir, tmp_path):
    import shutil

    shutil.copytree(llama_dir, tmp_path / "cut")
    state = load_file(tmp_path / "cut/model.safetensors")
    del state["model.norm.weight"]
    save_file(state, tmp_path / "cut/model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"no 'model.norm.weight'"):
        models.load(str(tmp_path / "cut"), stream=True)
    state["model.norm.weight"] = torch.ones(3)
    save_file(state, tmp_path / "cut/model.safetensors", {"format": "pt"})
    loaded = models.load(str(tmp_path / "cut"), stream=True)
    with (
        pytest.raises(UsageError, match=r"'model.norm.weight'.*does not fit"),
        loaded.weights.materialise("model.norm"),
    ):
        pass


def test_the_prediction_follows_the_block_and_not_the_depth(tmp_path, texts):
    recipe = spec(texts, "wanda")
    found = []
    for layers in (2, 6):
        folder = pico.save(
            pico.llama(num_hidden_layers=layers, hidden_size=128), tmp_path / str(layers)
        )
        loaded = models.load(str(folder), stream=True)
        plan = opening.planned(loaded, recipe)
        found.append(opening.footprint(loaded, plan, recipe, torch.float32))
    assert abs(found[0].streamed - found[1].streamed) < 20e6  # what this process grew by in between
    assert found[1].whole > found[0].whole and found[0].on_disk <= found[0].streamed


@pytest.mark.parametrize(
    "text, size",
    [("3GB", 3 * 10**9), ("512 MiB", 512 << 20), ("1.5gb", 15 * 10**8), ("1e6", 10**6)],
)
def test_sizes(text, size):
    assert memory.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "3 apples", "-1GB", "0", "3GB4"])
def test_sizes_that_are_none(text):
    with pytest.raises(UsageError, match="no amount of memory"):
        memory.parse_size(text)


def test_open_model_takes_the_first_that_fits(llama_dir, texts, monkeypatch):
    monkeypatch.setattr(opening, "footprint", lambda *_: Footprint(300, 200, 100))
    recipe = spec(texts, "wanda")
    for limit, streamed, on_disk in ((300, False, False), (250, True, False), (150, True, True)):
        opened = open_model(str(llama_dir), recipe, torch.float32, limit)
        assert (opened.loaded.streamed, opened.on_disk) == (streamed, on_disk)
    with pytest.raises(NmsparseError):
        open_model(str(llama_dir), recipe, torch.float32, 50)


def test_the_command_line_says_how_a_model_was_held(llama_dir, texts, tmp_path, streaming, capfd):
    streaming()
    words = ["prune", str(llama_dir), "--method", "magnitude", "--out", str(tmp_path / "run")]
    assert invoke(lambda: app([*words, "--max-memory", "much"])) == 2
    assert "'much' is no amount of memory" in capfd.readouterr().err
    assert invoke(lambda: app([*words, "--max-memory", "100GB"])) == 0
    assert "weights streamed, hidden states in memory; peak memory" in capfd.readouterr().out


def test_cost_tells_all_three_peaks(llama_dir, capfd):
    assert invoke(lambda: app(["--json", "inspect", str(llama_dir), "--cost"])) == 0
    cost = json.loads(capfd.readouterr().out)
    assert cost["memory_mb"] > 0 and cost["streamed_memory_mb"] >= cost["on_disk_memory_mb"] > 0
