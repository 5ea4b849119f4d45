"""Saliency maps of the packaged ViT, dense and pruned: how much they agree, and images of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from nmsparse_deploy.measure.evaluate.png import png
from nmsparse_deploy.measure.evaluate.result import DrawnImage, EvalResult, Protocol, mean_result
from nmsparse_deploy.models.packaged import visual_saliency

if TYPE_CHECKING:
    from PIL.Image import Image

THRESHOLD = 0.5
"""Where a map says "object"."""
SIDE = 160
"""Pixels per side of each image in a strip."""
GAP = 6
LABELLED_SIZES = {visual_saliency.KEY: 112}
"""The packaged ViT takes any size, and labelled images of 28 pixels gain nothing from more
tokens."""


def saliency_head(typed: str) -> visual_saliency.SaliencyHead | None:
    """Load the head that belongs to a model, by what was typed for it; None for every model but
    one."""
    return visual_saliency.load_head() if typed == visual_saliency.KEY else None


def map_agreement(
    dense: torch.Tensor, other: torch.Tensor, where: str, suffix: str, protocol: Protocol
) -> list[EvalResult]:
    """Measure mean absolute error, correlation, and overlap above `THRESHOLD` of maps [samples,
    side, side].

    Two empty objects agree: their intersection over union is 1.
    """
    a, b = dense.double().flatten(1), other.double().flatten(1)
    mae = (a - b).abs().mean(1)
    a0, b0 = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    correlation = (a0 * b0).sum(1) / (a0.norm(dim=1) * b0.norm(dim=1)).clamp(min=1e-12)
    iou = overlap(a, b)
    protocol = {**protocol, "threshold": THRESHOLD}
    return [
        mean_result(f"saliency_{name}@{suffix}", values.tolist(), where, protocol)
        for name, values in (("iou", iou), ("correlation", correlation), ("mae", mae))
    ]


def overlap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the intersection over union above `THRESHOLD` of each row."""
    x, y = a.flatten(1) > THRESHOLD, b.flatten(1) > THRESHOLD
    union = (x | y).sum(1)
    return torch.where(union > 0, (x & y).sum(1) / union.clamp(min=1), 1.0)


def strips(
    images: Sequence[Image], names: Sequence[str], dense: torch.Tensor, other: torch.Tensor
) -> list[DrawnImage]:
    """Draw a strip per image: the photograph, its dense map and its pruned map side by side."""
    rows = []
    shared = overlap(dense, other).tolist()
    for image, name, first, second, iou in zip(images, names, dense, other, shared):
        title = f"{name}: photograph, saliency dense, saliency pruned (overlap {iou:.2f})"
        rows.append(DrawnImage(title, png(_strip(image, first, second))))
    return rows


def _strip(image: Image, dense: torch.Tensor, other: torch.Tensor) -> Image:
    from PIL import Image as pil

    strip = pil.new("RGB", (3 * SIDE + 2 * GAP, SIDE), "white")
    panels = [image.convert("RGB"), _heat(dense), _heat(other)]
    for number, panel in enumerate(panels):
        strip.paste(panel.resize((SIDE, SIDE)), (number * (SIDE + GAP), 0))
    return strip


def _heat(saliency: torch.Tensor) -> Image:
    """Colour a map from black over blue and orange to white, rising in lightness so that it also
    reads in grey."""
    from PIL import Image as pil

    stops = np.array(
        [[0, 0, 0], [20, 40, 110], [170, 60, 60], [245, 160, 40], [255, 255, 230]], dtype=np.float64
    )
    value = saliency.clamp(0, 1).numpy() * (len(stops) - 1)
    low = np.clip(value.astype(int), 0, len(stops) - 2)
    share = (value - low)[..., None]
    return pil.fromarray((stops[low] * (1 - share) + stops[low + 1] * share).astype(np.uint8))
