"""What `make bench` runs: verify, the SparseGPT sweep, pruning the demo model, and `--help`. Prints
JSON.

`python benchmarks/run.py [--quick] [--out results/benchmarks-cpu.json]`. Timings of a shared
machine are noisy: the sweep is given as a ratio to a factorisation timed in the same loop, the rest
as the best of three.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from files import write_json

HERE = Path(__file__).parent


def child_cpu_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def bench_help() -> dict[str, Any]:
    """CPU seconds of `nmsparse-deploy --help`."""
    command = [sys.executable, "-m", "nmsparse_deploy", "--help"]
    return {"cpu_seconds": round(min(child_cpu_seconds(command) for _ in range(3)), 3)}


def bench_verify(gigabytes: float) -> dict[str, Any]:
    """A generated bf16 checkpoint from the page cache, on one core."""
    command = [sys.executable, str(HERE / "bench_verify.py"), "--gb", str(gigabytes)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def bench_sweep(rounds: int = 7) -> dict[str, Any]:
    """The SparseGPT sweep of a 576 x 1536 layer against `cholesky_inverse` of its Gram,
    interleaved."""
    import torch

    from nmsparse_deploy.find.methods.hessian import dampen, inverse_factor
    from nmsparse_deploy.find.methods.sparsegpt import freezer
    from nmsparse_deploy.find.methods.sweep import sweep
    from nmsparse_deploy.pattern import TWO_FOUR

    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(4096, 1536, generator=generator)
        @ torch.randn(1536, 1536, generator=generator)
        / 40
    )
    gram, weight = x.T @ x, torch.randn(576, 1536, generator=generator)
    factor = inverse_factor(gram, 0.01)
    lower32 = torch.linalg.cholesky(dampen(gram, 0.01)).float()
    lower64 = lower32.double()
    times: dict[str, list[float]] = {
        "sweep": [],
        "cholesky_inverse_fp32": [],
        "cholesky_inverse_fp64": [],
    }
    calls = {
        "sweep": lambda: sweep(weight, factor, TWO_FOUR, freezer(TWO_FOUR)),
        "cholesky_inverse_fp32": lambda: torch.cholesky_inverse(lower32),
        "cholesky_inverse_fp64": lambda: torch.cholesky_inverse(lower64),
    }
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number:
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(t) for name, t in times.items()}
    return {
        **{f"{name}_ms": round(1e3 * t, 1) for name, t in medians.items()},
        "ratio_to_fp32": round(medians["sweep"] / medians["cholesky_inverse_fp32"], 2),
        "ratio_to_fp64": round(medians["sweep"] / medians["cholesky_inverse_fp64"], 2),
    }


def bench_prune(samples: int) -> dict[str, Any]:
    """The demo model to 2:4 with SparseGPT; seconds from start to verified, in a process of its
    own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "nmsparse_deploy",
            "--json",
            "--quiet",
            "prune",
            "--samples",
            str(samples),
            "--out",
            f"{folder}/run",
        ]
        start = time.perf_counter()
        result = json.loads(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout
        )
        return {
            "samples": samples,
            "length": 512,
            "seconds": round(time.perf_counter() - start, 1),
            "stage_seconds": result["seconds"],
            "peak_memory_mb": result["peak_memory_mb"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from nmsparse_deploy.system.environment import environment, now

    result = {
        "command": "python benchmarks/run.py" + (" --quick" if options.quick else ""),
        "date": now(),
        "help": bench_help(),
        "verify": bench_verify(0.25 if options.quick else 4),
        "sweep": bench_sweep(),
        "prune": bench_prune(4 if options.quick else 64),
        **environment(),
    }
    print(json.dumps(result, indent=1))
    if options.out:
        write_json(options.out, result)


if __name__ == "__main__":
    main()
