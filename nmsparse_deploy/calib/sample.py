"""Draw the calibration sample that a model's family eats: token windows, whole sequences, or pictures."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from ..errors import UsageError
from ..models import input_name
from ..models.base import LoadedModel
from ..progress import Progress, silent
from ..recipe import AUTO, Calibration
from .images import calibration_images
from .prepared import ENDING, prepared
from .sequences import calibration_sequences, paired
from .text import calibration_sample, load_text

DEFAULTS = {"llm": "wikipedia", "encoder": "wikipedia", "seq2seq": "wikipedia",
            "vision": "fashion-mnist+tiny-photos"}
"""What `auto` means for each family."""


class Sample(Protocol):
    """Calibration data, whatever the family."""

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """Keyword arguments of a forward pass, `[samples, ...]`."""
        ...

    def record(self) -> dict[str, torch.Tensor]:
        """What is kept to prove later that an evaluation is held out."""
        ...

    def to_json(self) -> dict[str, Any]: ...


def draw(loaded: LoadedModel, spec: Calibration, progress: Progress = silent) -> Sample:
    """The calibration sample of `loaded`. Raises `UsageError` when there is too little data."""
    source = DEFAULTS[loaded.family] if spec.data == AUTO else spec.data
    if source.endswith(ENDING):
        progress(f"reading {source}", 0, 0)
        return prepared(source, spec.samples)
    if loaded.family == "vision":
        progress(f"sampling {spec.samples} images of {source}", 0, 0)
        return calibration_images(source, loaded.processor, input_name(loaded), spec.samples, spec.seed, progress)
    if loaded.processor is None or input_name(loaded) != "input_ids":
        raise UsageError(f"'{loaded.source}' reads {input_name(loaded)}, so it cannot be calibrated on text.",
                         f"give inputs of its forward pass: --data FILE{ENDING}")
    progress(f"sampling {spec.samples} x {spec.length} tokens of {source}", 0, 0)
    sample = calibration_sequences if loaded.family in ("encoder", "seq2seq") else calibration_sample
    drawn = sample(load_text(source), loaded.processor, spec.samples, spec.length, spec.seed)
    return paired(drawn, loaded.module.config) if loaded.family == "seq2seq" else drawn
