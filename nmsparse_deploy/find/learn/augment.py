"""Augmentation of the images that a mask is learned from, by timm's own factories.

`create_transform` (crops, flips, RandAugment, random erasing) works on each image, `Mixup` (mixup,
CutMix, label smoothing) on a batch. Both draw from the global generators of Python, NumPy and
PyTorch, which are set to a seed around each call and put back: a run that was killed and resumed
sees the same images.

MaskLLM-4V's settings are the defaults (VainF/MaskLLM-4V).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nmsparse_deploy.errors import MissingExtra, UsageError
from nmsparse_deploy.models.preprocess import Preprocess
from nmsparse_deploy.recipe import Augment

if TYPE_CHECKING:
    from PIL.Image import Image

_INTERPOLATION = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""By PIL's numbers."""


class Augmentation:
    """A transform of images into one batch, the same for the same seed."""

    def __init__(self, spec: Augment, preprocess: Preprocess, classes: int) -> None:
        try:
            from timm.data import Mixup, create_transform
        except ImportError as error:
            raise MissingExtra("timm", "vision", "Augmentation") from error
        if len(preprocess.mean) != 3:
            raise UsageError(
                "timm augments images in colour, and this model reads another number of channels.",
                "leave learn.augment out",
            )
        self.transform: Any = create_transform(
            (3, *preprocess.size),
            is_training=True,
            auto_augment=spec.policy or None,
            re_prob=spec.erasing,
            re_mode="pixel",
            mean=preprocess.mean,
            std=preprocess.std,
            interpolation=_INTERPOLATION[preprocess.resample],
        )
        mixes = bool(spec.mixup or spec.cutmix)
        self.mixup: Any = (
            Mixup(spec.mixup, spec.cutmix, label_smoothing=spec.smoothing, num_classes=classes)
            if mixes
            else None
        )
        self.smoothing, self.classes = spec.smoothing, classes

    def __call__(
        self, images: Sequence[Image], labels: torch.Tensor | None, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return `[images, 3, H, W]`, and what stands for the labels: probabilities
        `[images, classes]`."""
        with seeded(seed):
            values = torch.stack([self.transform(image.convert("RGB")) for image in images])
            if self.mixup is not None and len(values) % 2 == 0:  # timm mixes pairs
                classes = torch.zeros(len(values), dtype=torch.long) if labels is None else labels
                values, mixed = self.mixup(values, classes)
                return values, None if labels is None else mixed
        return values, None if labels is None else self._smoothed(labels)

    def _smoothed(self, labels: torch.Tensor) -> torch.Tensor:
        off = self.smoothing / self.classes
        shares = torch.full((len(labels), self.classes), off)
        return shares.scatter_(1, labels.unsqueeze(1), 1 - self.smoothing + off)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Make everything that draws from a global generator of the CPU draw the same for the same seed
    inside the block."""
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(pytorch)
