"""What lies on disk: the size of every artefact, and how close exported graphs are to the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nmsparse_deploy.measure.report.stages import Stages
from nmsparse_deploy.prove.agreement import Agreement, NotCompared
from nmsparse_deploy.runs.section import Block, Bullets, Paragraph, Section, Table, columns
from nmsparse_deploy.runs.wording import megabytes, number, percent, plain
from nmsparse_deploy.ship.onnx.record import ExportedGraph

DENSE_STORED = ("The zeros are stored like any other value, so the pruned weights take as much space as before; only a "
                "runtime that packs the pattern makes them smaller.")


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


@dataclass(frozen=True)
class GraphFacts:
    """An exported graph, its agreement with the model, and what else was done to it."""

    path: str
    precision: str
    opset: int | None
    files: dict[str, int]
    bytes: int
    dense_bytes: int
    links: int
    seconds: float | None
    size_note: str
    dynamic: tuple[str, ...]
    agreement: Agreement | NotCompared | None
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def sizes(stages: Stages) -> Sizes:
    """Measure every artefact of the run."""
    model = _bytes(*(stages.path / "model").glob("*.safetensors"), *(stages.path / "model").glob("*.bin"))
    masks = _bytes(stages.path / "masks.safetensors")
    rows = [("model/ (weights, zeros stored)", model), ("masks.safetensors (one bit per weight)", masks)]
    for graph in stages.export.files if stages.export else ():
        rows += [(f"ONNX {graph.precision} (zeros stored)", sum(graph.files.values())),
                 (f"dense weights at {graph.precision}, for comparison", graph.dense_bytes)]
    return Sizes(tuple(ArtefactSize(name, size) for name, size in rows if size is not None), model, masks)


def _bytes(*files: Path) -> int | None:
    there = [file.stat().st_size for file in files if file.is_file()]
    return sum(there) if there else None


def graphs(stages: Stages) -> tuple[GraphFacts, ...] | None:
    """Describe exported graphs; None when nothing was exported."""
    if stages.export is None:
        return None
    return tuple(GraphFacts(graph.path, graph.precision, graph.opset, graph.files, sum(graph.files.values()),
                            graph.dense_bytes, graph.links, graph.seconds, graph.size_note, graph.dynamic,
                            graph.agreement, graph.warnings, _notes(graph)) for graph in stages.export.files)


def _notes(graph: ExportedGraph) -> tuple[str, ...]:
    """Say what was done to a graph beside tracing it, and what TensorRT-RTX made of it."""
    notes = []
    if graph.quantisation is not None:
        made = graph.quantisation
        notes.append(f"{made.gemms} GEMMs multiply {graph.precision} numbers, weight scales per {made.scales}; "
                     f"{made.requantised} write 8 bits; {made.vanished} small weights became zero.")
    if graph.cached is not None:
        same = graph.cached.agreement
        gap = f"(not run: {same.not_checked})" if isinstance(same, NotCompared) else f"by {same.max_abs:.2g} at most"
        notes.append(f"{' and '.join(graph.cached.graphs)} share the weights; reading a text step by step differs from "
                     f"one pass {gap}.")
    compiled = {name: made.summary or made.refused for name, made in graph.tensorrt_rtx.items()}
    return (*notes, *(f"{name}: {words}" for name, words in compiled.items() if words))


def stored(sizes: Sizes, graphs: tuple[GraphFacts, ...] | None) -> Section:
    """Write the section about sizes and exported graphs."""
    table = Table("Sizes of the artefacts", columns("artefact", "size", "bytes"),
                  tuple((row.artefact, megabytes(row.bytes), number(row.bytes)) for row in sizes.rows))
    exported = _exported(graphs) if graphs else Paragraph("No ONNX file was exported in this run.", "soft")
    return Section("Sizes", (table, Paragraph(sizes.note), exported), "sizes")


def _exported(graphs: tuple[GraphFacts, ...]) -> Section:
    heads = columns("file", "opset", "weights linked to the model", "largest difference", "relative difference",
                    "same top answer")
    body: list[Block] = [Table("Exported graphs", heads, tuple(_compared(graph) for graph in graphs))]
    notes = tuple((graph.path, note) for graph in graphs for note in (*_not_run(graph), *graph.warnings, *graph.notes))
    return Section("Exported graphs against the PyTorch model", (*body, *([Bullets(notes)] if notes else [])))


def _compared(graph: GraphFacts) -> tuple[str, ...]:
    same = graph.agreement
    row = (graph.path, plain(graph.opset), number(graph.links))
    if not isinstance(same, Agreement):
        return (*row, "not run here", "", "")
    top = "no classes" if same.argmax_share is None else (
        f"{percent(same.argmax_share)} of {number(same.positions)} positions")
    return (*row, number(same.max_abs), number(same.relative), top)


def _not_run(graph: GraphFacts) -> tuple[str, ...]:
    return (f"not run here: {graph.agreement.not_checked}",) if isinstance(graph.agreement, NotCompared) else ()
