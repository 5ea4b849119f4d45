"""Layer by layer: the output error of every pruned matrix, and what the masks look like."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from nmsparse_deploy.masks import Mask, MaskSet
from nmsparse_deploy.measure.report import plots
from nmsparse_deploy.measure.report.stages import PrunedMatrix, Stages
from nmsparse_deploy.pattern import NMPattern
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.runs.section import Block, Figure, Fold, Paragraph, Section, Table, columns
from nmsparse_deploy.runs.wording import clean, number, plural, quantity, shape

CORNER = 64
Series = dict[str, list[tuple[int, float]]]
"""Kind of layer -> (block, relative error)."""


@dataclass(frozen=True)
class Layers:
    """Rows of `layers.json` and, where the method measured them, relative errors by layer kind and
    block."""

    rows: tuple[PrunedMatrix, ...]
    series: Series


@dataclass(frozen=True)
class KeptPositions:
    """How often each position of a group is kept, over all masks of one pattern."""

    pattern: str
    density: float
    masks: int
    groups: int
    kept: tuple[float, ...]


@dataclass(frozen=True)
class MaskFacts:
    """The first values of one mask as rows of 0 and 1, the group axis to the right, and the kept
    positions."""

    tensor: str
    pattern: str
    axis: int
    group: int
    corner: tuple[str, ...]
    positions: tuple[KeptPositions, ...]


def layers(stages: Stages) -> Layers:
    """Order the errors by the last word of their module's path; several of a kind in a block give
    their median."""
    modules = {row.name: row.module for row in stages.plan.rows} if stages.plan else {}
    errors: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in stages.layers:
        if row.relative_error is not None and math.isfinite(row.relative_error):
            module = modules.get(row.name) or row.name.rpartition(".")[0] or row.name
            errors[module.rpartition(".")[2]][row.block].append(row.relative_error)
    series = {
        kind: [(block, statistics.median(values)) for block, values in sorted(blocks.items())]
        for kind, blocks in errors.items()
    }
    return Layers(stages.layers, series)


def masks(run: RunDir) -> MaskFacts | None:
    """Count the positions that all N:M masks keep; None without masks."""
    held = (
        MaskSet.load(run / "masks.safetensors").masks
        if (run / "masks.safetensors").is_file()
        else {}
    )
    if not held:
        return None
    name, first = next(iter(held.items()))
    by_pattern: dict[NMPattern, list[Mask]] = defaultdict(list)
    for mask in held.values():
        if isinstance(mask.pattern, NMPattern):
            by_pattern[mask.pattern].append(mask)
    positions = tuple(
        _kept(pattern, by_pattern[pattern]) for pattern in sorted(by_pattern, key=str)
    )
    corner = tuple(
        "".join("1" if value else "0" for value in row) for row in _rows(first)[:CORNER, :CORNER]
    )
    return MaskFacts(
        clean(name), str(first.pattern), first.axis, first.pattern.alignment, corner, positions
    )


def _kept(pattern: NMPattern, masks: list[Mask]) -> KeptPositions:
    kept, groups = np.zeros(pattern.group, np.int64), 0
    for mask in masks:
        rows = _rows(mask).reshape(-1, pattern.group)
        kept, groups = kept + rows.sum(0, dtype=np.int64), groups + len(rows)
    return KeptPositions(
        str(pattern), pattern.density, len(masks), groups, tuple((kept / groups).tolist())
    )


def _rows(mask: Mask) -> np.ndarray:
    """Return the mask with its group axis last, as rows."""
    bits = np.moveaxis(mask.unpack().numpy(), mask.axis, -1)
    return bits.reshape(-1, bits.shape[-1])


def one_by_one(layers: Layers, masks: MaskFacts | None) -> Section:
    """Write the section about single layers."""
    wide, narrow = (
        plots.relative_errors(layers.series, width, name)
        for width, name in ((plots.WIDE, "errors-wide"), (plots.NARROW, "errors"))
    )
    blocks: list[Block] = (
        [
            Paragraph(
                "The relative error of a layer is the share of its output energy (squared norm, on the calibration "
                "data) that pruning changed; lower is better."
            ),
            Figure((wide,), narrow=(narrow,)),
        ]
        if (wide and narrow)
        else [
            Paragraph(
                "Relative errors per layer were not measured: the method used no calibration statistics, or every "
                "error is zero."
            )
        ]
    )
    blocks.append(_mask_figure(masks) if masks else Paragraph("The run has no mask file."))
    heads = columns(
        "parameter", "block", "pattern", "shape", "group axis", "relative error", "time"
    )
    rows = tuple(
        (
            row.name,
            str(row.block),
            row.pattern,
            shape(row.shape),
            str(row.axis),
            number(row.relative_error),
            quantity(row.seconds, "s"),
        )
        for row in layers.rows
    )
    blocks.append(
        Fold(
            f"All {plural(len(rows), 'layer')}", (Table("Pruned layers", heads, rows, small=True),)
        )
    )
    return Section("Layer by layer", tuple(blocks), "layers")


def _mask_figure(masks: MaskFacts) -> Figure:
    caption = f"Heat map: blue values of {masks.tensor} are kept, the others are zero."
    if masks.positions:
        counted = "; ".join(
            f"{row.pattern} in {plural(row.masks, 'mask')} with {row.groups:,} groups"
            for row in masks.positions
        )
        caption += f" Bars: how often each position of a group is kept, {counted}. Dotted: the pattern's density."
    bars = [
        plots.kept_by_position(row, f"position-{number}")
        for number, row in enumerate(masks.positions)
    ]
    return Figure((plots.mask_corner(masks), *bars), caption)
