"""The stages of a GPU: `crossover` for the GEMM shapes of a model, and the arms of a run."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from nmsparse_deploy import models
from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.measure.bench.crossover import (
    PRECISIONS,
    ROWS,
    Line,
    Shape,
    markdown,
    plot,
    shapes_of,
    tables,
)
from nmsparse_deploy.measure.bench.crossover import crossover as timed
from nmsparse_deploy.measure.bench.engine_arms import engine_phases
from nmsparse_deploy.measure.bench.model_arms import Job, bench_arms
from nmsparse_deploy.measure.bench.result import GpuBenchResult
from nmsparse_deploy.registry import ENGINES
from nmsparse_deploy.runs.load import load_dense
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.ship.engine import Engine
from nmsparse_deploy.ship.torch_sparse.semi_structured import DTYPES
from nmsparse_deploy.system.gpu_clock import Machine, require_gpu
from nmsparse_deploy.system.progress import Progress, silent

RECORD = "bench-gpu.json"


def crossover(
    model: str | None,
    shapes: Sequence[Shape] = (),
    rows: Sequence[int] = ROWS,
    precisions: Sequence[str] = PRECISIONS,
    out: Path = Path("crossover"),
    rounds: int = 21,
    machine: Machine | None = None,
    progress: Progress = silent,
) -> list[Line]:
    """Time the GEMM shapes of `model`, or `shapes`, dense against sparse, and write tables, a page
    and a plot to `out`.

    Raises `NmsparseError` without a GPU, `UsageError` for a precision that there is not.
    """
    unknown = next((name for name in precisions if name not in DTYPES), None)
    if unknown is not None:
        raise UsageError(f"There is no precision '{unknown}'.", f"one of: {', '.join(DTYPES)}")
    machine = machine or require_gpu("Timing sparse against dense GEMMs")
    wanted = list(shapes) or list(_shapes(model, progress))
    lines = timed(wanted, rows, precisions, machine, rounds, progress)
    write_crossover(lines, out, machine)
    return lines


def write_crossover(lines: Sequence[Line], out: Path, machine: Machine) -> None:
    """Write `PRECISION.json` for every precision, `crossover.md` and `crossover.svg`, each by
    rename."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        f"{name}.json": json.dumps(table.to_json(), indent=1) + "\n"
        for name, table in tables(lines, machine).items()
    }
    texts["crossover.md"] = markdown(lines, machine)
    picture = plot(lines, machine)
    for name, text in {**texts, **({"crossover.svg": picture} if picture else {})}.items():
        temporary = out / f".{name}"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(out / name)


def _shapes(model: str | None, progress: Progress) -> Sequence[Shape]:
    if model is None:
        raise UsageError("There is nothing to time.", "name a model, or give --shape 4096x14336")
    progress(f"loading {model}", 0, 0)
    loaded = models.load(model)
    discovery = loaded.discover()
    if not discovery.targets:
        raise NmsparseError(f"'{model}' has no GEMM that could be pruned.")
    return list(shapes_of(discovery.targets))


def bench_run(
    run: RunDir, job: Job, machine: Machine | None = None, progress: Progress = silent
) -> GpuBenchResult:
    """Time a run's model in all arms on a GPU, and what a runtime can run of it; also written to
    `bench-gpu.json`.

    Raises `NmsparseError` without a GPU, or where sparse kernels cannot run the precision.
    """
    machine = machine or require_gpu("Timing sparse kernels")
    start = time.perf_counter()
    dense = load_dense(run)
    result = bench_arms(dense, MaskSet.load(run / "masks.safetensors"), job, machine, progress)
    engine: type[Engine] = ENGINES.load(job.engine)
    phases, failed = engine_phases(
        engine,
        engine.arms(run),
        dense.sample_inputs(job.batch, job.length),
        {"batch": job.batch, "length": job.length},
        job.rounds,
        progress,
    )
    result = replace(result, phases=(*result.phases, *phases), failed=result.failed | failed)
    run.write_json(RECORD, result.to_json())
    run.finish("bench-gpu", time.perf_counter() - start, spec=asdict(job))
    return result
