"""The block walk needs no code per family: its stream is what the last block of the whole model
really reads."""

from __future__ import annotations

import pytest
import torch
import transformers

from nmsparse_deploy.find.calibration.block_walk import BlockWalk
from nmsparse_deploy.models.discovery import find_blocks

VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 64,
}
FAMILIES = {
    "Swin": {
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "image_size": 32,
        "patch_size": 2,
        "window_size": 4,
    },
    "ConvNext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "Beit": VIT,
    "DeiT": VIT,
    "SiglipVision": VIT,
    "CLIPVision": VIT,
    "DINOv3ViT": VIT,
    "Roberta": BERT,
    "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": 64},
}
TIMM = ["test_vit", "test_vit4", "test_resnet", "test_convnext", "test_efficientnet", "test_nfnet"]


@torch.no_grad()
def stream_is_true(module, inputs) -> bool:
    blocks, seen = find_blocks(module), []
    handle = module.get_submodule(blocks[-1]).register_forward_pre_hook(
        lambda _m, args: seen.append(args[0])
    )
    module(**inputs)
    handle.remove()
    walk = BlockWalk(module, blocks, [inputs])
    for number in range(len(blocks) - 1):
        walk.advance(number)
    return len(blocks) > 1 and torch.equal(walk.hidden[0], seen[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**FAMILIES[name])
    module = getattr(transformers, f"{name}Model")(config).eval()
    ids = torch.arange(16).view(2, 8)
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert stream_is_true(
        module,
        text
        if module.main_input_name == "input_ids"
        else {"pixel_values": torch.randn(2, 3, 32, 32)},
    )


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    module = timm.create_model(name).eval()
    side = 160 if "vit" in name else 96
    assert stream_is_true(module, {"x": torch.randn(2, 3, side, side)})
