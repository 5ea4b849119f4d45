"""A quantised checkpoint is refused before any work: its codes are no weights without their
scales."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nmsparse_deploy.cli import app, invoke
from tests.fixtures import pico

NAME = "model.layers.0.mlp.up_proj.weight"
SCHEMES = {
    "fp8": {"quant_method": "fp8"},
    "modelopt FP8": {"quant_method": "modelopt", "quant_algo": "FP8"},
    "modelopt NVFP4": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "compressed-tensors": {"quant_method": "compressed-tensors"},
    "torchao": {"quant_method": "torchao"},
    "mxfp4": {"quant_method": "mxfp4"},
}


def refused(folder: Path, words: str, capfd) -> None:
    for command in (["inspect"], ["--json", "inspect"], ["prune", "--method", "magnitude"]):
        out = ["--out", str(folder.parent / "run")] if "prune" in command else []
        assert invoke(lambda line=[*command, str(folder), *out]: app(line)) == 2
        captured = capfd.readouterr()
        err = " ".join(captured.err.split())
        assert (
            f"is quantised ({words}" in err
            and "dequantise it first" in err
            and "Traceback" not in err
        ), err
        assert not captured.out or json.loads(captured.out)["exit_code"] == 2
    assert not (folder.parent / "run").exists()


@pytest.fixture
def folder(tmp_path) -> Path:
    return pico.save(pico.llama(), tmp_path / "model")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_named_also_without_its_library(scheme, folder, capfd):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": SCHEMES[scheme]})
    )
    refused(folder, scheme, capfd)


def test_modelopt_s_own_file_is_read(folder, capfd):
    (folder / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {"quant_algo": "FP8"}})
    )
    refused(folder, "FP8", capfd)


@pytest.mark.parametrize("codes", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_codes_are_found_where_no_configuration_tells(codes, folder, capfd):
    tensors = load_file(folder / "model.safetensors")
    tensors[NAME] = (tensors[NAME] * 100).to(codes)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(folder, f"by no scheme that its config.json names; '{NAME}' is stored as", capfd)


@pytest.mark.parametrize(
    "name", ["weight_scale", "weight_scale_inv", "weight_packed", "qweight", "weight_scale_2"]
)
def test_scales_beside_weights_are_found(name, folder, capfd):
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.0.mlp.up_proj.{name}"] = torch.ones(1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "by no scheme", capfd)


def test_whole_numbers_of_a_dense_checkpoint_are_no_codes(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    tensors |= {
        "model.layers.0.self_attn.bias": torch.ones(4, 4, dtype=torch.uint8),
        "position_ids": torch.arange(4),
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert (
        invoke(
            lambda: app(
                ["prune", str(folder), "--method", "magnitude", "--out", str(tmp_path / "run")]
            )
        )
        == 0
    )
