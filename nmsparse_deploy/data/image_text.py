"""Pictures and text for a vision-language model: each sample is a picture, a question about it by
the model's own processor, and a window of text after it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from nmsparse_deploy.data.image_source import ARCHIVES, SUFFIXES
from nmsparse_deploy.data.images import ImageSample, calibration_images
from nmsparse_deploy.data.packaged.images import names
from nmsparse_deploy.data.text import MIX, TokenSample
from nmsparse_deploy.models.image_text import ImageTextProcessor, stacked
from nmsparse_deploy.models.preprocess import Preprocess
from nmsparse_deploy.system.progress import Progress, silent

CLOTHES = [
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
]
"""What the classes of Fashion-MNIST are called."""


@dataclass(frozen=True)
class ImageTextSample:
    """Inputs by name, `[samples, ...]`: behind the first axis what the processor returns for one
    sample."""

    inputs: dict[str, torch.Tensor]
    images: ImageSample
    text: TokenSample

    def record(self) -> dict[str, torch.Tensor]:
        """Return what a run keeps of the sample, to check later that an evaluation is held out."""
        return {**self.text.record(), **self.images.record()}

    def to_json(self) -> dict[str, object]:
        return {
            "source": f"{self.images.source}{MIX}{self.text.source}",
            "fingerprint": hashlib.sha256(
                f"{self.images.fingerprint}{self.text.fingerprint}".encode()
            ).hexdigest()[:16],
            "samples": len(self.images),
            "length": self.inputs["input_ids"].shape[-1],
            "inputs": {name: list(tensor.shape) for name, tensor in self.inputs.items()},
            "images": {**self.images.to_json(), "preprocess": "the model's own processor"},
            "text": self.text.to_json(),
        }


def sources(source: str, images: str, text: str) -> tuple[str, str]:
    """Split `A+B` into sources of pictures and of text; `images` and `text` stand for what is not
    named."""
    parts = [source] if Path(source.partition("#")[0]).exists() else source.split(MIX)
    pictures = [part for part in parts if _has_pictures(part)]
    words = [part for part in parts if part not in pictures]
    return MIX.join(pictures) or images, MIX.join(words) or text


def _has_pictures(source: str) -> bool:
    path = Path(source).expanduser()
    if source in names() or source.endswith(ARCHIVES):
        return True
    return path.is_dir() and any(file.suffix.lower() in SUFFIXES for file in path.rglob("*"))


def image_text_sample(
    processor: ImageTextProcessor,
    source: str,
    text: TokenSample,
    tokenizer: object,
    seed: int,
    progress: Progress = silent,
) -> ImageTextSample:
    """Draw a picture for every window of `text`, and let the processor make inputs of both.

    A picture whose class has a name is followed by it. Raises `UsageError` for too few pictures,
    `NmsparseError` for a processor that does not take them.
    """
    seen = Preprocess((processor.pixels, processor.pixels), processor.pixels)
    images = calibration_images(source, seen, "pixel_values", len(text.ids), seed, progress)
    samples = []
    for number, window in enumerate(text.ids):
        progress("preparing pictures and text", number, len(text.ids))
        label = images.labels[number]
        caption = _caption(label, images.ids[number], tokenizer)
        ids = torch.cat([caption, window])[: len(window)]
        samples.append(processor.sample(images.image(number), ids))
    return ImageTextSample(stacked(samples), images, text)


def _caption(label: str | None, name: str, tokenizer: object) -> torch.Tensor:
    """Return the token ids of a sentence that names what the picture shows; none where that is not
    known."""
    if label is not None and label.isdigit():
        label = CLOTHES[int(label)] if name.startswith("fashion-mnist/") else None
    words = f"A picture of: {label}.\n" if label else ""
    assert callable(tokenizer)
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)
