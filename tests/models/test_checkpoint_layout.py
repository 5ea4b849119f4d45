"""Names and layout of a saved model are those of its checkpoint: experts one by one, older names,
prefixes. Masks keep the names of parameters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nmsparse_deploy import models
from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.find import offload
from nmsparse_deploy.find.footprint import Footprint
from nmsparse_deploy.find.import_masks import import_result
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.masks import Mask, MaskSet
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.prove.stored_views import StoredView, stored_masks
from nmsparse_deploy.recipe import Prune
from nmsparse_deploy.ship.verify_run import verify
from nmsparse_deploy.system import memory
from tests.find.test_write_run import llava
from tests.fixtures import pico
from tests.fixtures.zoo import FAMILIES

MAGNITUDE = Prune(method="magnitude")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: value
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors(folder).items()}


def vision_language(folder: Path) -> None:
    llava(folder)


def with_prefix(folder: Path) -> None:
    """A checkpoint of the whole model whose config names the part without a head."""
    pico.save(pico.llama(), folder)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["LlamaModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    state = load_file(folder / "model.safetensors")
    del state["lm_head.weight"]
    assert all(name.startswith("model.") for name in state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def without_prefix(folder: Path) -> None:
    """The part without a head, under a config that names the whole, which is tied."""
    pico.save(pico.llama(tie_word_embeddings=True), folder)
    state = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): value for name, value in state.items()}
    save_file(bare, folder / "model.safetensors", {"format": "pt"})


def family(name: str):
    return lambda folder: FAMILIES[name].build(folder)


def nomic(folder: Path) -> None:
    """Three projections in one matrix and one vector, under older names."""
    torch.manual_seed(0)
    config = transformers.NomicBertConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=pico.VOCABULARY,
    )
    pico.save(transformers.NomicBertModel(config).eval(), folder)
    assert any(name.endswith("attn.Wqkv.weight") for name in shapes(folder))


CHECKPOINTS = {
    "experts of Mixtral": family("Mixtral"),
    "experts of Qwen2-MoE": family("Qwen2-MoE"),
    "older names of GPT-NeoX": family("GPT-NeoX"),
    "older names of ViT": family("ViT"),
    "joined projections of NomicBERT": nomic,
    "a prefix": with_prefix,
    "no prefix": without_prefix,
    "a vision-language model": vision_language,
}


@pytest.fixture(params=CHECKPOINTS)
def checkpoint(request, tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    CHECKPOINTS[request.param](folder)
    return folder


def hold_streamed(monkeypatch) -> None:
    monkeypatch.setattr(offload, "footprint", lambda *_: Footprint(10**15, 0, 0))
    monkeypatch.setattr(memory, "free_memory", lambda: 1)


@pytest.mark.parametrize("streamed", [False, True])
def test_names_and_shapes_of_the_checkpoint_are_saved(streamed, checkpoint, tmp_path, monkeypatch):
    dense = models.load(str(checkpoint))
    assert dense.stored and dense.stored.keys() == shapes(checkpoint).keys()
    if streamed:
        hold_streamed(monkeypatch)
    run = prune(str(checkpoint), MAGNITUDE, tmp_path / "run")
    record = run.manifest().stages["prune"]
    assert record.memory.weights == ("streamed" if streamed else "in memory")
    assert shapes(run / "model") == shapes(checkpoint)
    assert "saved_layout" not in record.provenance
    assert verify(run)[0].ok and verify(run)[0].checked >= record.layers
    masks = MaskSet.load(run / "masks.safetensors").masks
    weights = dict(dense.module.named_parameters())
    stock = getattr(transformers, record.provenance["class"]).from_pretrained(run / "model")
    for name, weight in stock.named_parameters():
        kept = masks[name].apply(weights[name]) if name in masks else weights[name]
        assert torch.equal(weight, kept), name
    assert masks.keys() <= weights.keys()


def test_stock_computes_what_the_pruned_model_computes(tmp_path):
    FAMILIES["Mixtral"].build(tmp_path / "model")
    run = prune(str(tmp_path / "model"), MAGNITUDE, tmp_path / "run")
    ids = torch.arange(32).view(2, 16)
    stock = AutoModelForCausalLM.from_pretrained(run / "model")
    ours = models.load(str(run / "model")).module
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, ours(ids).logits)


def test_a_broken_expert_is_found_by_its_name_in_the_file(tmp_path):
    FAMILIES["Mixtral"].build(tmp_path / "model")
    run = prune(str(tmp_path / "model"), MAGNITUDE, tmp_path / "run")
    file = run / "model/model.safetensors"
    state = load_file(file)
    name = next(name for name in state if name.endswith("experts.3.w3.weight"))
    state[name][state[name] == 0] = 1.0
    save_file(state, file, {"format": "pt"})
    report = verify(run)[0]
    failed = [check for check in report.checks if check.problems]
    assert not report.ok and [check.tensor for check in failed] == [name]
    assert failed[0].parameter is not None and "gate_up_proj" in failed[0].parameter


@pytest.mark.parametrize("damage", ["", "[]", '{"a": 3}', None])
def test_a_damaged_or_missing_record_is_no_proof(damage, tmp_path):
    FAMILIES["Mixtral"].build(tmp_path / "model")
    run = prune(str(tmp_path / "model"), MAGNITUDE, tmp_path / "run")
    if damage is None:
        (run / "stored.json").unlink()
        assert not verify(run)[0].ok
        return
    (run / "stored.json").write_text(damage)
    with pytest.raises(UsageError, match=r"stored.json' is damaged"):
        verify(run)


def test_views_that_are_no_parts_are_refused():
    mask = Mask.pack(torch.tensor([[True, True, False, False]] * 2), 1, TWO_FOUR, "")
    masks = MaskSet({"w": mask})
    assert stored_masks(masks, {}) is masks
    rows = {"a": (StoredView("w", (1, 4), (4, 1), 0),), "b": (StoredView("w", (4, 1), (1, 4), 4),)}
    assert {name: part.axis for name, part in stored_masks(masks, rows).masks.items()} == {
        "a": 1,
        "b": 0,
    }
    for view in (StoredView("w", (2, 2), (4, 1), 0), StoredView("w", (9, 4), (4, 1), 0)):
        with pytest.raises(UsageError, match="no part of 'w'"):
            stored_masks(masks, {"a": (view,)})
    with pytest.raises(UsageError, match="not all of 'w'"):
        stored_masks(masks, {"a": rows["a"]})
    joined = {"x": (StoredView.whole("w", (2, 4)), StoredView.whole("w", (2, 4)))}
    assert [*stored_masks(masks, joined).masks] == ["x[0:2]", "x[2:4]"]


def test_a_part_of_a_joined_matrix_is_found_by_its_rows(tmp_path):
    nomic(tmp_path / "model")
    spec = Prune(method="magnitude", exclude=["*layers.0*k_proj*"])
    run = prune(str(tmp_path / "model"), spec, tmp_path / "run")
    assert verify(run)[0].ok  # a part of it is dense
    file = run / "model/model.safetensors"
    state = load_file(file)
    name = next(name for name in state if name.endswith("layers.1.attn.Wqkv.weight"))
    rows = state[name][64:128]
    rows[rows == 0] = 1.0
    save_file(state, file, {"format": "pt"})
    report = verify(run)[0]
    assert [check.tensor for check in report.checks if check.problems] == [f"{name}[64:128]"]
    views = json.loads((run / "stored.json").read_text())
    (run / "stored.json").write_text(json.dumps(views | {name: views[name][:2]}))
    with pytest.raises(UsageError, match="another shape"):
        verify(run)


def swapped(real):
    """Gate and up of every expert change places: what a wrong conversion of the library would do."""

    def revert(module, state):
        parts = real(module, state)
        other = {"w1": "w3", "w3": "w1"}
        return {
            ".".join(other.get(part, part) for part in name.split(".")): value
            for name, value in parts.items()
        }

    return revert


def failing(_):
    def revert(module, state):
        raise RuntimeError("not in this release")

    return revert


@pytest.mark.parametrize("spoil", [swapped, failing])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_layout_that_cannot_be_restored_is_the_librarys_own(
    streamed, spoil, tmp_path, monkeypatch
):
    from transformers import core_model_loading

    FAMILIES["Mixtral"].build(tmp_path / "model")
    real = core_model_loading.revert_weight_conversion
    monkeypatch.setattr(core_model_loading, "revert_weight_conversion", spoil(real))
    if streamed:
        hold_streamed(monkeypatch)
    run = prune(str(tmp_path / "model"), MAGNITUDE, tmp_path / "run")
    assert "MixtralForCausalLM's own" in run.manifest().stages["prune"].provenance["saved_layout"]
    assert any(name.endswith("experts.gate_up_proj") for name in shapes(run / "model"))
    assert not (run / "stored.json").exists() and verify(run)[0].ok


def test_pickled_checkpoints_and_shards(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    FAMILIES["Mixtral"].build(folder)
    wanted, state = shapes(folder), load_file(folder / "model.safetensors")
    monkeypatch.setattr("nmsparse_deploy.models.adapters.huggingface.SHARD", 50_000)
    run = prune(str(folder), MAGNITUDE, tmp_path / "run")
    assert (run / "model/model.safetensors.index.json").is_file()
    assert shapes(run / "model") == wanted
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    pickled = prune(str(folder), MAGNITUDE, tmp_path / "pickled")
    assert shapes(pickled / "model") == wanted
    assert (pickled / "masks.safetensors").read_bytes() == (run / "masks.safetensors").read_bytes()


def test_an_imported_run_has_the_names_of_the_sparse_checkpoint(tmp_path):
    FAMILIES["Mixtral"].build(tmp_path / "model")
    run = prune(str(tmp_path / "model"), MAGNITUDE, tmp_path / "run")
    shutil.copytree(run / "model", tmp_path / "sparse")
    done = import_result(
        str(tmp_path / "model"), sparse=str(tmp_path / "sparse"), out=tmp_path / "imported"
    )
    assert shapes(done.run / "model") == shapes(tmp_path / "model") and verify(done.run)[0].ok


def test_a_module_s_own_names_need_no_record(llama_dir, tmp_path):
    loaded = models.load(str(llama_dir))
    assert loaded.stored == {}
    run = prune(str(llama_dir), MAGNITUDE, tmp_path / "run")
    assert not (run / "stored.json").exists() and shapes(run / "model") == shapes(llama_dir)
