"""Everything that the report says, in types; report.json holds it, and the pages are sections made
of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from nmsparse_deploy.measure.bench.result import GpuBenchResult
from nmsparse_deploy.measure.evaluate.result import DrawnImage
from nmsparse_deploy.measure.report.artefacts import Sizes, graph_json, sizes, stored
from nmsparse_deploy.measure.report.compliance import (
    Compliance,
    compliance,
    held,
    not_checked,
    unchecked,
)
from nmsparse_deploy.measure.report.engines import NOTHING, built
from nmsparse_deploy.measure.report.latency import (
    LatencyResult,
    Variant,
    latency,
    overview,
    timed,
    together,
)
from nmsparse_deploy.measure.report.layers import Layers, MaskFacts, layers, masks, one_by_one
from nmsparse_deploy.measure.report.packed import gpu_arms, packed_json, without_zeros
from nmsparse_deploy.measure.report.provenance import (
    Provenance,
    dense,
    origin,
    provenance,
    stayed_dense,
)
from nmsparse_deploy.measure.report.quality import (
    Continuations,
    Quality,
    accuracy,
    continuations,
    drawn,
    quality,
    written,
)
from nmsparse_deploy.measure.report.stages import NotChecked, Stages
from nmsparse_deploy.measure.report.verdict import Headline, Pruning, headline
from nmsparse_deploy.models import short_name
from nmsparse_deploy.models.base import Skipped
from nmsparse_deploy.pattern import TWO_FOUR, parse_pattern
from nmsparse_deploy.runs.manifest import RecipeRecord
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.runs.section import Paragraph, Section
from nmsparse_deploy.runs.stage_file import read_stage
from nmsparse_deploy.ship.engine import BuiltEngine, EngineFile
from nmsparse_deploy.ship.evidence import WHAT_LEVELS_ARE, EngineEvidence
from nmsparse_deploy.ship.onnx.record import ExportedGraph
from nmsparse_deploy.ship.torch_sparse.record import PackedFile, PackedModel

FORMAT = "nmsparse-report-1"


@dataclass(frozen=True)
class ReportedModel:
    """The model that was pruned."""

    source: str
    name: str


@dataclass(frozen=True)
class Report:
    """The content of report.json."""

    headline: Headline
    format: str
    model: ReportedModel
    pruning: Pruning
    quality: Quality | None
    continuations: Continuations | None
    images: list[DrawnImage]
    compliance: Compliance | None
    not_checked: tuple[NotChecked, ...]
    sizes: Sizes
    graphs: tuple[ExportedGraph, ...] | None
    engines: tuple[BuiltEngine, ...] | None
    packed: tuple[PackedModel, ...] | None
    gpu_arms: GpuBenchResult | None
    layers: Layers
    masks: MaskFacts | None
    latency: LatencyResult | None
    overview: tuple[Variant, ...]
    provenance: Provenance
    skipped: tuple[Skipped, ...]

    def to_json(self) -> dict[str, object]:
        """Return the fields, and of graphs, engines, packed models and arms what follows from
        theirs."""
        return {
            **asdict(self),
            "engines": [row.to_json() for row in self.engines] if self.engines else None,
            "graphs": [graph_json(row) for row in self.graphs] if self.graphs else None,
            "packed": [packed_json(row) for row in self.packed] if self.packed else None,
            "gpu_arms": self.gpu_arms.to_json() if self.gpu_arms else None,
        }


def collect(run: RunDir) -> Report:
    """Read what the run holds. Raises `UsageError` when nothing is pruned yet or a stage file is
    damaged."""
    stages = Stages.read(run)
    model = ReportedModel(stages.manifest.recipe.model, short_name(stages.manifest.recipe.model))
    verified, measured, latencies = (
        compliance(stages),
        quality(stages.evaluate),
        latency(stages.bench),
    )
    on_disk, exported = sizes(stages), stages.export.files if stages.export else None
    engines, torch = (
        read_stage(run, "engines.json", EngineFile),
        read_stage(run, "torch.json", PackedFile),
    )
    missing, pruning = not_checked(stages, engines is not None), _pruning(stages)
    verdicts = [
        f"Engine {engine.path}: {engine.evidence.verdict}"
        for engine in (engines.engines if engines else ())
    ]
    top = headline(model.name, pruning, verified, measured, on_disk, latencies, verdicts, missing)
    return Report(
        top,
        FORMAT,
        model,
        pruning,
        measured,
        continuations(stages.evaluate),
        stages.evaluate.images if stages.evaluate else [],
        verified,
        missing,
        on_disk,
        exported,
        engines.engines if engines else None,
        torch.artefacts if torch else None,
        read_stage(run, "bench-gpu.json", GpuBenchResult),
        layers(stages),
        masks(run),
        latencies,
        overview(measured, exported, latencies, on_disk.model_bytes),
        provenance(stages),
        stayed_dense(stages),
    )


def _pruning(stages: Stages) -> Pruning:
    patterns = sorted({row.pattern for row in stages.layers}) or [stages.manifest.recipe.pattern]
    return Pruning(
        _method(stages.manifest.recipe),
        ", ".join(patterns),
        len(stages.layers),
        all(parse_pattern(text).implies(TWO_FOUR) for text in patterns),
        len({row.block for row in stages.layers}),
        sum(math.prod(row.shape) for row in stages.layers),
        "prune" in stages.manifest.stages,
    )


def _method(recipe: RecipeRecord) -> str:
    """Name the method with everything that the recipe has around it, in the order in which it
    happens."""
    before = ["permuted channels"] if recipe.permute else []
    bits = [f"{recipe.wbits} bits"] if recipe.wbits else []
    return " + ".join(
        [*before, recipe.method, *bits, *(str(step.get("name")) for step in recipe.refine)]
    )


def sections(report: Report) -> tuple[Section, ...]:
    """Make the sections of the report in the order in which a reader asks."""
    texts, images = report.continuations, report.images
    return (
        *([together(report.overview)] if report.overview else []),
        accuracy(report.quality),
        *([written(texts)] if texts else []),
        *([drawn(images)] if images else []),
        held(report.compliance),
        unchecked(report.not_checked),
        _kernels(report),
        timed(report.latency),
        one_by_one(report.layers, report.masks),
        stored(report.sizes, report.graphs),
        origin(
            report.provenance,
            report.model.source,
            report.quality,
            report.latency.environment if report.latency else None,
        ),
        dense(report.skipped),
    )


def _kernels(report: Report) -> Section:
    proved = any(isinstance(engine.evidence, EngineEvidence) for engine in report.engines or ())
    about = NOTHING if not report.engines else WHAT_LEVELS_ARE if proved else ""
    return Section(
        "Which kernels run",
        (
            *([Paragraph(about)] if about else []),
            *(built(engine) for engine in report.engines or ()),
            *(without_zeros(model) for model in report.packed or ()),
            *([gpu_arms(report.gpu_arms)] if report.gpu_arms else []),
        ),
        "engines",
    )
