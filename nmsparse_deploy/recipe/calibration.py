"""The section `calibration:` of a recipe."""

from __future__ import annotations

from pydantic import Field

from nmsparse_deploy.recipe.section import Frozen

AUTO = "auto"
"""Data that suits the model's family: text, or images. What it came to is recorded with the run."""


class Calibration(Frozen):
    """The data that the statistics come from.

    `data` is a packaged set's name, a text file, a folder of texts or images, an archive of images,
    or `generated` for text that the model writes itself; `A+B` takes as many samples of each.
    """

    data: str = Field(
        AUTO,
        description="calibration text or images, inputs.safetensors, or generated; auto suits the "
        "model",
    )
    samples: int = Field(64, ge=0, description="calibration samples: windows of text, or images")
    length: int = Field(512, ge=8, description="tokens per sample (text only)")
    batch: int = Field(4, ge=1, description="samples that pass through a block at a time")
    seed: int = Field(0, description="decides which samples are drawn")
