"""A tensor that is in no file is refused: the library would fill it at random, and it would be
pruned and verified."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file

from nmsparse_deploy import models
from nmsparse_deploy.cli import app, invoke
from tests.fixtures import pico


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"]
)
def test_a_tensor_that_is_in_no_file_is_refused(name, tmp_path, capfd):
    folder = pico.save(pico.llama(), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    words = ["prune", str(folder), "--method", "magnitude", "--out", str(tmp_path / "run")]
    assert invoke(lambda: app(words)) == 2
    err = " ".join(capfd.readouterr().err.split())
    assert (
        f"is incomplete: '{name}'" in err
        and "1 missing in all" in err
        and not (tmp_path / "run").exists()
    )


def test_a_model_without_its_head_is_loaded_and_the_record_names_what_was_left_out(tmp_path):
    folder = pico.save(pico.llama(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))
    assert models.load(str(folder)).provenance["unused_tensors"] == "1: lm_head.weight"


def test_tied_heads_are_not_missing(tmp_path):
    models.load(str(pico.save(pico.llama(tie_word_embeddings=True), tmp_path / "model")))
