"""What `export.json` holds: every exported graph with what was checked about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from nmsparse_deploy.prove.agreement import Agreement, NotCompared, compared
from nmsparse_deploy.runs.run_dir import GRAPH
from nmsparse_deploy.ship.engine import Recorded
from nmsparse_deploy.ship.onnx.trace import TracedGraph
from nmsparse_deploy.ship.quantise import BASE

RECORD = "export.json"


@dataclass(frozen=True)
class Quantisation:
    """The step that brought the GEMMs of a graph to 8 bits."""

    gemms: int
    requantised: int
    """GEMMs with 8-bit outputs."""
    vanished: int
    """Weights that were not zero and are now."""
    scales: str
    base: str = BASE


@dataclass(frozen=True)
class CachedGraphs:
    """Graphs with a key/value cache, on the weights of the model's own graph."""

    graphs: tuple[str, ...]
    agreement: Agreement | NotCompared


@dataclass(frozen=True)
class VisionGraph:
    """The graph of the tower that sees pictures: how it agrees with the model, or why there is
    none."""

    links: int = 0
    agreement: Agreement | NotCompared | None = None
    not_exported: str | None = None

    def line(self) -> str:
        """Return the record in a sentence."""
        if self.agreement is None:
            return f"  no graph of the tower that sees pictures: {self.not_exported}"
        words = f"{self.links} weights linked and verified; {compared(self.agreement)}"
        return f"  vision.onnx, the tower that sees pictures: {words}"


@dataclass(frozen=True)
class CompileOutcome:
    """A compiler's summary of a graph, why it refuses it, or that it is not here to ask: one of the
    three."""

    summary: str | None = None
    refused: str | None = None
    not_checked: str | None = None
    hint: str | None = None
    facts: Recorded = field(default_factory=dict)
    """What else the compiler said."""

    def to_json(self) -> dict[str, object]:
        words = asdict(self)
        return {
            **words.pop("facts"),
            **{name: text for name, text in words.items() if text is not None},
        }


@dataclass(frozen=True)
class ExportedGraph(TracedGraph):
    """One precision of an export. `files` are all of its folder, `precision` is that of the
    GEMMs."""

    path: str
    links: int
    """Pruned weights that were found in the graph."""
    agreement: Agreement | NotCompared
    quantisation: Quantisation | None = None
    cached: CachedGraphs | None = None
    tensorrt_rtx: dict[str, CompileOutcome] = field(default_factory=dict)
    vision: VisionGraph | None = None

    def to_json(self) -> dict[str, object]:
        compiled = {name: outcome.to_json() for name, outcome in self.tensorrt_rtx.items()}
        facts = asdict(self)
        if self.vision is None:
            del facts["vision"]
        return {**facts, "size_note": self.size_note, "tensorrt_rtx": compiled}

    def lines(self, path: str) -> list[str]:
        """Return the record in sentences; `path` is where the graph lies."""
        lines = [
            f"{path}: {sum(self.files.values()) / 1e6:.0f} MB, {self.links} weights linked and verified; "
            f"{compared(self.agreement)}"
        ]
        if self.quantisation is not None:
            done = self.quantisation
            lines.append(
                f"  {done.gemms} GEMMs in {self.precision} (scales per {done.scales}), {done.requantised} "
                f"with 8-bit outputs; {done.vanished:,} small weights became 0"
            )
        if self.cached is not None:
            lines.append(
                f"  {' and '.join(self.cached.graphs)} on the same weights, prefill and steps: "
                f"{compared(self.cached.agreement)}"
            )
        if self.vision is not None:
            lines.append(self.vision.line())
        compiled = self.tensorrt_rtx
        if all(outcome.not_checked for outcome in compiled.values()):
            return [*lines, f"  not checked here: TensorRT-RTX ({compiled[GRAPH].hint})"]
        return lines + [
            f"  {name}: {outcome.summary or outcome.refused or outcome.not_checked}"
            for name, outcome in compiled.items()
        ]


@dataclass(frozen=True)
class ExportFile:
    """`export.json`."""

    files: tuple[ExportedGraph, ...]
