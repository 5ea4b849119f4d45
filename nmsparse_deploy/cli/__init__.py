"""The command line. A verb parses, calls the API, and hands the result to `output`; nothing else.

Nothing heavy is imported before a verb runs, so `--help` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from nmsparse_deploy.cli import find, ship, work  # noqa: F401 - they register their verbs
from nmsparse_deploy.cli.app import app, output
from nmsparse_deploy.errors import NmsparseError, from_os_error

__all__ = ["app", "invoke", "main"]


def main() -> None:
    """Entry point: expected failures become one sentence and an exit code."""
    signal.signal(signal.SIGINT, _interrupted)
    sys.exit(invoke(app))


def _interrupted(number: int, frame: object) -> None:
    raise NmsparseError("Interrupted; what was finished is kept.", "the same command goes on from there")


def invoke(call: Callable[[], Any]) -> int:
    """Run the app; 0 ok, 1 a check or stage failed, 2 usage."""
    try:
        call()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except NmsparseError as error:
        output.error(error)
        return error.exit_code
    except OSError as error:
        if os.environ.get("NMSPARSE_DEBUG"):
            raise
        expected = from_os_error(error)
        output.error(expected)
        return expected.exit_code
    return 0
