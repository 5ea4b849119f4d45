"""What a report shows of an engine: its verdict, and how far the evidence goes for every
multiplication."""

from __future__ import annotations

from nmsparse_deploy.runs.section import Block, Bullets, Fold, Paragraph, Section, Table, columns
from nmsparse_deploy.runs.wording import (
    counts,
    listed,
    megabytes,
    number,
    percent,
    plain,
    plural,
    quantity,
)
from nmsparse_deploy.ship.engine import BuiltEngine
from nmsparse_deploy.ship.evidence import LEVELS, EngineEvidence, Level

MEANING: dict[Level, str] = {
    "pattern": "the stored weight is 2:4",
    "shape": "its whole fusion group is, in a shape that kernels exist for",
    "eligible": "the builder found it eligible",
    "chosen": "the builder chose a sparse kernel for it",
    "tactic": "the engine holds a sparse kernel for it",
    "observed": "that kernel was seen running",
    "counted": "the hardware counted sparse instructions",
}
"""What each level of evidence says."""


def section(row: BuiltEngine) -> Section:
    """Return what there is to show of a TensorRT engine."""
    asked, made = row.settings, row.environment
    shapes = asked["shapes"]
    given = (
        "; ".join(
            f"{name} {'x'.join(map(str, shape))}"
            for name, shape in shapes.items()
            if isinstance(shape, list | tuple)
        )
        if isinstance(shapes, dict)
        else ""
    )
    route = f"; build route {asked['route']}" if asked.get("route") else ""
    about = (
        f"TensorRT {plain(made['tensorrt'])} on {plain(made['gpu'])}, optimisation level {asked['level']}, "
        f"{asked['timing_iterations']} timings per kernel; input shapes {given}; {megabytes(row.bytes)}, built in "
        f"{quantity(row.seconds, 's')}{route}."
    )
    blocks = _evidence(row, row.evidence, about) if isinstance(row.evidence, EngineEvidence) else ()
    return Section(row.path, (Paragraph(row.evidence.verdict, "callout"), *blocks))


def _evidence(row: BuiltEngine, proved: EngineEvidence, about: str) -> tuple[Block, ...]:
    """Return the levels of evidence, and every multiplication with why it stopped where it did."""
    unplaced = (
        " Named by the builder or the profiler, and tied to no single multiplication: "
        f"{listed(proved.unplaced)}."
        if proved.unplaced
        else ""
    )
    basis = (
        "the engine's input shapes"
        if proved.flop_basis == "input shapes"
        else "the same rows for each"
    )
    multiplications = plural(len(proved.layers), "multiplication")
    levels = Table(
        f"Evidence for {row.path}",
        columns("level of evidence", "layers", "share of FLOPs", "meaning", text=("meaning",)),
        tuple(
            (level, number(proved.count(level)), percent(proved.share(level)), MEANING[level])
            for level in LEVELS
        ),
        f"{multiplications} by a stored weight; FLOPs at {basis}.",
    )
    heads = columns(
        "weight",
        "K × N",
        "number format",
        "level of evidence",
        "why no higher",
        text=("why no higher",),
    )
    rows = tuple(
        (
            layer.name,
            f"{layer.k} × {layer.n}",
            layer.dtype,
            layer.level or "none",
            f"{layer.reason}: {layer.why_not}" if layer.reason else "it is the highest",
        )
        for layer in proved.layers
    )
    reasons = f"; stopped because: {counts(proved.reasons)}" if proved.reasons else ""
    problems = (
        [Bullets(tuple(("problem", text) for text in proved.problems))] if proved.problems else []
    )
    return (
        *problems,
        Paragraph(f"{about}{unplaced}", "soft"),
        levels,
        Fold(
            f"All {multiplications}{reasons}",
            (Table(f"Layers of {row.path}", heads, rows, small=True),),
        ),
    )
