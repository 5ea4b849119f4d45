"""Calibration on prepared inputs: any argument of the forward pass, and one sentence for a bad
file."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from nmsparse_deploy import models
from nmsparse_deploy.data.calibration_sample import draw
from nmsparse_deploy.data.tensor_inputs import prepared
from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.recipe import Calibration
from tests.fixtures import pico
from tests.fixtures.zoo import FAMILIES


def test_a_language_model_eats_prepared_tokens(llama_dir, tmp_path):
    ids = torch.arange(60).view(6, 10)
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    sample = draw(
        models.load(str(llama_dir)), Calibration(data=str(tmp_path / "ids.safetensors"), samples=4)
    )
    assert torch.equal(sample.inputs["input_ids"], ids[:4])
    assert sample.to_json()["samples"] == 4 and sample.to_json()["inputs"] == {"input_ids": [4, 10]}


def test_the_fingerprint_is_that_of_all_values(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        save_file(
            {"x": torch.randn(3, 2, generator=torch.Generator().manual_seed(seed))},
            tmp_path / f"{name}.safetensors",
        )
    one, same, other = (
        prepared(str(tmp_path / f"{name}.safetensors"), 2).fingerprint for name in "abc"
    )
    assert one == same != other


def test_bad_files_are_one_sentence(tmp_path):
    file = tmp_path / "x.safetensors"
    with pytest.raises(UsageError, match="no file"):
        prepared(str(file), 4)
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(UsageError, match="damaged"):
        prepared(str(file), 4)
    for tensors in ({}, {"a": torch.zeros(2, 1), "b": torch.zeros(3, 1)}, {"a": torch.tensor(1.0)}):
        save_file(tensors, file)
        with pytest.raises(UsageError, match="samples each"):
            prepared(str(file), 4)


def test_the_decoder_is_taught_what_the_encoder_reads(tmp_path):
    FAMILIES["T5"].build(tmp_path / "model")
    loaded = models.load(str(tmp_path / "model"))
    assert loaded.family == "seq2seq"
    text = pico.text(tmp_path, "text.txt", 1)
    inputs = draw(loaded, Calibration(data=str(text), samples=3, length=16)).inputs
    assert torch.equal(inputs["decoder_input_ids"][:, 1:], inputs["input_ids"][:, :-1])
    assert (inputs["decoder_input_ids"][:, 0] == loaded.module.config.decoder_start_token_id).all()


def test_a_speech_model_asks_for_prepared_inputs(tmp_path):
    FAMILIES["Whisper"].build(tmp_path / "model")
    loaded = models.load(str(tmp_path / "model"))
    with pytest.raises(UsageError, match="reads input_features") as caught:
        draw(
            loaded, Calibration(data=str(pico.text(tmp_path, "text.txt", 1)), samples=2, length=16)
        )
    assert ".safetensors" in caught.value.hint
