"""What lies on disk: the size of every artefact, and how close exported graphs are to the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nmsparse_deploy.measure.report.stages import Stages
from nmsparse_deploy.prove.agreement import Agreement, NotCompared
from nmsparse_deploy.runs.section import Block, Bullets, Paragraph, Section, Table, columns
from nmsparse_deploy.runs.wording import megabytes, number, percent, plain
from nmsparse_deploy.ship.onnx.record import ExportedGraph

DENSE_STORED = (
    "The zeros are stored like any other value, so the pruned weights take as much space as before; only a "
    "runtime that packs the pattern makes them smaller."
)


@dataclass(frozen=True)
class ArtefactSize:
    """An artefact with its size."""

    artefact: str
    bytes: int


@dataclass(frozen=True)
class Sizes:
    """Sizes of everything the run holds."""

    rows: tuple[ArtefactSize, ...]
    model_bytes: int | None
    masks_bytes: int | None
    note: str = DENSE_STORED


def sizes(stages: Stages) -> Sizes:
    """Measure every artefact of the run."""
    model = _bytes(
        *(stages.path / "model").glob("*.safetensors"), *(stages.path / "model").glob("*.bin")
    )
    masks = _bytes(stages.path / "masks.safetensors")
    rows = [
        ("model/ (weights, zeros stored)", model),
        ("masks.safetensors (one bit per weight)", masks),
    ]
    for graph in stages.export.files if stages.export else ():
        rows += [
            (f"ONNX {graph.precision} (zeros stored)", sum(graph.files.values())),
            (f"dense weights at {graph.precision}, for comparison", graph.dense_bytes),
        ]
    return Sizes(
        tuple(ArtefactSize(name, size) for name, size in rows if size is not None), model, masks
    )


def _bytes(*files: Path) -> int | None:
    there = [file.stat().st_size for file in files if file.is_file()]
    return sum(there) if there else None


def graph_json(graph: ExportedGraph) -> dict[str, object]:
    """Return an exported graph with its size and what else was done to it."""
    return {**graph.to_json(), "bytes": sum(graph.files.values()), "notes": _notes(graph)}


def _notes(graph: ExportedGraph) -> tuple[str, ...]:
    """Say what was done to a graph beside tracing it, and what TensorRT-RTX made of it."""
    notes = []
    if graph.quantisation is not None:
        made = graph.quantisation
        notes.append(
            f"{made.gemms} GEMMs multiply {graph.precision} numbers, weight scales per {made.scales}; "
            f"{made.requantised} write 8 bits; {made.vanished} small weights became zero."
        )
    if graph.cached is not None:
        same = graph.cached.agreement
        gap = (
            f"(not run: {same.not_checked})"
            if isinstance(same, NotCompared)
            else f"by {same.max_abs:.2g} at most"
        )
        notes.append(
            f"{' and '.join(graph.cached.graphs)} share the weights; reading a text step by step differs from "
            f"one pass {gap}."
        )
    compiled = {name: made.summary or made.refused for name, made in graph.tensorrt_rtx.items()}
    return (*notes, *(f"{name}: {words}" for name, words in compiled.items() if words))


def stored(sizes: Sizes, graphs: tuple[ExportedGraph, ...] | None) -> Section:
    """Write the section about sizes and exported graphs."""
    table = Table(
        "Sizes of the artefacts",
        columns("artefact", "size", "bytes"),
        tuple((row.artefact, megabytes(row.bytes), number(row.bytes)) for row in sizes.rows),
    )
    exported = (
        _exported(graphs) if graphs else Paragraph("No ONNX file was exported in this run.", "soft")
    )
    return Section("Sizes", (table, Paragraph(sizes.note), exported), "sizes")


def _exported(graphs: tuple[ExportedGraph, ...]) -> Section:
    heads = columns(
        "file",
        "opset",
        "weights linked to the model",
        "largest difference",
        "relative difference",
        "same top answer",
    )
    body: list[Block] = [
        Table("Exported graphs", heads, tuple(_compared(graph) for graph in graphs))
    ]
    notes = tuple(
        (graph.path, note)
        for graph in graphs
        for note in (*_not_run(graph), *graph.warnings, *_notes(graph))
    )
    return Section(
        "Exported graphs against the PyTorch model", (*body, *([Bullets(notes)] if notes else []))
    )


def _compared(graph: ExportedGraph) -> tuple[str, ...]:
    same = graph.agreement
    row = (graph.path, plain(graph.opset), number(graph.links))
    if not isinstance(same, Agreement):
        return (*row, "not run here", "", "")
    top = (
        "no classes"
        if same.argmax_share is None
        else (f"{percent(same.argmax_share)} of {number(same.positions)} positions")
    )
    return (*row, number(same.max_abs), number(same.relative), top)


def _not_run(graph: ExportedGraph) -> tuple[str, ...]:
    return (
        (f"not run here: {graph.agreement.not_checked}",)
        if isinstance(graph.agreement, NotCompared)
        else ()
    )
