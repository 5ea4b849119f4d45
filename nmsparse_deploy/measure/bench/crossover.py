"""From how many rows on sparse kernels win, for every shape and precision, measured on one GPU.

Rows are batch times tokens. A table is written for each precision; it is a latency table as
`plan --latency-table` reads it, with more in every line:

    {"gpu": ..., "precision": "fp16", "rows": [{"k", "n", "rows", "dense_us", "sparse_us", "low", "high", ...}], ...}

Where a fusion group becomes one GEMM its merged shape is looked up, where it does not its members
are: both are timed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from nmsparse_deploy.errors import NmsparseError, UsageError, first_line
from nmsparse_deploy.models.base import Target
from nmsparse_deploy.ship.torch_sparse.kernel_choice import ROUNDS, judge, time_pair, twins
from nmsparse_deploy.ship.torch_sparse.semi_structured import DTYPES, KernelSetting, kernels
from nmsparse_deploy.system.gpu_clock import Machine
from nmsparse_deploy.system.progress import Progress, silent

ROWS = (16, 64, 256, 1024, 4096, 16384)
PRECISIONS = tuple(DTYPES)
Shape = tuple[int, int]
NO_TIME = "there was no time left"


@dataclass(frozen=True)
class Line:
    """One shape at one number of rows in one precision. Without times, `why_not` says why."""

    k: int
    n: int
    rows: int
    precision: str
    dense_us: float | None = None
    sparse_us: float | None = None
    speedup: float | None = None
    low: float | None = None
    high: float | None = None
    setting: KernelSetting | None = None
    why_not: str | None = None

    @property
    def teraflops(self) -> float | None:
        """Return the rate of the sparse product, counted as if it were dense."""
        return (
            None
            if self.sparse_us is None
            else 2 * self.rows * self.k * self.n / self.sparse_us / 1e6
        )


@dataclass(frozen=True)
class ShapeWins:
    """The number of rows from which on sparse wins for one shape, and the most that it gains; None:
    nowhere."""

    k: int
    n: int
    from_rows: int | None
    best_speedup: float | None
    best_rows: int | None
    why_not: str | None
    """Why nothing was timed."""


@dataclass(frozen=True)
class CrossoverTable:
    """All lines of one precision on one GPU."""

    gpu: str
    precision: str
    kernels: str
    lines: tuple[Line, ...]
    environment: Mapping[str, object]

    def to_json(self) -> dict[str, object]:
        timed = [
            {
                **{
                    name: value
                    for name, value in asdict(line).items()
                    if name not in ("precision", "why_not")
                },
                "teraflops": line.teraflops,
            }
            for line in self.lines
            if line.why_not is None
        ]
        missing = [
            {"k": line.k, "n": line.n, "rows": line.rows, "why_not": line.why_not}
            for line in self.lines
            if line.why_not
        ]
        return {
            "gpu": self.gpu,
            "precision": self.precision,
            "kernels": self.kernels,
            "rows": timed,
            "missing": missing,
            "crossover": [asdict(row) for row in wins(self.lines)],
            **self.environment,
        }


def shapes_of(targets: Iterable[Target]) -> dict[Shape, list[str]]:
    """Return the GEMM shapes `(k, n)` of matrices and of fusion groups, with the parameters that
    have them."""
    shapes: dict[Shape, list[str]] = {}
    groups: dict[str, list[Target]] = {}
    for target in targets:
        shapes.setdefault((target.k, target.outputs), []).append(target.name)
        groups.setdefault(target.fusion, []).append(target)
    for members in groups.values():
        if len(members) > 1 and not members[0].routed:
            merged = " + ".join(member.name for member in members)
            shapes.setdefault((members[0].k, sum(member.n for member in members)), []).append(
                merged
            )
    return shapes


def parse_shape(text: str) -> Shape:
    """Read `4096x14336` as `(k, n)`. Raises `UsageError`."""
    k, _, n = text.partition("x")
    if not (k.isdecimal() and n.isdecimal() and int(k) and int(n)):
        raise UsageError(f"'{text}' is no shape.", "write K x N as --shape 4096x14336")
    return int(k), int(n)


def crossover(
    shapes: Iterable[Shape],
    rows: Sequence[int],
    precisions: Sequence[str],
    machine: Machine,
    rounds: int = ROUNDS,
    progress: Progress = silent,
    until: float = float("inf"),
) -> list[Line]:
    """Time dense against sparse everywhere; what cannot run says why, and so does what came after
    `until` (monotonic seconds)."""
    lines: list[Line] = []
    listed = [(precision, shape) for precision in precisions for shape in shapes]
    for number, (precision, shape) in enumerate(listed):
        progress(f"{shape[0]} x {shape[1]} in {precision}", number, len(listed))
        lines += _shape(shape, rows, precision, machine, rounds, until)
    return lines


def _shape(
    shape: Shape, rows: Sequence[int], precision: str, machine: Machine, rounds: int, until: float
) -> Iterator[Line]:
    """Yield the lines of one shape in one precision; its weight is made once."""
    try:
        pair = None if time.monotonic() > until else twins(*shape, precision, machine.device)
    except (NmsparseError, RuntimeError) as error:
        yield from (Line(*shape, count, precision, why_not=first_line(error)) for count in rows)
        return
    for count in rows:
        if pair is None or time.monotonic() > until:
            yield Line(*shape, count, precision, why_not=NO_TIME)
            continue
        try:
            times = time_pair(pair, count, machine, rounds)
        except RuntimeError as error:  # out of memory, or a kernel that refuses
            yield Line(*shape, count, precision, why_not=first_line(error))
            continue
        verdict = judge(count, times)
        yield Line(
            *shape,
            count,
            precision,
            verdict.dense_us,
            verdict.sparse_us,
            verdict.speedup,
            verdict.low,
            verdict.high,
            times.setting,
        )


def first_win(lines: Iterable[Line]) -> int | None:
    """Return the smallest number of rows from which on sparse wins beyond noise wherever it was
    measured, or None."""
    rows = None
    for line in sorted(lines, key=lambda line: -line.rows):
        if line.low is None or line.low <= 1:
            break
        rows = line.rows
    return rows


def tables(lines: Sequence[Line], machine: Machine) -> dict[str, CrossoverTable]:
    """Return a latency table for every precision that ran, and what did not run."""
    return {
        precision: CrossoverTable(
            machine.name,
            precision,
            kernels().name,
            tuple(line for line in lines if line.precision == precision),
            machine.environment(),
        )
        for precision in dict.fromkeys(line.precision for line in lines)
    }


def wins(lines: Sequence[Line]) -> list[ShapeWins]:
    """Return by shape from how many rows on sparse wins, and the most that it gains."""
    shapes: dict[Shape, list[Line]] = {}
    for line in lines:
        shapes.setdefault((line.k, line.n), []).append(line)
    rows = []
    for (k, n), mine in shapes.items():
        timed = [line for line in mine if line.speedup is not None]
        best = max(timed, key=lambda line: line.speedup or 0, default=None)
        rows.append(
            ShapeWins(
                k,
                n,
                first_win(timed),
                best.speedup if best else None,
                best.rows if best else None,
                None if timed else mine[0].why_not,
            )
        )
    return rows


def markdown(lines: Sequence[Line], machine: Machine) -> str:
    """Return the tables as a page."""
    parts = [f"# Sparse against dense on {machine.name}", ""]
    if machine.dry:
        parts += ["**Dry run: nothing here was measured on a GPU.**", ""]
    parts += [
        "Speed-up of the 2:4 kernel over the dense one of the same precision, CUDA graphs, 95 % interval in "
        "brackets.",
        "",
    ]
    for precision in dict.fromkeys(line.precision for line in lines):
        mine = [line for line in lines if line.precision == precision]
        counts = sorted({line.rows for line in mine})
        cells = {(line.k, line.n, line.rows): line for line in mine}
        parts += [
            f"## {precision}",
            "",
            "| K x N | " + " | ".join(f"{count} rows" for count in counts) + " | wins from |",
            "|" + " --- |" * (len(counts) + 2),
        ]
        for row in wins(mine):
            shown = [_cell(cells.get((row.k, row.n, count))) for count in counts]
            start = f"{row.from_rows} rows" if row.from_rows else "nowhere"
            parts.append(f"| {row.k} x {row.n} | " + " | ".join(shown) + f" | {start} |")
        reasons = dict.fromkeys(line.why_not for line in mine if line.why_not)
        parts += ["", *(f"Not measured: {reason}" for reason in reasons), ""]
    return "\n".join(parts)


def _cell(line: Line | None) -> str:
    if line is None or line.speedup is None:
        return "-"
    return f"{line.speedup:.2f} ({line.low:.2f} to {line.high:.2f})"


def plot(lines: Sequence[Line], machine: Machine) -> str | None:
    """Draw speed-up over rows as SVG, a panel for every precision; None when nothing was timed."""
    from io import StringIO

    from matplotlib.figure import Figure

    timed = [line for line in lines if line.speedup is not None]
    precisions = list(dict.fromkeys(line.precision for line in timed))
    if not timed:
        return None
    figure = Figure(figsize=(4.2 * len(precisions), 3.4), layout="constrained")
    panels = figure.subplots(1, len(precisions), sharey=True, squeeze=False)[0]
    for panel, precision in zip(panels, precisions):
        for shape in dict.fromkeys(
            (line.k, line.n) for line in timed if line.precision == precision
        ):
            mine = sorted(
                (
                    line
                    for line in timed
                    if line.precision == precision and (line.k, line.n) == shape
                ),
                key=lambda line: line.rows,
            )
            panel.plot(
                [line.rows for line in mine],
                [line.speedup or 0 for line in mine],
                marker="o",
                markersize=3,
                linewidth=1,
                label=f"{shape[0]} x {shape[1]}",
            )
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set(xscale="log", title=precision, xlabel="rows")
        panel.legend(fontsize=6, frameon=False)
    panels[0].set_ylabel("speed-up of 2:4 over dense")
    figure.suptitle(
        f"{machine.name}{' (dry run, no measurement)' if machine.dry else ''}", fontsize=9
    )
    text = StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue()
