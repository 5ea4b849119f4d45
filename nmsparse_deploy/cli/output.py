"""The one place that prints: for people (rich), for programs (`--json`), or not at all (`--quiet`).

Results go to stdout, progress and messages to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from nmsparse_deploy.errors import NmsparseError

SECONDS = 5.0
"""Between two lines of progress in a log."""


class Output:
    """Human, JSON or quiet; commands return data and hand it here."""

    as_json = quiet = answered = False
    _bar: Any = None
    _task: Any = None
    _last_line = ""
    _next_line = 0.0

    def listen(self, as_json: bool, quiet: bool) -> None:
        """Take --json and --quiet, typed before the verb or after it; of several processes the
        first one speaks."""
        first = os.environ.get("RANK", "0") == "0"
        self.as_json |= as_json and first
        self.quiet |= quiet or not first

    def progress(self, text: str, done: int = 0, total: int = 0) -> None:
        """Show a message (0 of 0) or a bar with the time left; nothing under --quiet.

        In a log, where there are no bars, a line says every few seconds how far it is.
        """
        if total and sys.stderr.isatty() and not self.quiet:
            self._show_bar(text, done, total)
            return
        self.close()
        if total:
            if time.monotonic() < self._next_line:
                return
            self._next_line = time.monotonic() + SECONDS
        line = f"{text} [{done}/{total}]" if total else text
        if line != self._last_line:
            self.message(line)
        self._last_line = line

    def _show_bar(self, text: str, done: int, total: int) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(text, total=total)
        self._bar.update(self._task, description=text, completed=done, total=total)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def message(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def result(self, data: Any, lines: Sequence[str] = ()) -> None:
        """Print the result of a command: `data` under --json, `lines` for people."""
        self.close()
        self.answered = True
        if self.as_json:
            print(json.dumps(data, indent=1, ensure_ascii=False))
        elif not self.quiet:
            for line in lines:
                print(line)

    def table(
        self,
        data: Any,
        columns: Sequence[str],
        rows: Sequence[Sequence[Any]],
        lines: Sequence[str] = (),
    ) -> None:
        """Print a table for people, followed by `lines`; `data` under --json."""
        self.close()
        if not self.as_json and not self.quiet:
            from rich.console import Console
            from rich.table import Table

            table = Table(*columns, box=None, pad_edge=False)
            for row in rows:
                table.add_row(*(str(cell) for cell in row))
            Console(
                width=None if sys.stdout.isatty() else 200, markup=False, highlight=False
            ).print(table)
        self.result(data, lines)

    def error(self, error: NmsparseError) -> None:
        """Print one sentence, and the next command to type. Under --json also on stdout, if no
        result is there."""
        self.close()
        if self.as_json and not self.answered:
            print(
                json.dumps(
                    {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}
                )
            )
        print(f"Error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  try: {error.hint}", file=sys.stderr)
