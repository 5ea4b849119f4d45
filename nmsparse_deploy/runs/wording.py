"""How figures and texts are written: one form for every page, so that no two pages disagree."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

MISSING = "not measured"
INTERVAL = "95\N{NO-BREAK SPACE}% interval"
"""In the head of a column."""
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
MARKDOWN = re.compile(r"([\\`*_{}\[\]#|<>~&$]|(?<=\])\(|^\s*[+-])", re.M)
UNITS = {
    "context": "tokens",
    "stride": "tokens",
    "length": "tokens",
    "longest": "tokens",
    "memory_gb": "GB",
}
NAMES = {
    "bos": "starts with a beginning-of-text token",
    "dtype": "number format",
    "runs_compared": "stretches of text compared",
    "cpu": "processor",
    "gpu": "GPU",
}
"""What a recorded field is called on a page, where its own name says too little."""


def first_names(names: Sequence[str], most: int = 10) -> str:
    """Return names in a row, the first `most` of them, as a terminal can show them."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", ", ".join(names[:most])) + more


def clean(value: Any, numbers: bool = True) -> Any:
    """Copy data so that any JSON reader, browser and terminal can take it.

    Tuples become lists, control characters and lone surrogates are replaced, and with `numbers`
    those that are not finite become words.
    """
    if isinstance(value, dict):
        return {str(clean(str(key))): clean(item, numbers) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item, numbers) for item in value]
    if isinstance(value, str):
        return CONTROL.sub(
            "\N{REPLACEMENT CHARACTER}", value.encode("utf-8", "replace").decode("utf-8")
        )
    return (
        number(value)
        if numbers and isinstance(value, float) and not math.isfinite(value)
        else value
    )


def number(value: float | str | None) -> str:
    """Write four significant digits, thousands separated; words stay words and nothing is
    `not measured`."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return (
            "not a number" if math.isnan(value) else "infinite" if value > 0 else "minus infinite"
        )
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:,.4g}"


def plain(value: object) -> str:
    """Write any recorded value: lists and mappings spelled out."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value) or "none"
    return (
        "none" if value is None else number(value if isinstance(value, float | int) else str(value))
    )


def facts(recorded: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    """Write recorded fields as names and values; long lists are counted, and stand in
    report.json."""
    return tuple(
        (NAMES.get(key, key.replace("_", " ")), _fact(key, value))
        for key, value in recorded.items()
    )


def _fact(key: str, value: object) -> str:
    if isinstance(value, list | tuple) and len(value) > 3:
        return f"{len(value):,}, listed in report.json"
    return (
        f"{plain(value)} {UNITS[key]}"
        if key in UNITS and isinstance(value, int | float)
        else plain(value)
    )


def counts(counted: Mapping[str, int]) -> str:
    """Write `210 recommended, 3 possible`."""
    return ", ".join(f"{count:,} {name}" for name, count in counted.items()) or "none"


def percent(share: float) -> str:
    """Write `57.4 %`."""
    return f"{100 * share:.1f} %"


def with_error(value: float | None, error: float | None) -> str:
    """Write `25.95 ± 1.54`: the error with three digits, the value to the same place."""
    both = _finite(value, error)
    if not both or both[1] <= 0:
        return number(value)
    places = _places(both[1], digits=3)
    return f"{both[0]:,.{places}f} ± {both[1]:,.{places}f}"


def interval(low: float | None, high: float | None) -> str:
    """Write `4.22 to 4.74`: both ends to the same place, which the width decides."""
    return f"{within(low, low, high)} to {within(high, low, high)}"


def within(value: float | None, low: float | None, high: float | None) -> str:
    """Write a value to the same place as its interval."""
    three = _finite(value, low, high)
    if not three or three[2] <= three[1]:
        return number(value)
    return f"{three[0]:,.{_places(three[2] - three[1], digits=2)}f}"


def _finite(*values: float | None) -> tuple[float, ...]:
    """Return the values, or nothing when one of them is no finite number."""
    numbers = tuple(value for value in values if value is not None and math.isfinite(value))
    return numbers if len(numbers) == len(values) else ()


def _places(size: float, digits: int) -> int:
    return min(12, max(0, digits - 1 - math.floor(math.log10(size))))


def quantity(value: float | None, unit: str) -> str:
    """Write `4.5 s`; what was not measured takes no unit."""
    return f"{number(value)} {unit}" if _finite(value) else number(value)


def megabytes(count: int | None) -> str:
    """Write bytes as MB, or as kB where they are few."""
    if count is None:
        return MISSING
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def moment(time: str | None) -> str:
    """Write an ISO time as people do."""
    return number(time).replace("T", " ").replace("+00:00", " UTC")


def shape(sizes: Sequence[int]) -> str:
    """Write `64 × 32`."""
    return " × ".join(str(size) for size in sizes) if sizes else "scalar"


def plural(count: int, noun: str) -> str:
    """Write `1 layer`, `1,024 layers`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def listed(parts: Sequence[str]) -> str:
    """Write `a, b and c`."""
    return (
        parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""
    )


def capital(text: str) -> str:
    """Write a sentence's first letter large."""
    return text[:1].upper() + text[1:]


def markdown(value: object) -> str:
    """Write text as it is into any Markdown cell or paragraph: no markup, no HTML, one line."""
    escaped = MARKDOWN.sub(r"\\\1", str(value)).replace("://", "\\://")
    return "<br>".join(line.strip() for line in escaped.splitlines()) or " "
