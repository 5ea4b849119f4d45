"""What a model's folder had, the pruned model has: everything that is no weight goes along."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoProcessor,
    BertConfig,
    BertModel,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from nmsparse_deploy import models
from nmsparse_deploy.find import offload
from nmsparse_deploy.find.footprint import Footprint
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.models.model_folder import carried_files
from nmsparse_deploy.system import memory
from tests.find.test_prune import spec
from tests.fixtures import pico


def llava(folder: Path) -> Path:
    """A vision-language model of two blocks with its processor, in the older layout of files."""
    torch.manual_seed(0)
    tokenizer = pico.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<image>"]})
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    text = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
    )
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=image)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    seen = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        seen,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template="{{ messages }}",
    ).save_pretrained(folder)
    seen.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("streamed", [False, True])
def test_the_processor_of_a_vision_language_model(streamed, texts, tmp_path, monkeypatch):
    folder = llava(tmp_path / "llava")
    if streamed:
        monkeypatch.setattr(offload, "footprint", lambda *_: Footprint(10**15, 0, 0))
        monkeypatch.setattr(memory, "free_memory", lambda: 1)
    run = prune(str(folder), spec(texts, "wanda"), tmp_path / "run")
    there, here = (AutoProcessor.from_pretrained(place) for place in (folder, run / "model"))
    assert type(here) is LlavaProcessor and here.chat_template == there.chat_template
    assert here.to_dict() == there.to_dict()
    names = {file.name for file in folder.iterdir()} - {"model.safetensors"}
    assert "preprocessor_config.json" in names
    assert names <= {file.name for file in (run / "model").iterdir()}


def sentence_model(folder: Path) -> Path:
    """An encoder as sentence-transformers keeps it: pooling and a projection in folders beside."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=pico.VOCABULARY,
    )
    pico.save(BertModel(config, add_pooling_layer=False), folder)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    modules = [{"path": path, "type": f"models.{kind}"} for path, kind in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "config_sentence_transformers.json").write_text("{}")
    for path in ("1_Pooling", "2_Dense"):
        (folder / path).mkdir()
        (folder / path / "config.json").write_text('{"word_embedding_dimension": 64}')
    save_file({"linear.weight": torch.eye(64)}, folder / "2_Dense/model.safetensors")
    return folder


def test_the_modules_of_sentence_transformers(texts, tmp_path):
    folder = sentence_model(tmp_path / "sentences")
    run = prune(str(folder), spec(texts, "magnitude"), tmp_path / "run")
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/config.json"):
        assert (run / "model" / name).read_bytes() == (folder / name).read_bytes()
    assert load_file(run / "model/2_Dense/model.safetensors").keys() == {"linear.weight"}
    AutoModel.from_pretrained(run / "model")


CARRIED = ["README.md", "LICENSE", "vocab.txt", "code.py", "images/a.png", ".gitattributes"]
LEFT = [
    "tf_model.h5",
    "pytorch_model.bin",
    "model.safetensors.index.json.bin",
    "onnx/model.onnx",
    "quantize_config.json",
    ".git/config",
    "__pycache__/code.pyc",
    "checkpoint-500/config.json",
    "another-run/manifest.json",
    "another-run/report/index.html",
]


def test_all_but_weights_is_carried_and_what_was_saved_wins(texts, tmp_path):
    folder = pico.save(pico.llama(), tmp_path / "model")
    for name in (*CARRIED, *LEFT):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("carried")
    config = json.loads((folder / "config.json").read_text()) | {
        "auto_map": {"AutoModel": "code.M"}
    }
    (folder / "config.json").write_text(json.dumps(config))
    run = prune(str(folder), spec(texts, "magnitude"), folder / "run")  # inside of the model's own
    for name in CARRIED:
        assert (run / "model" / name).read_text() == "carried"
    assert not any((run / "model" / name).exists() for name in (*LEFT, "run"))
    assert "auto_map" not in (run / "model/config.json").read_text()  # nobody is asked to run it
    assert models.load(str(run / "model")).module.config.model_type == "llama"


def test_paths_of_modules_do_not_leave_the_folder(tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/model.safetensors").write_text("x")
    folder = tmp_path / "model"
    folder.mkdir()
    for hostile in ('[{"path": "../secret"}]', '[{"path": "."}]', "[3]", "{", '{"a": 1}'):
        (folder / "modules.json").write_text(hostile)
        (folder / "model.safetensors").write_text("x")
        (folder / "adapter_config.json").write_text("{}")
        assert [*carried_files(folder)] == ["modules.json"]


def test_links_out_of_the_folder_are_not_followed_but_those_of_the_hubs_cache(tmp_path):
    """A stranger's folder may link to a private file, which would be published with the model."""
    (tmp_path / "secret").write_text("private")
    snapshot = tmp_path / "models--a--b/snapshots/0"
    blobs = tmp_path / "models--a--b/blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    (blobs / "1").write_text("{}")
    (snapshot / "preprocessor_config.json").symlink_to("../../blobs/1")
    (snapshot / "notes.txt").symlink_to(tmp_path / "secret")
    (snapshot / "loop.txt").symlink_to("loop.txt")
    assert [*carried_files(snapshot)] == ["preprocessor_config.json"]
