"""From an image to the tensor that a vision model was trained on: resize, crop, scale, normalise;
PIL only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch

from nmsparse_deploy.errors import MissingExtra

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
BICUBIC = 3
RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": BICUBIC, "box": 4, "hamming": 5}
"""PIL's numbers of its filters; Hugging Face writes the same numbers into `resample`."""
FILE = "preprocessor_config.json"
DEFAULT_SIZE = 224


class ImagePipeline(TypedDict):
    """The way of an image to a tensor, in timm's words; `crop_pct` is the share of the resized
    image that is kept."""

    input_size: tuple[int, int, int]
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    crop_mode: str


@dataclass(frozen=True)
class Preprocess:
    """The way of an image to the tensor that one model wants. `size` is (height, width) of the
    tensor in pixels.

    `shorter` is the length of the shorter side before the centre crop; None squeezes the image to
    `size`. `raw` is the Hugging Face preprocessor file this was read from, kept to be written back
    as it was.
    """

    size: tuple[int, int]
    shorter: int | None
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]
    resample: int = BICUBIC
    raw: Mapping[str, Any] | None = field(default=None, compare=False)

    def at(self, pixels: int) -> Preprocess:
        """Return the same for another square size; 0 is the model's own."""
        if not pixels or (pixels, pixels) == self.size:
            return self
        shorter = round(self.shorter * pixels / min(self.size)) if self.shorter else None
        return replace(self, size=(pixels, pixels), shorter=shorter, raw=None)

    def __call__(self, image: Image) -> torch.Tensor:
        """Make a float tensor `[channels, height, width]`; a model of one channel gets a grey
        image."""
        height, width = self.size
        image = self.view(image)
        values = np.asarray(image, dtype=np.float32).reshape(height, width, -1) / 255
        normal = (values - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return torch.from_numpy(normal.transpose(2, 0, 1).copy())

    def view(self, image: Image) -> Image:
        """Return the part of the image that the model sees."""
        height, width = self.size
        image = image.convert("L" if len(self.mean) == 1 else "RGB")
        if self.shorter is None:
            return image.resize((width, height), self.resample)
        scale = max(self.shorter / min(image.size), width / image.width, height / image.height)
        grown = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        image = image.resize(grown, self.resample) if grown != image.size else image
        left, top = (grown[0] - width) // 2, (grown[1] - height) // 2
        return image.crop((left, top, left + width, top + height))

    def pipeline(self) -> ImagePipeline:
        """Return the same in timm's words."""
        named = {number: name for name, number in RESAMPLE.items()}
        return ImagePipeline(
            input_size=(len(self.mean), *self.size),
            interpolation=named.get(self.resample, "bicubic"),
            mean=self.mean,
            std=self.std,
            crop_pct=min(self.size) / self.shorter if self.shorter else 1.0,
            crop_mode="center" if self.shorter else "squash",
        )

    def to_json(self) -> dict[str, object]:
        """Return what a record says of it."""
        return {
            "size": list(self.size),
            "shorter_side": self.shorter,
            "mean": list(self.mean),
            "std": list(self.std),
            "resample": self.resample,
        }

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the file that Transformers' image processors read."""
        height, width = self.size
        size = (
            {"shortest_edge": self.shorter} if self.shorter else {"height": height, "width": width}
        )
        data = self.raw or {
            "image_processor_type": "BitImageProcessor" if self.shorter else "ViTImageProcessor",
            "do_resize": True,
            "size": size,
            "resample": self.resample,
            "do_center_crop": self.shorter is not None,
            "crop_size": {"height": height, "width": width},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        (Path(folder) / FILE).write_text(json.dumps(data, indent=2) + "\n")


def from_config(config: Any, raw: Mapping[str, Any] | None = None) -> Preprocess:
    """Read a Hugging Face preprocessor file, with the model's config for what it leaves open."""
    raw = raw or {}
    own = _pair(getattr(config, "image_size", None) or DEFAULT_SIZE)
    asked = raw.get("size") or {}
    asked = {"shortest_edge": asked} if isinstance(asked, int) else asked
    shorter = asked.get("shortest_edge")
    exact = (
        _pair((asked["height"], asked["width"]))
        if "height" in asked
        else (shorter, shorter)
        if shorter
        else own
    )
    crop = raw.get("crop_size") if raw.get("do_center_crop", False) else None
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    size = _pair((crop["height"], crop["width"])) if crop else exact
    if not raw:
        shorter = min(own)
    elif crop and not shorter:
        shorter = min(exact)
    channels = getattr(config, "num_channels", 3) or 3
    mean, std = (
        tuple(raw.get(name) or default) if raw.get("do_normalize", True) else same
        for name, default, same in (
            ("image_mean", IMAGENET[0], (0.0,) * channels),
            ("image_std", IMAGENET[1], (1.0,) * channels),
        )
    )
    if len(mean) != channels:
        mean, std = mean[:1] * channels, std[:1] * channels
    return Preprocess(size, shorter, mean, std, int(raw.get("resample", BICUBIC)), raw or None)


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def require_pillow() -> None:
    """Raise `MissingExtra` when images cannot be read here."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise MissingExtra("pillow", "vision", "Reading images") from error
