"""How long work tells about itself: one function that the caller may pass in."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with a text, the steps done and the steps in all; 0 of 0 is a plain message."""


def silent(text: str, done: int = 0, total: int = 0) -> None:
    """Say nothing; the default everywhere."""
