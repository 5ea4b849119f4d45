"""Everything that a CUDA machine can show about sparse kernels, unattended, in under nine minutes.

Every part runs in a process of its own under its own limit. What fails or runs out of time says so
and the rest goes on; `GPU-DATE.json` and its Markdown page are written after every part, by rename.
Nothing is downloaded or uploaded.

`dry` walks the whole way on a processor with tiny models and a stand-in for the sparse kernels. It
measures nothing and says so in what it writes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.measure.proof.record import PartRecord, ProofRecord
from nmsparse_deploy.measure.proof.supervise import supervise
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.system.progress import Progress, silent

RESULTS = Path("results/gpu")
SECONDS = 500
"""Of all parts, so that with start-up it stays under nine minutes."""
MARGIN = 5
DRY = "DRY RUN on a processor with tiny models and stand-in kernels. Nothing here is a measurement."


@dataclass(frozen=True)
class Part:
    """What `python -m MODULE NAME --out FILE --seconds S [--dry]` measures, and how long it may
    take."""

    seconds: int
    module: str = "nmsparse_deploy.measure.proof.parts"


PARTS = {
    "ladder": Part(150),
    "vit": Part(75),
    "llama": Part(80),
    "compiled": Part(45),
    "small": Part(35),
}
"""In the order of importance."""


def prove(
    out: Path = RESULTS,
    dry: bool = False,
    only: Sequence[str] = (),
    seconds: float = SECONDS,
    progress: Progress = silent,
    extra: Mapping[str, Part] = {},
) -> Path:
    """Run all parts, or `only` some, and return the JSON file.

    Raises `NmsparseError` without a GPU, `UsageError` for an unknown part and for a dry run into
    `results/gpu`.
    """
    parts = {**PARTS, **extra}
    unknown = next((name for name in only if name not in parts), None)
    if unknown is not None:
        raise UsageError(
            f"There is no part '{unknown}' of the proof.", f"one of: {', '.join(parts)}"
        )
    if dry and out.resolve().is_relative_to(RESULTS.resolve()):
        raise UsageError(
            "A dry run measures nothing, so it never writes to results/gpu.", "give another --out"
        )
    machine = machine_of(dry)
    path = result_path(out, str(machine["device"]))
    record = ProofRecord(
        command=" ".join(["nmsparse-deploy", *sys.argv[1:]]),
        dry=dry,
        gpu=str(machine["device"]),
        machine=machine,
        started=datetime.now(UTC),
    )
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as work:
        for name in only or parts:
            limit = min(parts[name].seconds, end - time.monotonic())
            progress(
                f"{name}, at most {max(0, limit):.0f} s", len(record.parts), len(only or parts)
            )
            record.parts[name] = run_part(name, parts[name], limit, dry, Path(work))
            record.finished = datetime.now(UTC)
            record.save(path)
            with RunDir(path.parent).replacing(path.with_suffix(".md").name) as temporary:
                temporary.write_text(markdown(record), encoding="utf-8")
    return path


def machine_of(dry: bool) -> dict[str, Any]:
    """Describe the machine, asked in another process: this one must hold no memory on the
    device."""
    code = (
        "import json, sys; from nmsparse_deploy.system import gpu_clock as g; "
        f"print(json.dumps((g.dry_machine() if {dry} else g.require_gpu('The proof')).environment(), default=str))"
    )
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if asked.returncode:
        line = asked.stderr.strip().splitlines()[-1] if asked.stderr.strip() else "no reason given"
        raise NmsparseError(
            line.partition(": ")[2] or line, "run it on a machine with an NVIDIA GPU (docs/gpu.md)"
        )
    described: dict[str, Any] = json.loads(asked.stdout.splitlines()[-1])
    return described


def run_part(name: str, part: Part, seconds: float, dry: bool, work: Path) -> PartRecord:
    """Run one part under its limit."""
    out = work / f"{name}.json"
    command = [
        sys.executable,
        "-m",
        part.module,
        name,
        "--out",
        str(out),
        "--seconds",
        str(max(1.0, seconds - MARGIN)),
        *(["--dry"] if dry else []),
    ]
    return supervise(command, seconds, out, {"HF_HUB_OFFLINE": "1"})


def result_path(folder: Path, name: str) -> Path:
    """Return a file of its own for every run: an earlier result is never written over."""
    stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    stem = f"{stem}-{datetime.now(UTC).date().isoformat()}"
    number, path = 1, folder / f"{stem}.json"
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.json"
    return path


def markdown(record: ProofRecord) -> str:
    """Return the record for people. Figures come from the parts' own data."""
    lines = [
        f"# GPU proof: {record.gpu}",
        "",
        f"Started {record.started:%Y-%m-%d %H:%M} UTC, `{record.command}`.",
        "",
    ]
    lines += [f"**{DRY}**", ""] if record.dry else []
    lines += ["| part | state | seconds | why |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {name} | {part.state} | {part.seconds:.0f} | {part.reason or ''} |"
        for name, part in record.parts.items()
    ]
    for name, part in record.parts.items():
        section = SECTIONS.get(name, lambda data: [])(part.data) if part.data else []
        lines += ["", f"## {name}", "", *section] if section else []
    return "\n".join(lines) + "\n"


def _ladder(data: dict[str, Any]) -> list[str]:
    return data["markdown"].splitlines()[2:]


def _arms(data: dict[str, Any]) -> list[str]:
    lines = []
    for row in data["runs"]:
        arms = row.get("run", row)
        what = f"{row.get('model', data.get('model'))}, {arms['precision']}, batch {arms['batch']}"
        lines.append(
            f"* {what}: " + (arms["verdict"] if "verdict" in arms else f"failed: {arms['reason']}")
        )
    return lines + [f"* {row['model']}: not here: {row['why']}" for row in data.get("missing", ())]


def _learning(data: dict[str, Any]) -> list[str]:
    lines = [
        f"{data['model']}, {data['tokens_per_step']} tokens a step.",
        "",
        "| step | median ms | over plain | peak memory |",
        "| --- | --- | --- | --- |",
    ]
    for name, step in data["steps"].items():
        peak = f"{step['peak_bytes'] / 1e9:.1f} GB" if step["peak_bytes"] else "not counted"
        lines.append(f"| {name} | {step['median_ms']:.1f} | {step['over_plain']:.2f} | {peak} |")
    return lines


def _compiled(data: dict[str, Any]) -> list[str]:
    lines = []
    for name, row in data["precisions"].items():
        gain = row.get("sparse_over_dense")
        lines.append(
            f"* {name}: "
            + (
                f"sparse {gain['speedup']:.2f}x over dense ({gain['low']:.2f} to "
                f"{gain['high']:.2f})"
                if gain
                else f"failed: {row['failed']}"
            )
        )
    return lines


SECTIONS = {
    "ladder": _ladder,
    "vit": _arms,
    "llama": _arms,
    "small": _arms,
    "learning": _learning,
    "compiled": _compiled,
    "tests": lambda data: [data["summary"], *data["failures"]],
}
"""By part; `learning` and `tests` are added by the repository's own script (`benchmarks/gpu`)."""
