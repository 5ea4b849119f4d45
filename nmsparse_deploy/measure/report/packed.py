"""Models without stored zeros: their size, what every GEMM was decided to run on, and the arms timed on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from nmsparse_deploy.measure.bench.result import GpuBenchResult
from nmsparse_deploy.runs.section import Block, Bullets, Paragraph, Section, Table, columns
from nmsparse_deploy.runs.wording import INTERVAL, megabytes, plural
from nmsparse_deploy.ship.torch_sparse.record import PackedModel
from nmsparse_deploy.system.timing import SpeedUp

ARMS = ("dense: the weights as they were; pruned-dense: pruned weights on dense kernels; pruned-sparse: on sparse "
        "kernels; auto: layer by layer the faster of these two; unstructured: half of the weights zero, anywhere, as a "
        "control.")


@dataclass(frozen=True)
class DecidedRows:
    """One timing of a GEMM with what its shape was decided to run on; `word` is what this timing alone says."""

    rows: int
    dense_us: float
    sparse_us: float
    speedup: float
    low: float
    high: float
    word: str
    k: int
    n: int
    weights: int
    keep: str
    why: str


@dataclass(frozen=True)
class PackedFacts:
    """A packed model with a line for every number of rows at which a GEMM was timed."""

    precision: str
    path: str
    weights: int
    packed_bytes: int
    dense_bytes: int
    verified: int
    gpu: str | None
    dry: bool
    not_checked: str | None
    decisions: tuple[DecidedRows, ...]


def packed(model: PackedModel) -> PackedFacts:
    """Put the decisions of a packed model into lines."""
    made = model.decisions
    lines = tuple(DecidedRows(**vars(at), word=at.word, k=gemm.k, n=gemm.n, weights=len(gemm.weights),
                              keep=gemm.keep, why=gemm.why)
                  for gemm in (made.gemms if made else ()) for at in gemm.verdicts)
    return PackedFacts(model.precision, model.path, model.weights, model.packed_bytes, model.dense_bytes,
                       model.verified, made.gpu if made else None, bool(made and made.dry), model.not_checked, lines)


def without_zeros(model: PackedFacts) -> Section:
    """Write the subsection about one packed model."""
    timed = (f"Sparse or dense, as timed on {model.gpu}{' (dry run: no measurement)' if model.dry else ''}:"
             if model.gpu else f"No GEMM was timed: {model.not_checked}")
    text = (f"{plural(model.weights, 'weight')} stored without zeros: {megabytes(model.packed_bytes)} in place of "
            f"{megabytes(model.dense_bytes)} in {model.precision}; {model.verified:,} verified against the masks. "
            f"{timed}")
    heads = columns("K × N", "weights", "rows", "dense", "sparse", f"speed-up of sparse over dense ({INTERVAL})",
                    "runs", "because", text=("because",))
    rows = tuple((f"{row.k} × {row.n}", str(row.weights), str(row.rows), f"{row.dense_us:.1f} µs",
                  f"{row.sparse_us:.1f} µs", _speed_up(row), row.keep, row.why) for row in model.decisions)
    table = [Table(f"Decisions for {model.path}", heads, rows, small=True)] if rows else []
    return Section(f"Packed for PyTorch: {model.path}", (Paragraph(text), *table))


def gpu_arms(bench: GpuBenchResult) -> Section:
    """Write the subsection about the arms on a GPU."""
    heads = columns("work", "arm", "median", "99th percentile", f"speed-up over dense ({INTERVAL})",
                    f"speed-up over the same weights on dense kernels ({INTERVAL})")
    rows = tuple((f"{phase.name}, {phase.how}", arm.name,
                  f"{arm.median_ms:.3f} ms", f"{arm.p99_ms:.3f} ms", _speed_up(phase.over_dense.get(arm.name)),
                  _speed_up(phase.over_pruned.get(arm.name)))
                 for phase in bench.phases for arm in phase.arms)
    blocks: list[Block] = [Paragraph(bench.verdict, "callout"), Paragraph(ARMS, "soft"), Table(
        "Arms on a GPU", heads, rows, f"Precision {bench.precision}, batch {bench.batch}, {bench.length} tokens each.",
        small=True)]
    if bench.failed:
        blocks.append(Bullets(tuple(("Not timed", f"{name}: {why}") for name, why in bench.failed.items())))
    return Section(f"Arms on {bench.before['device']}", tuple(blocks))


def _speed_up(ratio: SpeedUp | DecidedRows | None) -> str:
    return f"{ratio.speedup:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" if ratio else ""
