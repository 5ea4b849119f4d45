"""`nmsparse-deploy crossover`."""

from dataclasses import asdict
from pathlib import Path

import nmsparse_deploy as nms
from nmsparse_deploy.cli.app import output, verb


@verb(
    model="hub name, folder or .gguf file",
    shape="K x N as 4096x14336",
    rows="batch times tokens",
    precision="operands of the GEMMs",
    rounds="paired timings of every GEMM",
    out="folder of tables, page and plot",
)
def crossover(
    model: str | None = None,
    *,
    shape: tuple[str, ...] = (),
    rows: tuple[int, ...] = (16, 64, 256, 1024, 4096, 16384),
    precision: tuple[str, ...] = ("fp16", "bf16", "int8", "fp8"),
    rounds: int = 21,
    out: Path = Path("crossover"),
) -> None:
    """Find from how many rows on sparse kernels win, for a model's GEMM shapes;
    `plan --latency-table` reads it."""
    from nmsparse_deploy.measure.bench.crossover import parse_shape, wins

    shapes = [parse_shape(text) for text in shape]
    lines = nms.crossover(model, shapes, rows, precision, out, rounds, progress=output.progress)
    results = {name: wins([line for line in lines if line.precision == name]) for name in precision}
    table = [
        (
            name,
            f"{row.k}x{row.n}",
            row.from_rows or "nowhere",
            f"{row.best_speedup:.2f} at {row.best_rows} rows" if row.best_speedup else row.why_not,
        )
        for name, shapes in results.items()
        for row in shapes
    ]
    data = {name: [asdict(row) for row in shapes] for name, shapes in results.items()}
    output.table(
        {"out": str(out), "crossover": data},
        ("precision", "K x N", "wins from rows", "best speed-up"),
        table,
        [str(out / "crossover.md")],
    )
