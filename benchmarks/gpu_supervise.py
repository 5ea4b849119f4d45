"""Run a part of an unattended job under its own time limit, in a process of its own; there is always a record.

A part is a command that writes what it has so far to a JSON file, by rename. A GPU fault ends its process and nothing
else, and what was written before counts. Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.files import read_json

TAIL = 1500
"""Characters of a part's output that a record keeps."""


def supervise(command: list[str], seconds: float, out: Path,
              environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run `command`, which writes to `out`, for at most `seconds`.

    The record has `state` (`done`, `failed`, `stopped at its limit`, `no time left`), `reason`, `seconds` and `data`,
    which is whatever the part wrote.
    """
    if seconds <= 0:
        return {"state": "no time left", "reason": "the parts before it took all the time", "seconds": 0, "data": None}
    out.unlink(missing_ok=True)
    start = time.monotonic()
    with open(out.with_suffix(".log"), "w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                                   env={**os.environ, **(environment or {})})
        try:
            code, late = process.wait(timeout=seconds), False
        except subprocess.TimeoutExpired:
            late, code = True, _end(process)
        log.seek(0)
        told = log.read()[-TAIL:]
    state = "stopped at its limit" if late else "done" if code == 0 else "failed"
    reason = f"it ran longer than {seconds:.0f} s" if late else None if code == 0 else _reason(told, code)
    return {"state": state, "reason": reason, "seconds": round(time.monotonic() - start, 1), "data": read_json(out),
            "output": None if state == "done" else told}


def _end(process: subprocess.Popen) -> int:
    """A polite end, then a certain one, for the part and what it started."""
    for sent, patience in ((signal.SIGTERM, 3), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, sent)
            return process.wait(timeout=patience)
        except ProcessLookupError:
            return process.wait()
        except subprocess.TimeoutExpired:
            continue
    return -int(signal.SIGKILL)


def _reason(told: str, code: int) -> str:
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"it ended with code {code} and said nothing"
