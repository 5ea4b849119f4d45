"""How fast a checkpoint is verified, and in how much memory:
`python benchmarks/bench_verify.py [--gb 4]`.

Writes a bf16 2:4 checkpoint of 64 MiB tensors, reads it once so that the disk does not count, then
verifies it without masks in a child process pinned to one core. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROWS, COLUMNS = 8192, 4096
TENSOR_BYTES = ROWS * COLUMNS * 2
BLOCK_BYTES = 1 << 20


def write_sparse(path: Path, gigabytes: float) -> None:
    """A bf16 2:4 checkpoint, written tensor by tensor."""
    count = max(1, round(gigabytes * 1e9 / TENSOR_BYTES))
    header = json.dumps(
        {
            f"layers.{i}.weight": {
                "dtype": "BF16",
                "shape": [ROWS, COLUMNS],
                "data_offsets": [i * TENSOR_BYTES, (i + 1) * TENSOR_BYTES],
            }
            for i in range(count)
        }
    ).encode()
    # Small blocks: a child's peak memory, as the system counts it, starts from its parent's.
    rng = np.random.default_rng(0)
    groups = (
        rng.standard_normal((BLOCK_BYTES // 8, 4)).astype(np.float32).view(np.uint32) >> 16
    ).astype(np.uint16)
    groups[rng.random(groups.shape).argsort(axis=1) >= 2] = 0
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _ in range(count * TENSOR_BYTES // BLOCK_BYTES):
            groups = np.roll(groups, 1, axis=0)
            file.write(groups)


def verify(path: Path) -> None:
    """The child: one core, one verification, one line of JSON."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 22):
            pass
    import torch

    from nmsparse_deploy.prove import verify_checkpoint
    from nmsparse_deploy.system.hardware import cpu_name

    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    reports = [verify_checkpoint(path) for _ in range(3)]
    assert all(report.ok for report in reports), reports[0].summary()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = sorted(report.seconds for report in reports)
    gigabytes = reports[0].bytes_read / 1e9
    print(
        json.dumps(
            {
                "gigabytes": round(gigabytes, 3),
                "tensors": reports[0].checked,
                "runs_s": [round(s, 3) for s in seconds],
                "gb_per_s_median": round(gigabytes / seconds[1], 2),
                "peak_resident_mb": round(peak),
                "resident_before_verify_mb": round(before),
                "cores": 1,
                "page_cache": "warm",
                "dtype": "BF16",
                "pattern": "2:4",
                "masks": False,
                "cpu": cpu_name(),
                "versions": {
                    "python": platform.python_version(),
                    "numpy": np.__version__,
                    "torch": torch.__version__,
                },
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gb", type=float, default=4, help="size of the checkpoint in GB (default: 4)"
    )
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return verify(options.child)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.safetensors"
        write_sparse(path, options.gb)
        subprocess.run([sys.executable, __file__, "--child", str(path)], check=True)


if __name__ == "__main__":
    main()
