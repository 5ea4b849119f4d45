"""Eight bits after pruning: the two number formats, and what has to be known about the activations.

    s_row = max |w| / max_value per output,   s_x = max |x| / max_value per tensor,   Q(v) = saturate(round(v / s))

where max_value = 127 (INT8) or 448 (FP8, E4M3).

Everything is symmetric, so zero stays zero and the pattern lives on in the stored codes. Weights
are quantised after pruning and refitting, never before. `export/qdq.py` writes the graph.

ONNX Runtime's own quantiser was read, not run, and not taken: its FP8 scales come from standard
deviations instead of the largest value, and by default it also stores the biases as 32-bit integers
(fp32 beside FP8).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from nmsparse_deploy.data.calibration_sample import draw
from nmsparse_deploy.data.self_generated import GENERATED
from nmsparse_deploy.data.text import MIX
from nmsparse_deploy.errors import CheckFailed, NmsparseError
from nmsparse_deploy.models.base import Target
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.system.progress import Progress, silent

BASE = "fp16"
"""The precision of everything that stays in floating point beside 8-bit GEMMs; it has the most
sparse kernels."""
WINDOWS = 16
"""Samples of the calibration set that the activations are looked at with."""


MINUS_ZERO = 0x80
"""In FP8 (E4M3)."""


@dataclass(frozen=True)
class Format:
    """An 8-bit number format with its largest value."""

    name: str
    element: str
    """As link maps and checks name it."""
    max_value: float

    def codes(self, scaled: np.ndarray) -> np.ndarray:
        """Return the nearest values of the format, saturated; never minus zero."""
        clipped = np.clip(scaled, -self.max_value, self.max_value)
        if self.element == "I8":
            return np.rint(clipped).astype(np.int8)
        import ml_dtypes

        bits = clipped.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        # A tiny negative value rounds to minus zero.
        return np.where(bits == MINUS_ZERO, np.uint8(0), bits).view(ml_dtypes.float8_e4m3fn)


FORMATS = {"int8": Format("int8", "I8", 127.0), "fp8": Format("fp8", "F8_E4M3", 448.0)}


@dataclass(frozen=True)
class Quantised:
    """A weight in the format's codes, with its scales in the base precision."""

    codes: np.ndarray
    scales: np.ndarray
    axis: int | None
    """The axis of the outputs, along which the scales differ; None where there is one scale."""
    vanished: int
    """Weights that were not zero and have the code zero."""


def quantise_weight(
    weight: np.ndarray, axis: int, form: Format, max_value: float | None = None
) -> Quantised:
    """Quantise a matrix whose reduction axis is `axis`: a scale for every output, or one for values
    up to `max_value`.

    Raises `CheckFailed` when a zero would move.
    """
    values = weight.astype(np.float32)
    outputs = 1 - axis % 2 if max_value is None else None
    largest = (
        np.abs(values).max(axis=axis, keepdims=True) if max_value is None else np.array(max_value)
    )
    # What is stored is what is divided by, so the rounding of the scale itself costs nothing.
    scales = _stored(np.where(largest > 0, largest / form.max_value, 1.0))
    codes = form.codes(values / scales.astype(np.float32))
    zero, moved = codes.view(np.uint8) == 0, values == 0
    if (moved & ~zero).any():
        raise CheckFailed("Quantisation moved a zero of a pruned weight.")
    return Quantised(
        codes,
        scales.reshape(-1) if max_value is None else scales,
        outputs,
        int((zero & ~moved).sum()),
    )


def scale_of(largest: float, form: Format) -> np.ndarray:
    """Return the one scale of an activation."""
    return _stored(np.array(largest / form.max_value if largest > 0 else 1.0))


def _stored(scales: np.ndarray) -> np.ndarray:
    """Return scales in the base precision, none of them zero."""
    return np.clip(
        scales, np.finfo(np.float16).smallest_subnormal, np.finfo(np.float16).max
    ).astype(np.float16)


@dataclass(frozen=True)
class Range:
    """The largest magnitude that a layer read, and that it wrote, on the calibration sample."""

    read: float
    wrote: float


@torch.no_grad()
def calibrate(
    module: nn.Module,
    targets: Sequence[Target],
    batches: Iterable[Mapping[str, Any]],
    progress: Progress = silent,
) -> dict[str, Range]:
    """Return ranges by module path over `batches` of keyword arguments. Raises `NmsparseError` if
    one is not finite."""
    ranges: dict[str, tuple[float, float]] = {}

    def see(path: str, read: torch.Tensor, wrote: torch.Tensor) -> None:
        before = ranges.get(path, (0.0, 0.0))
        ranges[path] = (
            max(before[0], float(read.abs().max())),
            max(before[1], float(wrote.abs().max())),
        )

    handles = [
        module.get_submodule(path).register_forward_hook(
            lambda layer, args, result, path=path: see(path, args[0], result)
        )
        for path in {t.module for t in targets}
    ]
    try:
        rows = list(batches)
        for number, batch in enumerate(rows):
            progress("watching activations", number, len(rows))
            module(**batch)
    finally:
        for handle in handles:
            handle.remove()
    for path, seen in ranges.items():
        if not all(np.isfinite(seen)):
            raise NmsparseError(
                f"The activations of '{path}' are not finite, so they have no range to quantise."
            )
    return {path: Range(*seen) for path, seen in ranges.items()}


def activation_ranges(
    run: RunDir, loaded: LoadedModel, targets: list[Target], progress: Progress
) -> dict[str, Range]:
    """Return what the layers read and write on the run's calibration sample."""
    spec = run.manifest().recipe.calibration
    if GENERATED in spec.data.split(MIX):  # by the dense model, and kept
        inputs = {"input_ids": load_file(run / "calibration.safetensors")["ids"][:WINDOWS].long()}
    else:
        few = spec.model_copy(update={"samples": min(max(spec.samples, 1), WINDOWS)})
        inputs = draw(loaded, few, progress).inputs
    loaded.module.float()
    return calibrate(loaded.module, targets, loaded.batches(inputs, spec.batch), progress)
