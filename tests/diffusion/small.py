"""Two-block diffusion transformers with random weights: in pixels, and a whole pipeline with an autoencoder."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import save_file

from tests.zoo import DENOISER, FAMILIES

CLASSES = 3
ARGUMENTS = {"DiT": ("class_labels",), "PixArt": ("encoder_hidden_states",),
             "SD3 (MMDiT)": ("encoder_hidden_states", "pooled_projections")}


def family(name: str, folder: Path) -> Path:
    FAMILIES[name].build(folder)
    return folder


def pipeline(folder: Path, classes: int = CLASSES) -> Path:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(**DENOISER, in_channels=4, out_channels=8, num_embeds_ada_norm=classes)
    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
                        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4)
    DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler()).save_pretrained(folder)
    return folder


def latents(file: Path, width: int = 24, **changes) -> Path:
    """What a text-conditioned model is calibrated on; None takes a tensor away."""
    generator = torch.Generator().manual_seed(3)
    tensors = {"latents": torch.randn(6, 4, 16, 16, generator=generator),
               "encoder_hidden_states": torch.randn(6, 12, width, generator=generator),
               "null.encoder_hidden_states": torch.randn(12, width, generator=generator), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, file)
    return file
