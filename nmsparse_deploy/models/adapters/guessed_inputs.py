"""Guesses at the inputs of a model of Transformers that takes something else than text or one image:
pairs, speech, videos, hidden states. Its forward pass decides which of them it takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch

TOGETHER = (
    ("pixel_values",),
    ("pixel_values", "input_ids", "attention_mask"),
    ("pixel_values", "input_ids"),
    ("pixel_values", "decoder_input_ids"),
    ("input_ids", "attention_mask"),
    ("input_ids", "decoder_input_ids"),
    ("input_ids", "bbox"),
    ("input_ids", "bbox", "pixel_values"),
    ("input_values",),
    ("input_values", "decoder_input_ids"),
    ("input_features",),
    ("input_features", "decoder_input_ids"),
    ("input_features", "input_ids"),
    ("input_ids", "input_features", "attention_mask"),
    ("input_ids", "input_values"),
    ("pixel_values_videos",),
    ("inputs_embeds",),
    ("hidden_states",),
    ("query_embeds",),
    ("query_embeds", "encoder_hidden_states"),
)
"""Names of arguments that come together, the likeliest first."""
SAMPLES = 6400
"""Of a waveform."""
DEFAULTS = {"vocab_size": 32, "image_size": 224, "num_channels": 3, "num_frames": 8}
MEL = ("num_mel_bins", "input_feat_size", "feature_size", "input_dim", "n_mels")


def guesses(module: Any, batch: int, length: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield keyword arguments that the forward pass has names for, seeded noise of likely shapes."""
    named = inspect.signature(module.forward).parameters
    needed = {
        name
        for name, parameter in named.items()
        if parameter.default is parameter.empty
        and parameter.kind == parameter.POSITIONAL_OR_KEYWORD
    }
    values = _values(module, batch, length)
    for names in TOGETHER:
        if needed <= set(names) <= set(named):
            for shapes in product(*(values[name] for name in names)):
                yield {name: make() for name, make in zip(names, shapes)}


def setting(config: Any, *names: str) -> Any:
    """Return the first setting of such a name, in a configuration or in those that it holds."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, (int, tuple, list)) and value and not isinstance(value, bool):
            return value
    inner = (value for value in vars(config).values() if hasattr(value, "to_dict"))
    return next((found for part in inner if (found := setting(part, *names))), None)


def _values(module: Any, batch: int, length: int) -> dict[str, list[Callable[[], torch.Tensor]]]:
    """Return makers of the tensors that each argument may be."""
    config, parameter = module.config, next(module.parameters())
    known = {name: setting(config, name) or default for name, default in DEFAULTS.items()}
    size = known["image_size"]
    height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
    image = (known["num_channels"], height, width)
    video = (known["num_frames"], *image)
    mel = setting(config, *MEL) or 80
    mel = mel if isinstance(mel, int) else mel[0]
    frames = 2 * (setting(config, "max_source_positions") or 0) or 8 * length
    states = setting(config, "hidden_size", "d_model", "encoder_hidden_size") or 32
    spectrogram = setting(config, "max_length", "spec_size") or 1024

    def noise(*shape: int) -> Callable[[], torch.Tensor]:
        def make() -> torch.Tensor:
            generator = torch.Generator().manual_seed(0)
            values = torch.randn(batch, *shape, generator=generator)
            return values.to(parameter.device, parameter.dtype)

        return make

    def ids() -> torch.Tensor:
        count = torch.arange(batch * length, device=parameter.device)
        return (count % known["vocab_size"]).view(batch, length)

    text: list[Callable[[], torch.Tensor]] = [ids]
    return {
        "input_ids": text,
        "decoder_input_ids": text,
        "attention_mask": [lambda: torch.ones_like(ids())],
        "bbox": [lambda: torch.zeros_like(ids())[..., None].repeat(1, 1, 4)],
        "pixel_values": [noise(*image), noise(*video)],
        "pixel_values_videos": [noise(*video)],
        "input_values": [noise(SAMPLES), noise(1, SAMPLES), noise(spectrogram, mel)],
        "input_features": [
            noise(mel, frames),
            noise(8 * length, mel),
            noise(1, spectrogram, mel),
            noise(1, mel, spectrogram),
        ],
        **{
            name: [noise(length, states)]
            for name in ("inputs_embeds", "hidden_states", "query_embeds", "encoder_hidden_states")
        },
    }
