"""The files of a model: what loading reads, whichever library it is of, and what is a weight."""

from __future__ import annotations

from pathlib import Path

import pytest

from nmsparse_deploy import models
from nmsparse_deploy.models.model_folder import is_weight, loaded_files


def test_loading_reads_one_format_of_weights_and_what_describes_the_model(tmp_path):
    names = ["config.json", "model.safetensors", "pytorch_model.bin", "merges.txt", "README.md"]
    for name in names:
        (tmp_path / name).write_text(name)
    assert [file.name for file in loaded_files(tmp_path)] == [
        "model.safetensors",
        "config.json",
        "merges.txt",
    ]
    assert loaded_files(tmp_path / "nothing") == []


@pytest.mark.parametrize(
    "name", ["a.SAFETENSORS", "a.bin.index.json", "a.pth", "tf_model.h5", "a.onnx", "rust_model.ot"]
)
def test_weights_in_any_format(name):
    assert is_weight(Path(name)) and not is_weight(Path("tokenizer.model"))


def test_files_of_each_library(llama_dir, tmp_path):
    assert models.files(str(llama_dir))["config.json"] == llama_dir / "config.json"
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert models.files(str(tmp_path / "x.gguf")) == {"x.gguf": tmp_path / "x.gguf"}
    assert models.files("nobody/no-such-model") == {} == models.files("./nothing")
    assert models.files(f"timm:test_vit?checkpoint={tmp_path / 'x.gguf'}") == {
        "x.gguf": tmp_path / "x.gguf"
    }


def test_timm_by_its_names():
    pytest.importorskip("timm")
    for source in ("timm:test_vit", "timm:test_vit.nothing", "timm:nothing", "timm:hf-hub:a/b"):
        assert models.files(source) == {}  # nothing is here, and loading it says so


def test_a_pipeline_and_an_autoencoder_beside_it(tmp_path):
    pytest.importorskip("diffusers")
    from tests.fixtures.small_diffusion import pipeline

    whole = pipeline(tmp_path / "pipeline")
    read = models.files(str(whole))
    assert {
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "vae/diffusion_pytorch_model.safetensors",
    } <= read.keys()
    (whole / "vae").rename(tmp_path / "vae")
    source = f"diffusers:{whole / 'transformer'}?vae={tmp_path / 'vae'}"
    assert f"{tmp_path}/vae/diffusion_pytorch_model.safetensors" in models.files(source)
