"""Run a part of a proof under its own time limit, in a process of its own; there is always a
record.

A part is a command that writes what it has so far to a JSON file, by rename. A GPU fault ends its
process and nothing else, and what was written before counts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from nmsparse_deploy.measure.proof.record import PartRecord

TAIL = 1500
"""Characters of a part's output that a record keeps."""


def supervise(
    command: list[str], seconds: float, out: Path, environment: dict[str, str] | None = None
) -> PartRecord:
    """Run `command`, which writes to `out`, for at most `seconds`."""
    if seconds <= 0:
        return PartRecord(
            state="no time left", reason="the parts before it took all the time", seconds=0
        )
    out.unlink(missing_ok=True)
    start = time.monotonic()
    with open(out.with_suffix(".log"), "w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        try:
            code, late = process.wait(timeout=seconds), False
        except subprocess.TimeoutExpired:
            code, late = _end(process), True
        log.seek(0)
        output = log.read()[-TAIL:]
    seconds_taken = round(time.monotonic() - start, 1)
    if late:
        return PartRecord(
            state="stopped at its limit",
            reason=f"it ran longer than {seconds:.0f} s",
            seconds=seconds_taken,
            data=_written(out),
            output=output,
        )
    if code:
        return PartRecord(
            state="failed",
            reason=_reason(output, code),
            seconds=seconds_taken,
            data=_written(out),
            output=output,
        )
    return PartRecord(state="done", seconds=seconds_taken, data=_written(out))


def _written(path: Path) -> Any:
    """Return what a part wrote; None when there is no file, or none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _end(process: subprocess.Popen[str]) -> int:
    """Ask the part and what it started to end, then make them."""
    for sent, patience in ((signal.SIGTERM, 3), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, sent)
            return process.wait(timeout=patience)
        except ProcessLookupError:
            return process.wait()
        except subprocess.TimeoutExpired:
            continue
    return -int(signal.SIGKILL)


def _reason(output: str, code: int) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"it ended with code {code} and said nothing"
