"""Everything that a CUDA machine can show, in one unattended command under nine minutes: `make gpu-proof`.

Every part of `gpu_parts.py` runs in its own process under its own limit. What fails or runs out of time says so and the
rest goes on; `results/gpu/GPU-DATE.json` and its Markdown page are written after every part, by rename. No network is
used. What the machine lacks comes from `gpu-bundle/` (`make gpu-bundle`), where that is.

`--dry` walks the whole way on a processor with tiny models and a stand-in for the sparse kernels. It measures nothing,
says so in what it writes, and never writes to results/gpu.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.files import write_json
from benchmarks.gpu_bundle import BUNDLE, BundleError, unpacked
from benchmarks.gpu_supervise import supervise

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "gpu"
SECONDS = 500
"""Of all parts, so that with start-up and the bundle it stays under nine minutes."""
MARGIN = 5


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--only", action="append", help="a part; may be repeated")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    given = parser.parse_args(arguments)
    if given.dry and given.out.resolve().is_relative_to(RESULTS.resolve()):
        return _refuse("a dry run measures nothing, so it never writes to results/gpu; give another --out")
    name = "dry run" if given.dry else gpu_name()
    if name is None:
        return _refuse("there is no CUDA device that this Python's torch can use (docs/gpu.md)")
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        try:
            environment = unpacked(given.bundle, Path(work)) if given.bundle.is_dir() else {}
        except BundleError as error:
            return _refuse(str(error).rstrip("."))
        return prove(name, given, environment, Path(work))


def _refuse(why: str) -> int:
    print(f"gpu-proof: {why}.", file=sys.stderr)
    return 1


def gpu_name() -> str | None:
    """Asked in another process: this one must hold no memory on the device, and may lack packages."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return found.stdout.strip() or None


def prove(name: str, given: argparse.Namespace, environment: dict[str, str], work: Path) -> int:
    """Run all parts in order; 1 if one of them did not finish."""
    parts = limits()
    unknown = next((part for part in given.only or () if part not in parts), None)
    if unknown is not None:
        return _refuse(f"there is no part '{unknown}', only {', '.join(parts)}")
    end = time.monotonic() + given.seconds
    path = result_path(given.out, name, given.dry)
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.gpu_proof", *sys.argv[1:]]), "dry": given.dry, "gpu": name,
        "started": datetime.now(UTC).isoformat(timespec="seconds"), "bundle": sorted(environment), "parts": {}}
    if given.dry:
        result["note"] = "DRY RUN on a processor with tiny models and stand-in kernels. Nothing here is a measurement."
    for part, limit in parts.items():
        if given.only and part not in given.only:
            continue
        seconds = min(limit, end - time.monotonic())
        print(f"{part}: at most {max(0, seconds):.0f} s", file=sys.stderr, flush=True)
        result["parts"][part] = record = run(part, seconds, given.dry, environment, work)
        print(f"{part}: {record['state']}{': ' + record['reason'] if record['reason'] else ''}", file=sys.stderr,
              flush=True)
        result["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(path, result)
        page = path.with_suffix(".md")
        temporary = page.with_name(f".{page.name}")
        temporary.write_text(markdown(result), encoding="utf-8")
        os.replace(temporary, page)
    print(path)
    return 0 if all(record["state"] == "done" for record in result["parts"].values()) else 1


def limits() -> dict[str, int]:
    from benchmarks.gpu_parts import PARTS

    return {name: seconds for name, (_, seconds) in PARTS.items()}


def run(part: str, seconds: float, dry: bool, environment: dict[str, str], work: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.gpu_parts", part, "--out", str(work / f"{part}.json"), "--seconds",
               str(max(1.0, seconds - MARGIN)), *(["--dry"] if dry else [])]
    path = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"), os.environ.get("PYTHONPATH"))))
    return supervise(command, seconds, work / f"{part}.json",
                     {**environment, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"})


def result_path(folder: Path, name: str, dry: bool) -> Path:
    """A file of its own for every run: an earlier result is never written over."""
    stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    stem = f"{stem}-{datetime.now(UTC).date().isoformat()}"
    number, path = 1, folder / f"{stem}.json"
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.json"
    return path


def markdown(result: dict[str, Any]) -> str:
    """What was found, for people. Figures come from the parts' own records."""
    lines = [f"# GPU proof: {result['gpu']}", "", f"Started {result['started']}, `{result['command']}`.", ""]
    if result["dry"]:
        lines += [f"**{result['note']}**", ""]
    lines += ["| part | state | seconds | why |", "| --- | --- | --- | --- |"]
    lines += [f"| {name} | {one['state']} | {one['seconds']:.0f} | {one['reason'] or ''} |"
              for name, one in result["parts"].items()]
    for name, one in result["parts"].items():
        told = SECTIONS.get(name, lambda data: [])(one["data"]) if one["data"] else []
        lines += ["", f"## {name}", "", *told] if told else []
    return "\n".join(lines) + "\n"


def _ladder(data: dict[str, Any]) -> list[str]:
    return data["markdown"].splitlines()[2:]


def _arms(data: dict[str, Any]) -> list[str]:
    lines = []
    for run_ in data["runs"]:
        what = f"{run_.get('model', data.get('model', ''))}, {run_['precision']}, batch {run_['batch']}"
        lines.append(f"* {what}: " + (run_["verdict"] if "verdict" in run_ else f"failed: {run_['reason']}"))
    return lines + [f"* {row['model']}: not here: {row['why']}" for row in data.get("missing", ())]


def _learning(data: dict[str, Any]) -> list[str]:
    lines = [f"{data['model']}, {data['tokens_per_step']} tokens a step.", "",
             "| step | median ms | over plain | peak memory |", "| --- | --- | --- | --- |"]
    for name, one in data["steps"].items():
        peak = f"{one['peak_bytes'] / 1e9:.1f} GB" if one["peak_bytes"] else "not counted"
        lines.append(f"| {name} | {one['median_ms']:.1f} | {one['over_plain']:.2f} | {peak} |")
    return lines


def _compiled(data: dict[str, Any]) -> list[str]:
    lines = []
    for name, one in data["precisions"].items():
        found = one.get("sparse_over_dense")
        lines.append(f"* {name}: " + (f"sparse {found['speedup']:.2f}x over dense ({found['low']:.2f} to "
                                      f"{found['high']:.2f})" if found else f"failed: {one['failed']}"))
    return lines


SECTIONS = {"ladder": _ladder, "vit": _arms, "llama": _arms, "small": _arms, "learning": _learning,
            "compiled": _compiled, "tests": lambda data: [data["summary"], *data["failures"]]}

if __name__ == "__main__":
    sys.exit(main())
