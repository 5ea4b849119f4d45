"""Models without stored zeros: their size, what every GEMM was decided to run on, and the arms
timed on a GPU."""

from __future__ import annotations

from dataclasses import asdict

from nmsparse_deploy.measure.bench.result import GpuBenchResult
from nmsparse_deploy.runs.section import Block, Bullets, Paragraph, Section, Table, columns
from nmsparse_deploy.runs.wording import INTERVAL, megabytes, plural
from nmsparse_deploy.ship.torch_sparse.record import PackedModel
from nmsparse_deploy.system.timing import SpeedUp

ARMS = (
    "dense: the weights as they were; pruned-dense: pruned weights on dense kernels; pruned-sparse: on sparse "
    "kernels; auto: layer by layer the faster of these two; unstructured: half of the weights zero, anywhere, as a "
    "control."
)


def packed_json(model: PackedModel) -> dict[str, object]:
    """Return a packed model with a flat row for every number of rows at which a GEMM was timed."""
    made = model.decisions
    rows = [
        {
            **asdict(at),
            "word": at.word,
            "k": gemm.k,
            "n": gemm.n,
            "weights": len(gemm.weights),
            "keep": gemm.keep,
            "why": gemm.why,
        }
        for gemm in (made.gemms if made else ())
        for at in gemm.verdicts
    ]
    return {
        **model.to_json(),
        "gpu": made.gpu if made else None,
        "dry": bool(made and made.dry),
        "decisions": rows,
    }


def without_zeros(model: PackedModel) -> Section:
    """Write the subsection about one packed model."""
    made = model.decisions
    timed = (
        f"Sparse or dense, as timed on {made.gpu}{' (dry run: no measurement)' if made.dry else ''}:"
        if made
        else f"No GEMM was timed: {model.not_checked}"
    )
    text = (
        f"{plural(model.weights, 'weight')} stored without zeros: {megabytes(model.packed_bytes)} in place of "
        f"{megabytes(model.dense_bytes)} in {model.precision}; {model.verified:,} verified against the masks. "
        f"{timed}"
    )
    heads = columns(
        "K × N",
        "weights",
        "rows",
        "dense",
        "sparse",
        f"speed-up of sparse over dense ({INTERVAL})",
        "runs",
        "because",
        text=("because",),
    )
    rows = tuple(
        (
            f"{gemm.k} × {gemm.n}",
            str(len(gemm.weights)),
            str(at.rows),
            f"{at.dense_us:.1f} µs",
            f"{at.sparse_us:.1f} µs",
            str(SpeedUp(at.speedup, at.low, at.high)),
            gemm.keep,
            gemm.why,
        )
        for gemm in (made.gemms if made else ())
        for at in gemm.verdicts
    )
    table = [Table(f"Decisions for {model.path}", heads, rows, small=True)] if rows else []
    return Section(f"Packed for PyTorch: {model.path}", (Paragraph(text), *table))


def gpu_arms(bench: GpuBenchResult) -> Section:
    """Write the subsection about the arms on a GPU."""
    heads = columns(
        "work",
        "arm",
        "median",
        "99th percentile",
        f"speed-up over dense ({INTERVAL})",
        f"speed-up over the same weights on dense kernels ({INTERVAL})",
    )
    rows = tuple(
        (
            f"{phase.name}, {phase.how}",
            arm.name,
            f"{arm.median_ms:.3f} ms",
            f"{arm.p99_ms:.3f} ms",
            str(phase.over_dense.get(arm.name, "")),
            str(phase.over_pruned.get(arm.name, "")),
        )
        for phase in bench.phases
        for arm in phase.arms
    )
    blocks: list[Block] = [
        Paragraph(bench.verdict, "callout"),
        Paragraph(ARMS, "soft"),
        Table(
            "Arms on a GPU",
            heads,
            rows,
            f"Precision {bench.precision}, batch {bench.batch}, {bench.length} tokens each.",
            small=True,
        ),
    ]
    if bench.failed:
        blocks.append(
            Bullets(tuple(("Not timed", f"{name}: {why}") for name, why in bench.failed.items()))
        )
    return Section(f"Arms on {bench.before['device']}", tuple(blocks))
