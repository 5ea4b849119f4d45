"""The trial pass that finds a model's layers: what it needs of a model, and what it says when it
gets none."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from nmsparse_deploy import models
from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.find.inspect import inspect
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.models.adapters.architectures import family
from nmsparse_deploy.models.discovery import discover
from nmsparse_deploy.recipe import Prune, validate
from tests.fixtures import pico
from tests.models.test_discovery import Net


@pytest.fixture
def classifier(tmp_path):
    """A decoder that classifies, with no padding token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=pico.VOCABULARY,
        num_labels=3,
    )
    assert config.pad_token_id is None
    return pico.save(LlamaForSequenceClassification(config).eval(), tmp_path / "model")


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_a_classifier_without_a_padding_token(method, classifier, texts, tmp_path):
    plan = inspect(str(classifier))
    assert len(plan.pruned()) == 14
    assert {s.name for s in plan.skipped} == {"model.embed_tokens.weight", "score.weight"}
    calibration = {"data": str(texts["calibration"]), "samples": 4, "length": 32, "batch": 2}
    spec = validate(Prune, {"method": method, "calibration": calibration})
    run = prune(str(classifier), spec, tmp_path / "run")
    assert len(MaskSet.load(run / "masks.safetensors").masks) == 14
    assert models.load(str(run / "model")).module.config.pad_token_id is None


def test_magnitude_needs_no_tokenizer_and_the_others_say_that_there_is_none(tmp_path):
    pico.llama().save_pretrained(tmp_path / "model")
    run = prune(str(tmp_path / "model"), Prune(method="magnitude"), tmp_path / "run")
    assert len(MaskSet.load(run / "masks.safetensors").masks) == 14
    assert not list((run / "model").glob("tokenizer*"))
    with pytest.raises(UsageError, match="has no tokenizer that can be loaded") as caught:
        spec = validate(Prune, {"method": "wanda", "calibration": {"length": 32}})
        prune(str(tmp_path / "model"), spec, tmp_path / "other")
    assert "magnitude" in caught.value.hint and not (tmp_path / "other").exists()


def test_a_forward_pass_that_refuses_its_inputs_is_one_sentence():
    class Picky(Net):
        def forward(self, x):
            raise ValueError("You have to specify pixel_values.\nAnd more.")

    with pytest.raises(NmsparseError) as caught:
        discover(Picky(), {"x": torch.ones(2, 5, 8)})
    assert caught.value.message == (
        "Picky does not take the inputs that its layers are looked for with (x [2, 5, 8]): "
        "ValueError: You have to specify pixel_values."
    )


def test_a_model_that_no_automatic_class_loads_is_loaded_by_its_own(tmp_path):
    torch.manual_seed(0)
    backbone = {
        "model_type": "dinov2",
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "out_indices": [1, 2, 3, 4],
        "reshape_hidden_states": False,
    }
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
    )
    DepthAnythingForDepthEstimation(config).eval().save_pretrained(tmp_path)
    loaded = models.load(str(tmp_path))
    assert isinstance(loaded.module, DepthAnythingForDepthEstimation)
    assert len(loaded.discover().blocks) >= 2


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        ("VideoMAE", {"image_size": 16, "patch_size": 8, "num_frames": 4}, "pixel_values"),
        ("Wav2Vec2", {"conv_dim": [8] * 7, "num_conv_pos_embedding_groups": 4}, "input_values"),
        ("AST", {"max_length": 64, "num_mel_bins": 32}, "input_values"),
    ],
)
def test_models_that_read_something_else_are_tried_with_likely_inputs(
    kind, settings, name, tmp_path
):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, **settings
    )
    getattr(transformers, f"{kind}Model")(config).eval().save_pretrained(tmp_path / "model")
    run = prune(str(tmp_path / "model"), Prune(method="magnitude"), tmp_path / "run")
    masks = MaskSet.load(run / "masks.safetensors").masks
    assert len(masks) == 12
    loaded = models.load(str(tmp_path / "model"))
    loaded.discover()
    assert set(loaded.sample_inputs()) == {name}


def test_a_detector_is_a_vision_model_though_it_has_a_decoder():
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        backbone_config=transformers.ResNetConfig(depths=[1, 1, 1, 1]),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
    )
    assert config.is_encoder_decoder
    with torch.device("meta"):
        module = transformers.DetrModel(config)
    assert family(module, "AutoModel") == "vision"
