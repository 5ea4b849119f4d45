"""Which kernels the engines run: the evidence of `engines.json`, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from nmsparse_deploy.measure.report.stages import Recorded
from nmsparse_deploy.runs.section import Block, Bullets, Fold, Paragraph, Section, Table, columns
from nmsparse_deploy.runs.wording import counts, listed, megabytes, number, percent, plural, quantity
from nmsparse_deploy.ship.evidence import LEVELS

MEANING = {"pattern": "the stored weight is 2:4",
           "shape": "its whole fusion group is, in a shape that kernels exist for",
           "eligible": "the builder found it eligible", "chosen": "the builder chose a sparse kernel for it",
           "tactic": "the engine holds a sparse kernel for it", "observed": "that kernel was seen running",
           "counted": "the hardware counted sparse instructions"}
"""What each level of evidence says."""
WHAT_LEVELS_ARE = ("A layer's level of evidence is the last of these steps that raw output of the builder, the "
                   "profiler or the hardware shows for it; each step includes those before it.")


@dataclass(frozen=True)
class LevelCount:
    """How many layers have reached a level, and their share of the FLOPs."""

    layers: int
    flop_share: float


@dataclass(frozen=True)
class EngineGemm:
    """A multiplication of the engine by a stored weight."""

    node: str
    parameter: str | None
    k: int
    n: int
    dtype: str
    rung: str | None
    reason: str | None
    why_not: str


@dataclass(frozen=True)
class EvidenceRecord:
    """What was proved of an engine."""

    sparse_weights: bool
    gemms: int
    flop_basis: str
    rungs: dict[str, LevelCount]
    reasons: dict[str, int]
    verdict: str
    layers: tuple[EngineGemm, ...]
    unplaced: tuple[str, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class EngineSettings:
    """What the builder was asked for."""

    shapes: dict[str, tuple[int, ...]]
    level: int
    timing_iterations: int
    route: str | None = None


@dataclass(frozen=True)
class BuiltEngine:
    """An entry of `engines.json`."""

    name: str
    path: str
    onnx: str
    bytes: int
    seconds: float
    settings: EngineSettings
    environment: Recorded
    evidence: EvidenceRecord


@dataclass(frozen=True)
class EnginesFile:
    """`engines.json`."""

    engines: tuple[BuiltEngine, ...]


def built(engine: BuiltEngine) -> Section:
    """Write the subsection about one engine."""
    proved, asked, made = engine.evidence, engine.settings, engine.environment
    shapes = "; ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in asked.shapes.items())
    route = f"; build route {asked.route}" if asked.route else ""
    unplaced = (" Named by the builder or the profiler, and tied to no single multiplication: "
                f"{listed(proved.unplaced)}." if proved.unplaced else "")
    basis = "the engine's input shapes" if proved.flop_basis == "input shapes" else "the same rows for each"
    blocks: list[Block] = [Paragraph(proved.verdict, "callout")]
    if proved.problems:
        blocks.append(Bullets(tuple(("problem", text) for text in proved.problems)))
    blocks.append(Paragraph(
        f"TensorRT {made['tensorrt']} on {made['gpu']}, optimisation level {asked.level}, {asked.timing_iterations} "
        f"timings per kernel; input shapes {shapes}; {megabytes(engine.bytes)}, built in "
        f"{quantity(engine.seconds, 's')}{route}.{unplaced}", "soft"))
    blocks.append(Table(
        f"Evidence for {engine.path}",
        columns("level of evidence", "layers", "share of FLOPs", "meaning", text=("meaning",)),
        tuple((level, number(proved.rungs[level].layers), percent(proved.rungs[level].flop_share), MEANING[level])
              for level in LEVELS), f"{plural(proved.gemms, 'multiplication')} by a stored weight; FLOPs at {basis}."))
    reasons = f"; stopped because: {counts(proved.reasons)}" if proved.reasons else ""
    heads = columns("weight", "K × N", "number format", "level of evidence", "why no higher", text=("why no higher",))
    rows = tuple((layer.parameter or layer.node, f"{layer.k} × {layer.n}", layer.dtype, layer.rung or "none",
                  f"{layer.reason}: {layer.why_not}" if layer.reason else "it is the highest")
                 for layer in proved.layers)
    blocks.append(Fold(f"All {plural(proved.gemms, 'multiplication')}{reasons}",
                       (Table(f"Layers of {engine.path}", heads, rows, small=True),)))
    return Section(engine.path, tuple(blocks))
