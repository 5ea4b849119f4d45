"""How figures and texts are written: one form for every page, so that no two pages disagree."""

from __future__ import annotations

import math
import re
from typing import Any

MISSING = "not measured"
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|<>~&$])")


def clean(value: Any) -> Any:
    """A copy that any JSON reader, browser and terminal can take.

    Numbers that are not finite become words, tuples become lists, control characters and lone surrogates are replaced.
    """
    if isinstance(value, dict):
        return {str(clean(str(key))): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    if isinstance(value, str):
        return CONTROL.sub("\N{REPLACEMENT CHARACTER}", value.encode("utf-8", "replace").decode("utf-8"))
    if isinstance(value, float) and not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite" if value > 0 else "minus infinite"
    return value


def number(value: Any) -> str:
    """Four significant digits, thousands separated; words stay words and nothing is `not measured`."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:,.4g}"
    return str(value)


def plain(value: Any) -> str:
    """Any recorded value in a cell: lists and mappings spelled out."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value) or "none"
    return "none" if value is None else number(value)


def counted(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts for a page: a list of ids is counted there; the ids themselves are in report.json."""
    return {key: f"{len(value):,} recorded" if isinstance(value, list) and len(value) > 3 else value
            for key, value in facts.items()}


def counts(found: dict[str, int]) -> str:
    """`210 recommended, 3 possible`."""
    return ", ".join(f"{count:,} {name}" for name, count in found.items()) or "none"


def with_error(value: Any, error: Any) -> str:
    """`25.95 ± 1.54`: the error with three digits, the value to the same place."""
    if not _is_number(value) or not _is_number(error) or error <= 0:
        return number(value)
    places = _places(error, digits=3)
    return f"{value:,.{places}f} ± {error:,.{places}f}"


def interval(low: Any, high: Any) -> str:
    """`4.22 to 4.74`: both ends to the same place, which the width decides."""
    if not _is_number(low) or not _is_number(high) or high <= low:
        return f"{number(low)} to {number(high)}"
    places = _places(high - low, digits=2)
    return f"{low:,.{places}f} to {high:,.{places}f}"


def within(value: Any, low: Any, high: Any) -> str:
    """The value to the same place as its interval."""
    if not all(_is_number(part) for part in (value, low, high)) or high <= low:
        return number(value)
    return f"{value:,.{_places(high - low, digits=2)}f}"


def _places(size: float, digits: int) -> int:
    return min(12, max(0, digits - 1 - math.floor(math.log10(size))))


def megabytes(count: Any) -> str:
    if not _is_number(count):
        return number(count)
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def seconds(value: Any) -> str:
    return f"{number(value)} s" if _is_number(value) else number(value)


def milliseconds(value: Any) -> str:
    return f"{number(value)} ms" if _is_number(value) else number(value)


def moment(value: Any) -> str:
    """An ISO time as people write it."""
    return number(value).replace("T", " ").replace("+00:00", " UTC")


def shape(sizes: Any) -> str:
    return " × ".join(str(size) for size in sizes) if sizes else "scalar"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def listed(parts: list[str]) -> str:
    """`a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""


def markdown(value: Any) -> str:
    """Text as it is, in any Markdown cell or paragraph: no markup, no HTML, one line."""
    escaped = MARKDOWN.sub(r"\\\1", str(value)).replace("://", "\\://")
    return "<br>".join(line.strip() for line in escaped.splitlines()) or " "


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
