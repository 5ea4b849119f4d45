"""Images as a subject: decoded batch by batch, augmented anew for every training step, plain for
evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from nmsparse_deploy.data.images import ImageSample, by_value
from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.find.learn.augment import Augmentation
from nmsparse_deploy.find.learn.losses import classification
from nmsparse_deploy.find.learn.mask_parametrization import MaskSite
from nmsparse_deploy.find.learn.step_context import StepContext, digest
from nmsparse_deploy.find.learn.subjects import ModelSubject
from nmsparse_deploy.models.loaded import Batch
from nmsparse_deploy.models.objective import Objective
from nmsparse_deploy.recipe import Training


def believable(classes: int) -> float:
    """Return the accuracy from which on a dense model is taken to know the classes: twice chance,
    or half-way from it to always where that is less."""
    return min(2 / classes, (1 + 1 / classes) / 2)


class ImageSubject(ModelSubject):
    """A vision model on images; `labels` `[images]` are class numbers, None where they are unknown.

    With labels the score is their cross-entropy, else the distance to the dense model.
    """

    def __init__(
        self,
        module: nn.Module,
        sites: Mapping[str, MaskSite],
        sample: ImageSample,
        size: int,
        objective: Objective,
        spec: Training,
        compute: torch.dtype,
        labels: torch.Tensor | None = None,
        augmentation: Augmentation | None = None,
    ) -> None:
        super().__init__(
            module, sites, -(-len(sample) // size), min(size, len(sample)), objective, spec, compute
        )
        self.sample, self.size, self.labels, self.augmentation = sample, size, labels, augmentation
        self.varies = augmentation is not None

    def batch(
        self, number: int, context: StepContext | None = None
    ) -> tuple[Batch, torch.Tensor | None]:
        places = range(number * self.size, min((number + 1) * self.size, len(self.sample)))
        device = next(self.module.parameters()).device
        images = [self.sample.image(place) for place in places]
        labels = None if self.labels is None else self.labels[places.start : places.stop]
        if context is None or self.augmentation is None:
            values = torch.stack([self.sample.preprocess(image) for image in images])
        else:
            seed = digest(context.seed, "pictures", context.step, context.part, context.rank)
            values, labels = self.augmentation(images, labels, seed)
        return {self.sample.input_name: values.to(device)}, None if labels is None else labels.to(
            device
        )

    def score(self, number: int) -> torch.Tensor:
        if self.labels is None:
            return super().score(number)
        batch, labels = self.batch(number)
        assert labels is not None
        return classification(self._signal(batch), labels)

    @torch.no_grad()
    def accuracy(self) -> float:
        """Return the share of the held-out images that the model as it stands gets right. Raises
        `UsageError` when that is hardly better than chance: then the folders are not the model's
        classes."""
        right = count = classes = 0
        for number in self.held_out:
            batch, labels = self.batch(number)
            assert labels is not None
            output = self._signal(batch)
            right, count = right + int((output.argmax(-1) == labels).sum()), count + len(labels)
            classes = output.shape[-1]
        if right / count < believable(classes):
            raise UsageError(
                f"The dense model is right on {right} of {count} held-out images, hardly better "
                "than chance: the folders of the data do not name them in its order.",
                "learn.labels: false learns from the dense model's outputs instead",
            )
        return right / count


def class_numbers(sample: ImageSample, module: nn.Module, classes: int) -> torch.Tensor:
    """Return the class of every image as the model numbers them, `[images]`.

    By name where the model's config knows all names, else in the order of the names, as torchvision
    and timm number folders. Raises `UsageError` when there are no classes, or not as many.
    """
    named = sorted(
        {label for images, _ in sample.chosen for label in images.labels if label}, key=by_value
    )
    if not named or None in sample.labels:
        raise UsageError(
            f"The images of '{sample.source}' are in no folders that name their classes.",
            "learn.labels: false",
        )
    config: Any = getattr(module, "config", None)
    known = {
        str(name).lower(): int(number)
        for name, number in (getattr(config, "label2id", None) or {}).items()
    }
    if all(name.lower() in known for name in named):
        return torch.tensor([known[str(label).lower()] for label in sample.labels])
    if len(named) != classes:
        raise UsageError(
            f"The images of '{sample.source}' have {len(named)} classes, the model {classes}.",
            "learn.labels: false",
        )
    place = {name: number for number, name in enumerate(named)}
    return torch.tensor([place[str(label)] for label in sample.labels])
