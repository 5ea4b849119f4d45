"""The command line. A verb parses, calls the API, and hands the result to `output`; nothing else.

Nothing heavy is imported before a verb runs, so `--help` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from nmsparse_deploy.cli.app import app, output
from nmsparse_deploy.errors import NmsparseError, from_os_error

__all__ = ["app", "invoke", "main"]

for name in (
    "inspect",
    "plan",
    "prune",
    "import_masks",
    "crossover",
    "verify",
    "export",
    "build",
    "evaluate",
    "bench",
    "report",
    "compare",
    "run",
    "demo",
    "proof",
    "doctor",
    "list_methods",
):  # in the order of --help
    import_module(f"{__name__}.{name}")


def main() -> None:
    """Run the command line; expected failures become one sentence and an exit code."""
    signal.signal(signal.SIGINT, _interrupted)
    sys.exit(invoke(app))


def _interrupted(number: int, frame: object) -> None:
    raise NmsparseError(
        "Interrupted; what was finished is kept.", "the same command goes on from there"
    )


def invoke(call: Callable[[], Any]) -> int:
    """Run the app and return its exit code: 0 ok, 1 a check or stage failed, 2 usage."""
    try:
        call()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except (NmsparseError, OSError) as error:
        if isinstance(error, OSError) and os.environ.get("NMSPARSE_DEBUG"):
            raise
        expected = from_os_error(error) if isinstance(error, OSError) else error
        output.error(expected)
        return expected.exit_code
    return 0
