"""The one place that prints: for people (rich), for programs (`--json`), or not at all (`--quiet`).

Results go to stdout, progress and messages to stderr.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from nmsparse_deploy.errors import NmsparseError


class Output:
    """Human, JSON or quiet; commands return data and hand it here."""

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._said = ""
        self.answered = False

    def progress(self, text: str, done: int = 0, total: int = 0) -> None:
        """A message (0 of 0) or a bar with the time left; nothing under --quiet."""
        if self.quiet:
            return
        if not sys.stderr.isatty():
            self._plain_progress(text, done, total)
        elif total:
            self._show_bar(text, done, total)
        else:
            self.close()
            self.message(text)

    def _plain_progress(self, text: str, done: int, total: int) -> None:
        line = f"{text} [{done}/{total}]" if total else text
        if line != self._said:
            print(line, file=sys.stderr, flush=True)
        self._said = line

    def _show_bar(self, text: str, done: int, total: int) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                                 TimeRemainingColumn(), console=Console(stderr=True), transient=True)
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
        """The result of a command: `data` under --json, `lines` for people."""
        self.close()
        self.answered = True
        if self.as_json:
            print(json.dumps(data, indent=1, ensure_ascii=False))
        elif not self.quiet:
            for line in lines:
                print(line)

    def table(self, data: Any, columns: Sequence[str], rows: Sequence[Sequence[Any]],
              lines: Sequence[str] = ()) -> None:
        """A table for people, followed by `lines`; `data` under --json."""
        if self.as_json or self.quiet:
            return self.result(data)
        self.close()
        from rich.console import Console
        from rich.table import Table

        table = Table(*columns, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*(str(cell) for cell in row))
        Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False).print(table)
        self.result(data, lines)
        return None

    def error(self, error: NmsparseError) -> None:
        """One sentence, and the next command to type. Under --json also on stdout, unless a result is there already."""
        self.close()
        if self.as_json and not self.answered:
            print(json.dumps({"error": error.message, "hint": error.hint, "exit_code": error.exit_code}))
        print(f"Error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  try: {error.hint}", file=sys.stderr)
