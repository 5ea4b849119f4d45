"""Images for a report: small PNG files in base64."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL.Image import Image

COLOURS = 128
"""A palette keeps an image at a third of its size; a report holds several."""
SIDE = 84
"""Pixels per side of an image in a sheet, about."""
GAP = 4


def png(image: Image) -> str:
    buffer = io.BytesIO()
    image.quantize(COLOURS).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def as_images(pixels: torch.Tensor) -> list[Image]:
    """Return PIL images of `[count, channels, height, width]` in -1 to 1."""
    from PIL import Image as pil

    levels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [pil.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in levels]


def sheet(rows: Sequence[torch.Tensor]) -> Image:
    """Lay out images `[count, channels, height, width]` in -1 to 1, a row of the sheet for each
    entry of `rows`."""
    from PIL import Image as pil

    height, width = rows[0].shape[-2:]
    scale = max(1, round(SIDE / max(height, width)))
    step, down = width * scale + GAP, height * scale + GAP
    paper = pil.new("RGB", (step * len(rows[0]) - GAP, down * len(rows) - GAP), "white")
    for line, row in enumerate(rows):
        for place, image in enumerate(as_images(row)):
            grown = image.convert("RGB").resize(
                (width * scale, height * scale), pil.Resampling.NEAREST
            )
            paper.paste(grown, (place * step, line * down))
    return paper


def by_timestep_plot(
    rows: Sequence[Mapping[str, float]], lines: Sequence[str], ylabel: str
) -> Image:
    """Draw one line per name of `lines` over the schedule, whose parts are `rows`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image as pil

    figure = Figure((6.4, 3.2), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    middles = [(row["from"] + row["to"]) / 2 for row in rows]
    for marker, name in zip("os^Dvp<>" * len(lines), lines):
        axes.plot(
            middles,
            [row[name] for row in rows],
            marker=marker,
            markersize=4,
            linewidth=1.3,
            label=name,
        )
    axes.set_yscale("log")
    axes.set(xlabel="training step of the schedule (0 = almost clean)", ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return pil.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
