"""Images for calibration and evaluation: drawn from a source with a seed, known by name and
content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from nmsparse_deploy.data.image_source import Images, load_images
from nmsparse_deploy.data.text import MIX
from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.models.preprocess import Preprocess
from nmsparse_deploy.system.progress import Progress, silent

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ImageSample:
    """Chosen images with what is needed to read them again; they are decoded batch by batch.

    `hashes` are SHA-256 digests of the decoded pixels, so that a copy under another name or format
    is still the same image.
    """

    chosen: tuple[tuple[Images, int], ...]
    hashes: tuple[str, ...]
    preprocess: Preprocess
    input_name: str
    source: str
    seed: int | None

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def ids(self) -> tuple[str, ...]:
        """The images by source and name."""
        return tuple(f"{images.name}/{images.ids[index]}" for images, index in self.chosen)

    @property
    def title(self) -> str:
        """The sources by their short names."""
        return MIX.join(dict.fromkeys(images.name for images, _ in self.chosen))

    def without(self, hashes: Sequence[str], limit: int) -> ImageSample:
        """Take at most `limit` of the images, evenly spaced, leaving out those of the given
        content."""
        seen = set(hashes)
        left = [number for number, digest in enumerate(self.hashes) if digest not in seen]
        spread = torch.linspace(0, len(left) - 1, min(limit, len(left))).round().long().tolist()
        return self.at([left[place] for place in spread])

    def at(self, numbers: Sequence[int]) -> ImageSample:
        """Take the images of these numbers, in this order."""
        return replace(
            self,
            chosen=tuple(self.chosen[n] for n in numbers),
            hashes=tuple(self.hashes[n] for n in numbers),
        )

    @property
    def labels(self) -> tuple[str | None, ...]:
        return tuple(images.labels[index] for images, index in self.chosen)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256("".join(self.hashes).encode()).hexdigest()[:16]

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """All images at once, `[samples, channels, height, width]`."""
        return {
            self.input_name: torch.cat(
                [batch[self.input_name] for batch in self.batches(len(self))]
            )
        }

    def batches(self, size: int) -> Iterator[dict[str, torch.Tensor]]:
        """Decode and prepare the images, `size` at a time."""
        for start in range(0, len(self), size):
            yield {
                self.input_name: torch.stack(
                    [
                        self.preprocess(self.image(index))
                        for index in range(start, min(start + size, len(self)))
                    ]
                )
            }

    def image(self, index: int) -> Image:
        """Decode one image."""
        images, place = self.chosen[index]
        return images.open(place)

    def record(self) -> dict[str, torch.Tensor]:
        """Return what a run keeps of the sample, to check later that an evaluation is held out,
        `[samples, 32]`."""
        digests = [list(bytes.fromhex(digest)) for digest in self.hashes]
        return {"image_sha256": torch.tensor(digests, dtype=torch.uint8)}

    def to_json(self) -> dict[str, object]:
        return {
            "source": self.source,
            "fingerprint": self.fingerprint,
            "samples": len(self),
            "seed": self.seed,
            "preprocess": self.preprocess.to_json(),
            "ids": list(self.ids),
            "sha256": list(self.hashes),
        }


def calibration_images(
    source: str,
    preprocess: Preprocess,
    input_name: str,
    samples: int,
    seed: int,
    progress: Progress = silent,
) -> ImageSample:
    """Draw `samples` distinct images of the training part of `source` with `seed`. Raises
    `UsageError`."""
    generator = torch.Generator().manual_seed(seed)
    return _draw(
        source,
        "train",
        preprocess,
        input_name,
        samples,
        seed,
        progress,
        lambda count, wanted: (
            torch.randperm(count, generator=generator)[:wanted].sort().values.tolist()
        ),
    )


def evaluation_images(
    source: str,
    split: str,
    preprocess: Preprocess,
    input_name: str,
    samples: int,
    progress: Progress = silent,
) -> ImageSample:
    """Take the same evenly spaced images for everybody: no seed. All of them when there are fewer
    than `samples`."""
    return _draw(
        source,
        split,
        preprocess,
        input_name,
        samples,
        None,
        progress,
        lambda count, wanted: torch.linspace(0, count - 1, wanted).round().long().tolist(),
    )


def _draw(
    source: str,
    split: str,
    preprocess: Preprocess,
    input_name: str,
    samples: int,
    seed: int | None,
    progress: Progress,
    pick: Any,
) -> ImageSample:
    if samples < 1:
        raise UsageError("Zero images were asked for; at least one is needed.")
    parts = load_sources(source, split)
    chosen: list[tuple[Images, int]] = []
    for number, images in enumerate(parts):
        wanted = samples // len(parts) + (number < samples % len(parts))
        if len(images) < wanted:
            if seed is not None:
                raise UsageError(
                    f"'{images.name}' holds {len(images)} images, not {wanted}.",
                    "ask for fewer samples, or give more images",
                )
            wanted = len(images)
        chosen += [(images, index) for index in pick(len(images), wanted)]
    hashes = []
    for number, (images, index) in enumerate(chosen):
        progress(f"reading images of {source}", number, len(chosen))
        hashes.append(content_hash(images.open(index)))
    return ImageSample(tuple(chosen), tuple(hashes), preprocess, input_name, source, seed)


def load_sources(source: str, split: str) -> list[Images]:
    """Open one source, or several joined by `+`."""
    try:
        return [load_images(source, split)]
    except UsageError:
        if MIX not in source:
            raise
        return [load_images(part, split) for part in source.split(MIX)]


def content_hash(image: Image) -> str:
    """Return the SHA-256 of an image's size and RGB pixels."""
    data = image.convert("RGB")
    return hashlib.sha256(f"{data.size}".encode() + data.tobytes()).hexdigest()


def check_images_disjoint(calibration: torch.Tensor, evaluation: Sequence[str]) -> int:
    """Raise `NmsparseError` when an image was calibrated on; returns how many were compared.

    `calibration` is the `image_sha256` of a record.
    """
    seen = {bytes(row.tolist()).hex() for row in calibration}
    same = sum(digest in seen for digest in evaluation)
    if same:
        raise NmsparseError(
            f"{same} of {len(evaluation)} evaluation images were calibrated on; a score on them means "
            "nothing.",
            "choose another --data for the evaluation, or folders named train and test",
        )
    return len(evaluation)


def by_value(label: str) -> tuple[bool, int, str]:
    """Order classes: numbers by value, before words."""
    return not label.isdigit(), int(label) if label.isdigit() else 0, label
