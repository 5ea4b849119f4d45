"""How a vision-language model is shown a picture: its own processor, on one square picture and a
prompt.

What the processor returns for one sample is kept with the sample's number in front, whatever the
names and shapes; a forward pass joins samples along the axis behind it. This is how the processors
join them too: pictures side by side, or the patches of all of them in one row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nmsparse_deploy.errors import NmsparseError, UsageError, first_line
from nmsparse_deploy.models import own_code
from nmsparse_deploy.models.preprocess import Preprocess

if TYPE_CHECKING:
    from PIL.Image import Image

ASKED = "Describe the picture."
PIXELS = 448
"""The side of a picture for models that take any size."""


@dataclass(frozen=True)
class ImageTextProcessor:
    """The processor of a vision-language model; all pictures become squares of `pixels`."""

    processor: Any
    pixels: int

    def prompt(self, picture: Image) -> dict[str, torch.Tensor]:
        """Return what the processor makes of a picture and a question, with axes
        `[1, ...]`."""
        square = Preprocess((self.pixels, self.pixels), self.pixels).view(picture)
        try:
            made = self.processor(text=[self._question()], images=[[square]], return_tensors="pt")
        except Exception as error:  # a processor is a program of its own and fails as it likes
            raise NmsparseError(
                f"{type(self.processor).__name__} does not take a picture: {first_line(error)}."
            ) from error
        tensors = {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}
        if tensors["input_ids"].shape[0] != 1 or len(tensors) < 3:
            raise NmsparseError(f"{type(self.processor).__name__} made nothing of a picture.")
        return tensors

    def sample(self, picture: Image, text: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the inputs of a forward pass on a picture and the token ids `text` `[length]`
        after it."""
        tensors = self.prompt(picture)
        ids = tensors["input_ids"]
        for name, value in tensors.items():
            if value.shape == ids.shape:  # one value a token
                more = torch.ones_like(text) if name == "attention_mask" else torch.zeros_like(text)
                more = text if name == "input_ids" else more
                tensors[name] = torch.cat([value, more.to(value)[None]], 1)
        return tensors

    def noise(self, text: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return a sample of a picture of noise and the token ids `text`, to try a model out."""
        from PIL import Image

        values = np.random.default_rng(0).integers(0, 256, (self.pixels, self.pixels, 3), np.uint8)
        return self.sample(Image.fromarray(values), text)

    def trial(
        self, texts: torch.Tensor, device: torch.device, dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """Return the inputs of one forward pass on noise, each with a row of token ids `texts`."""
        made = joined(stacked([self.noise(ids.cpu()) for ids in texts]))
        return {
            name: value.to(device, dtype if value.is_floating_point() else None)
            for name, value in made.items()
        }

    def _question(self) -> str:
        """Write the prompt with the chat template, or with the token that stands for a picture
        alone."""
        token = getattr(self.processor, "boi_token", None) or getattr(
            self.processor, "image_token", "<image>"
        )
        if getattr(self.processor, "chat_template", None):
            parts = [{"type": "image"}, {"type": "text", "text": ASKED}]
            chat = [{"role": "user", "content": parts}]
            text = str(self.processor.apply_chat_template(chat, add_generation_prompt=True))
            if str(token) in text:
                return text
        return f"{token}{ASKED}\n"


def image_text_processor(
    place: str, config: Any, provenance: dict[str, str]
) -> ImageTextProcessor | None:
    """Load the processor of a vision-language model; None for a model that takes no pictures beside
    text, or whose processor cannot be had, and then `provenance` says why."""
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return None
    from transformers import AutoProcessor

    side = getattr(vision, "image_size", None)
    side = side[0] if isinstance(side, (list, tuple)) else side
    try:
        processor = own_code.without(AutoProcessor, place)
        made = ImageTextProcessor(processor, side if isinstance(side, int) else PIXELS)
        if getattr(processor, "image_processor", None) is None:
            raise ValueError("there is none")
        made.noise(torch.zeros(1, dtype=torch.long))
    except UsageError:
        raise
    except Exception as error:  # a package that it needs, a file that is not there
        provenance["pictures"] = (
            f"only text is calibrated, for want of a processor: {first_line(error)}."
        )
        return None
    return made


def stacked(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Put samples side by side, `[samples, ...]`. Raises `UsageError` where they differ in
    shape."""
    for name in samples[0]:
        shapes = {tuple(sample[name].shape) for sample in samples}
        if len(shapes) > 1:
            raise UsageError(f"The processor makes {name} of several shapes: {sorted(shapes)[:3]}.")
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def joined(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Join samples for one forward pass."""
    return {name: value.flatten(0, 1) for name, value in inputs.items()}
