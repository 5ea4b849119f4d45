"""What the command line does with a GPU: `crossover`, and the sides of `bench` and `export` that need one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nmsparse_deploy.cli.app import app, output
from nmsparse_deploy.errors import UsageError


@app.command()
def crossover(model: Annotated[str | None, typer.Argument(help="hub name, folder or .gguf file")] = None,
              shape: Annotated[list[str], typer.Option(help="K x N as 4096x14336; may be repeated")] = [],  # noqa: B006
              rows: Annotated[list[int], typer.Option(help="batch times tokens; may be repeated")] = [  # noqa: B006
                  16, 64, 256, 1024, 4096, 16384],
              precision: Annotated[list[str], typer.Option(help="may be repeated")] = [  # noqa: B006
                  "fp16", "bf16", "int8", "fp8"],
              rounds: Annotated[int, typer.Option(help="paired timings of every GEMM")] = 21,
              out: Annotated[Path, typer.Option(help="folder of tables, page and plot")] = Path("crossover")) -> None:
    """From how many rows on sparse kernels win, for the GEMM shapes of a model; `plan --latency-table` reads it."""
    from nmsparse_deploy.measure.bench.crossover import parse_shape, wins
    from nmsparse_deploy.measure.bench.stages import crossover as api

    lines = api(model, [parse_shape(text) for text in shape], rows, precision, out, rounds, progress=output.progress)
    found = {name: wins([line for line in lines if line.precision == name]) for name in precision}
    table = [(name, f"{row['k']}x{row['n']}", row["from_rows"] or "nowhere",
              f"{row['best_speedup']:.2f} at {row['best_rows']} rows" if row["best_speedup"] else row["why_not"])
             for name, made in found.items() for row in made]
    output.table({"out": str(out), "crossover": found}, ("precision", "K x N", "wins from rows", "best speed-up"),
                 table, [str(out / "crossover.md")])


def use_gpu(device: str) -> bool:
    """Raises `UsageError` for a device that there is not."""
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"There is no device '{device}'.", "one of: auto, cpu, cuda")
    if device != "auto":
        return device == "cuda"
    import torch

    return torch.cuda.is_available()


def bench_gpu(run: Path | None, batch: int, length: int, rounds: int, precision: str) -> None:
    from nmsparse_deploy.measure.bench.model_arms import Job
    from nmsparse_deploy.measure.bench.stages import bench_run
    from nmsparse_deploy.runs.run_dir import RunDir
    from nmsparse_deploy.ship.torch_sparse.semi_structured import DTYPES

    if precision not in DTYPES:
        raise UsageError(f"There is no precision '{precision}'.", f"one of: {', '.join(DTYPES)}")
    found = bench_run(RunDir.open(run), Job(batch, length, precision, max(rounds, 5)), progress=output.progress)
    rows = []
    for phase in found["phases"]:
        for arm in phase["arms"]:
            speed = phase["over_dense"].get(arm["name"])
            none = "1" if arm["name"] == "dense" else "no dense twin"
            shown = f"{speed['speedup']:.2f} ({speed['low']:.2f} to {speed['high']:.2f})" if speed else none
            how = "CUDA graph" if phase["replayed"] else "plain"
            rows.append((f"{phase['name']}, {how}", arm["name"], f"{arm['median_ms']:.3f}",
                         f"{arm['p99_ms']:.3f}", shown))
    output.table(found, ("work", "arm", "median ms", "p99 ms", "speed-up over dense"), rows, [found["verdict"]])


def export_torch(run: Path | None, precision: list[str], rows: list[int]) -> None:
    from nmsparse_deploy.recipe import Pack, validate
    from nmsparse_deploy.runs.run_dir import RunDir
    from nmsparse_deploy.ship.torch_sparse.stage import export_torch as api
    from nmsparse_deploy.ship.torch_sparse.stage import told

    opened = RunDir.open(run)
    low = [name for name in precision if name != "fp32"] or precision
    made = api(opened, validate(Pack, {"precisions": low, "rows": rows}), output.progress)
    output.result({"run": str(opened.path), "artefacts": made},
                  [line for row in made for line in told(row, opened / row["path"])])
