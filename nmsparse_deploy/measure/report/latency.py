"""How fast each arm answered, and accuracy, size and latency of all variants in one table."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nmsparse_deploy.measure.report import plots
from nmsparse_deploy.measure.report.quality import Quality
from nmsparse_deploy.measure.report.stages import BenchFile, Circumstances
from nmsparse_deploy.models.roofline import Prediction
from nmsparse_deploy.runs.section import Block, Figure, Paragraph, Section, Table, columns
from nmsparse_deploy.runs.wording import (
    INTERVAL,
    interval,
    megabytes,
    number,
    percent,
    plain,
    quantity,
    with_error,
    within,
)
from nmsparse_deploy.ship.onnx.record import ExportedGraph
from nmsparse_deploy.system.timing import SpeedUp, TimedArm

OTHER_RUNTIME = (
    "Arms marked 'other runtime' do not run where the dense arm runs, and their dense twins were not "
    "timed: their ratios compare runtimes and say nothing about pruning."
)


@dataclass(frozen=True)
class LatencyArm(TimedArm):
    """A timed arm with its speed-up over dense; `other_runtime` where that compares runtimes."""

    ratio: SpeedUp | None = None
    other_runtime: bool = False


@dataclass(frozen=True)
class LatencyResult:
    """All arms and what may be concluded. `predicted` stays apart from every measurement."""

    where: str
    shape: dict[str, int]
    arms: tuple[LatencyArm, ...]
    verdict: str
    predicted: tuple[Prediction, ...]
    note: str | None
    environment: Circumstances


@dataclass(frozen=True)
class Variant:
    """One model or graph with whatever was measured of it."""

    variant: str
    metric: str | None
    value: float | None
    standard_error: float | None
    bytes: int | None
    median_ms: float | None


def latency(bench: BenchFile | None) -> LatencyResult | None:
    """Collect the timed arms; None when nothing was timed."""
    if bench is None:
        return None
    base = next((arm.kernel for arm in bench.arms if arm.name not in bench.ratios), None)
    arms = tuple(
        LatencyArm(
            **vars(arm),
            ratio=bench.ratios.get(arm.name),
            other_runtime=arm.name in bench.ratios and arm.kernel != base,
        )
        for arm in bench.arms
    )
    note = OTHER_RUNTIME if any(arm.other_runtime for arm in arms) else None
    return LatencyResult(
        bench.where, bench.shape, arms, bench.verdict, bench.predicted, note, bench.environment
    )


def overview(
    quality: Quality | None,
    graphs: tuple[ExportedGraph, ...] | None,
    latency: LatencyResult | None,
    model_bytes: int | None,
) -> tuple[Variant, ...]:
    """Return a row per variant as far as each was measured; none with fewer than two kinds of
    measurement."""
    if sum(part is not None for part in (quality, graphs, latency)) < 2:
        return ()
    metrics = (
        {row.label: row for row in reversed(quality.rows)} if quality else {}
    )  # the first metric matters most
    files = {f"pruned, ONNX {graph.precision}": sum(graph.files.values()) for graph in graphs or ()}
    times = {arm.name: arm.median_ms for arm in latency.arms} if latency else {}
    labels = [row.label for row in quality.rows] if quality else []
    sizes = {"pruned": model_bytes, **files}
    return tuple(
        Variant(
            name,
            row.metric if row else None,
            row.value if row else None,
            row.standard_error if row else None,
            sizes.get(name),
            times.get(name),
        )
        for name in dict.fromkeys([*labels, *files, *times])
        for row in [metrics.get(name)]
    )


def together(variants: tuple[Variant, ...]) -> Section:
    """Write the section that puts accuracy, size and latency side by side."""
    rows = tuple(
        (
            row.variant,
            with_error(row.value, row.standard_error),
            number(row.metric),
            megabytes(row.bytes),
            quantity(row.median_ms, "ms"),
        )
        for row in variants
    )
    heads = columns("variant", "value ± standard error", "metric", "size on disk", "median latency")
    return Section(
        "Accuracy, size and latency together", (Table("Every variant", heads, rows),), "overview"
    )


def timed(latency: LatencyResult | None) -> Section:
    """Write the section about latency."""
    if latency is None:
        return Section("Latency", (Paragraph("Latency was not measured in this run."),), "latency")
    blocks: list[Block] = [Paragraph(latency.verdict, "callout")]
    if latency.note:
        blocks.append(Paragraph(latency.note, "callout"))
    if all(
        math.isfinite(time)
        for arm in latency.arms
        for time in (arm.p10_ms, arm.median_ms, arm.p90_ms)
    ):
        blocks.append(
            Figure(
                (plots.latency_arms(latency.arms, plots.WIDE, "latency-wide"),),
                narrow=(plots.latency_arms(latency.arms, plots.NARROW, "latency"),),
            )
        )
    heads = columns(
        "arm",
        "kernels",
        "median",
        "10th to 90th percentile",
        "calls",
        f"speed-up: dense time over arm time ({INTERVAL})",
    )
    blocks.append(
        Table(
            "Latency of every arm",
            heads,
            tuple(
                (
                    arm.name,
                    arm.kernel,
                    quantity(arm.median_ms, "ms"),
                    f"{interval(arm.p10_ms, arm.p90_ms)} ms",
                    number(arm.calls),
                    _speed_up(arm),
                )
                for arm in latency.arms
            ),
            f"On {latency.where}; {plain(latency.shape)}; arms interleaved in random order.",
        )
    )
    if latency.predicted:
        blocks.append(_predicted(latency.predicted))
    return Section("Latency", tuple(blocks), "latency")


def _speed_up(arm: LatencyArm) -> str:
    if arm.ratio is None:
        return "reference" if arm.name == "dense" else "none: its dense twin was not timed"
    ratio = arm.ratio
    text = (
        f"{within(ratio.speedup, ratio.low, ratio.high)} times ({interval(ratio.low, ratio.high)})"
    )
    return f"{text}, other runtime" if arm.other_runtime else text


def _predicted(bounds: tuple[Prediction, ...]) -> Section:
    heads = columns(
        "GPU",
        "rows per GEMM",
        "pruned GEMMs, at most",
        "whole model, at most",
        "share of FLOPs in pruned GEMMs",
    )
    rows = tuple(
        (
            row.gpu,
            number(row.rows),
            f"{row.gemm_speedup:.2f} times as fast",
            f"{row.model_speedup:.2f} times as fast",
            percent(row.flop_share),
        )
        for row in bounds
    )
    return Section(
        "Predicted, not measured",
        (
            Table(
                "Predicted upper bounds",
                heads,
                rows,
                f"Upper bounds for GPUs that were not there: {bounds[0].formula}",
            ),
        ),
    )
