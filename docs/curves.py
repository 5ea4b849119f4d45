"""Line plots as SVG text, byte for byte the same everywhere, so that a stale one can be told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#3b6fb6", "#d1602f", "#3a8f5c", "#8a56ac", "#b3446c", "#6b7280", "#b08a1e", "#2b9aa5")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, ROW = 340, 260, 46, 26, 40, 16
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One pair of axes: lines by name, and horizontal lines to compare with."""

    title: str
    lines: dict[str, Points]
    levels: dict[str, float]


def svg(panels: Sequence[Panel]) -> str:
    """Panels side by side with one legend below; the vertical axis is common."""
    values = [y for panel in panels for line in panel.lines.values() for _, y in line]
    values += [level for panel in panels for level in panel.levels.values()]
    low, high = min(values), max(values)
    span = (low - 0.04 * (high - low), high + 0.04 * (high - low))
    names = list(panels[0].lines)
    rows = -(-len(names) // 4)
    size = (WIDTH * len(panels), HEIGHT + ROW * rows + 8)
    body = [
        piece
        for number, panel in enumerate(panels)
        for piece in _panel(panel, number * WIDTH, span, names)
    ]
    step = (size[0] - LEFT) // 4
    body += [
        piece
        for number, name in enumerate(names)
        for piece in _key(name, number, (LEFT + number % 4 * step, HEIGHT + number // 4 * ROW))
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" width="{size[0]}" '
            f'height="{size[1]}" font-family="sans-serif" font-size="11">',
            f'<rect width="{size[0]}" height="{size[1]}" fill="#ffffff"/>',
            *body,
            "</svg>",
            "",
        ]
    )


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten, at most
    `most` of them."""
    size = 10.0 ** math.floor(math.log10(high - low))
    step = next(
        size * factor
        for factor in (0.1, 0.2, 0.5, 1, 2, 5)
        if (high - low) / (size * factor) < most
    )
    return [
        round(number * step, 9)
        for number in range(math.ceil(low / step), math.floor(high / step) + 1)
    ]


def _key(name: str, number: int, at: tuple[int, int]) -> list[str]:
    x, y = at
    return [
        f'<path d="M{x} {y}h16" stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="2"/>',
        f'<text x="{x + 20}" y="{y + 4}" fill="#222222">{escape(name)}</text>',
    ]


def _panel(panel: Panel, offset: int, span: tuple[float, float], names: Sequence[str]) -> list[str]:
    left, right, top, bottom = offset + LEFT, offset + WIDTH - 10, TOP, HEIGHT - BOTTOM
    most = max(x for line in panel.lines.values() for x, _ in line) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (right - left) * x / most,
            bottom - (bottom - top) * (y - span[0]) / (span[1] - span[0]),
        )

    found = [
        f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#888888"/>',
        f'<text x="{(left + right) / 2:.0f}" y="{HEIGHT - 12}" text-anchor="middle" fill="#222222">'
        f"{escape(panel.title)}</text>",
    ]
    for x in ticks(0.0, most):
        found.append(
            f'<text x="{place(x, 0)[0]:.1f}" y="{bottom + 14}" text-anchor="middle" fill="#555555">'
            f"{x:g}</text>"
        )
    for y in ticks(*span):
        found.append(
            f'<text x="{left - 4}" y="{place(0, y)[1] + 4:.1f}" text-anchor="end" fill="#555555">{y:g}</text>'
        )
        found.append(f'<path d="M{left} {place(0, y)[1]:.1f}H{right}" stroke="#eeeeee"/>')
    for name, level in panel.levels.items():
        y = place(0, level)[1]
        found.append(f'<path d="M{left} {y:.1f}H{right}" stroke="#999999" stroke-dasharray="4 3"/>')
        found.append(
            f'<text x="{right}" y="{y - 3:.1f}" text-anchor="end" fill="#555555">{escape(name)}</text>'
        )
    for number, name in enumerate(names):
        if line := panel.lines.get(name):
            path = "L".join(f"{px:.1f} {py:.1f}" for px, py in (place(*point) for point in line))
            colour = COLOURS[number % len(COLOURS)]
            found.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
    return found
