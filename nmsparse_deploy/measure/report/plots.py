"""Plots of a report as inline SVG: no scripts, no files, system fonts, and the page's own
colours."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
)

from nmsparse_deploy.runs.section import Graphic
from nmsparse_deploy.runs.wording import percent

if TYPE_CHECKING:
    from nmsparse_deploy.measure.report.latency import LatencyArm
    from nmsparse_deploy.measure.report.layers import KeptPositions, MaskFacts, Series

WIDE, NARROW = 10.2, 4.6
"""Inches on a screen, and on a phone."""
INK, FAINT = "#010203", "#040506"
SERIES = tuple(f"#0{n}0a0{n}" for n in range(1, 9))
"""Stand-ins that become CSS variables, so that the plots follow the page from light to dark."""
COLOURS = {
    INK: "currentColor",
    FAINT: "var(--faint)",
    **{colour: f"var(--c{n})" for n, colour in enumerate(SERIES, start=1)},
}
MARKERS = "os^Dvp<>"
KEPT = (0.27, 0.51, 0.78, 1.0)  # in a bitmap, so one blue for both backgrounds
SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
}
XLINK = re.compile(r"\bxlink:href=")
DROPPED = re.compile(
    r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|\s(?:xmlns(?::\w+)?|version)=\"[^\"]*\"",
    re.S,
)
GROUP_ID = re.compile(r"<g id=\"[^\"]*\"")
FAMILY = re.compile(r" font-family: [^;\"]*;")
LINES = re.compile(r" *\n *")
BASE64 = re.compile(r"base64,[^\"]*")


def relative_errors(series: Series, width: float, salt: str) -> Graphic | None:
    """Draw relative output error by block, one line per layer kind; None when none was measured or
    all are zero."""
    lines = {
        kind: [(block, error) for block, error in points if error > 0]
        for kind, points in series.items()
    }
    lines = {kind: points for kind, points in lines.items() if points}
    if not lines:
        return None

    extremes = [
        (min(error for _, error in points), max(error for _, error in points))
        for points in lines.values()
    ]
    columns = 7 if width > 5 else 3

    def draw(axes: Axes) -> None:
        for number, (kind, points) in enumerate(lines.items()):
            turn, place = divmod(number, len(SERIES))
            axes.plot(
                *zip(*points),
                label=_short(kind),
                color=SERIES[place],
                marker=MARKERS[place],
                linewidth=1.3,
                markersize=3.2,
                linestyle="--" if turn else "-",
            )
        axes.set_yscale("log")
        few = max(worst for _, worst in extremes) < 20 * min(best for best, _ in extremes)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="y", color=FAINT, linewidth=0.4, alpha=0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set(
            title="Relative output error of every pruned layer",
            xlabel="block",
            ylabel="share of output energy (log scale)",
        )
        axes.figure.legend(
            loc="outside lower left", ncols=columns, columnspacing=1.2, handlelength=1.8
        )

    worst = max((error, kind, block) for kind, points in lines.items() for block, error in points)
    text = (
        f"Line plot of the relative output error by block for {len(lines)} layer kinds, logarithmic scale; the "
        f"largest is {worst[0]:.3g} in {worst[1]} of block {worst[2]}."
    )
    return _svg(draw, (width, 3.1 + 0.17 * math.ceil(len(lines) / columns)), text, salt)


def mask_corner(masks: MaskFacts) -> Graphic:
    """Draw the corner of one mask: coloured = kept; the group axis runs to the right."""
    kept = np.array([[value == "1" for value in row] for row in masks.corner])
    pixels = np.zeros((*kept.shape, 4))
    pixels[kept] = KEPT
    height, width = kept.shape

    def draw(axes: Axes) -> None:
        axes.imshow(pixels, interpolation="none", aspect="equal")
        step = masks.group * max(1, round(width / 4 / masks.group))
        axes.set_xticks(
            np.arange(0, width + 1, step) - 0.5, [str(n) for n in range(0, width + 1, step)]
        )
        axes.set_yticks(
            np.arange(0, height + 1, max(1, height // 4)) - 0.5,
            [str(n) for n in range(0, height + 1, max(1, height // 4))],
        )
        axes.spines[["top", "right"]].set_visible(True)
        axes.set(
            title=f"First {height} × {width} values of one mask",
            xlabel="position along the group axis (input)",
            ylabel="output row",
        )

    text = (
        f"Heat map of the first {height} by {width} values of the mask of {masks.tensor}: {int(kept.sum())} of "
        f"{kept.size} values are kept."
    )
    return _svg(draw, (3.6, 0.9 + 2.7 * height / width), text, "corner")


def kept_by_position(entry: KeptPositions, salt: str) -> Graphic:
    """Draw the share of groups that keep each position of the group, over all masks of one
    pattern."""
    shares = entry.kept

    def draw(axes: Axes) -> None:
        bars = axes.bar(range(len(shares)), shares, color=SERIES[0], width=0.62)
        axes.bar_label(
            bars,
            [percent(share) for share in shares],
            padding=2,
            fontsize=8 if len(shares) < 6 else 6.5,
        )
        axes.axhline(entry.density, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(shares)))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        axes.set_ylim(0, min(1.12, max([*shares, entry.density]) * 1.3))
        axes.set(
            title=f"Kept values by position in the {entry.pattern} group",
            xlabel="position in the group",
            ylabel="share of groups",
        )

    listed = ", ".join(percent(share) for share in shares)
    text = (
        f"Bars: over {entry.masks} masks, positions 0 to {len(shares) - 1} of a {entry.pattern} group are "
        f"kept in {listed} of all groups; the dotted line is the density {percent(entry.density)}."
    )
    return _svg(draw, (3.6, 3.2), text, salt)


def latency_arms(arms: Sequence[LatencyArm], width: float, salt: str) -> Graphic:
    """Draw the median (dot) and the 10th to 90th percentile (bar) of every arm."""
    times = [(arm.p10_ms, arm.median_ms, arm.p90_ms) for arm in arms]

    def draw(axes: Axes) -> None:
        for place, (low, middle, high) in enumerate(times):
            colour = SERIES[place % len(SERIES)]
            axes.plot(
                [low, high],
                [place, place],
                color=colour,
                linewidth=5,
                alpha=0.45,
                solid_capstyle="butt",
            )
            axes.plot([middle], [place], color=colour, marker="o", markersize=6)
        axes.set_yticks(range(len(arms)), [_short(arm.name) for arm in arms])
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.set_xlim(0, max((high for _, _, high in times), default=0) * 1.05 or 1)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.grid(axis="x", color=FAINT, linewidth=0.4, alpha=0.5)
        axes.set(title="Median (dot) and 10th to 90th percentile (bar)", xlabel="ms per call")

    text = "; ".join(f"{arm.name}: median {arm.median_ms:.4g} ms" for arm in arms)
    return _svg(draw, (width, 1.1 + 0.36 * len(arms)), f"Latency by arm: {text}.", salt)


def against_cost(
    points: Sequence[tuple[str, float, float]], dense: float, metric: str, width: float, salt: str
) -> Graphic:
    """Draw a dot per recipe: the seconds that pruning took and the metric it reached; dense is the
    dotted line."""
    values = [value for _, _, value in points] + [dense]
    spread = "ppl" in metric and max(values) > 4 * min(values)

    def draw(axes: Axes) -> None:
        for place, (name, seconds, value) in enumerate(points):
            axes.plot(
                [max(seconds, 0.1)],
                [value],
                color=SERIES[place % len(SERIES)],
                linestyle="none",
                marker=MARKERS[place % len(MARKERS)],
                markersize=6,
                label=_short(name),
            )
        axes.axhline(dense, color=INK, linewidth=0.8, linestyle=":", label="dense")
        axes.set_xscale("log")
        if spread:
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
        for axis in (axes.xaxis, axes.yaxis) if spread else (axes.xaxis,):
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="y", color=FAINT, linewidth=0.4, alpha=0.5)
        axes.set(
            title=f"{metric} against the time to prune",
            xlabel="seconds to prune (log scale)",
            ylabel=metric,
        )
        axes.figure.legend(loc="outside lower left", ncols=4 if width > 5 else 2, columnspacing=1.2)

    listed = "; ".join(f"{name}: {value:.4g} in {seconds:.0f} s" for name, seconds, value in points)
    rows = math.ceil((len(points) + 1) / (4 if width > 5 else 2))
    return _svg(
        draw, (width, 3.1 + 0.17 * rows), f"{metric} by recipe, dense {dense:.4g}: {listed}.", salt
    )


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:27]}…"


def _svg(draw: Callable[[Axes], None], size: tuple[float, float], words: str, salt: str) -> Graphic:
    settings: Any = {**SETTINGS, "svg.hashsalt": salt}
    with matplotlib.rc_context(settings):
        figure = Figure(size, layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return Graphic(_inline(buffer.getvalue(), words), words)


def _inline(text: str, words: str) -> str:
    """Return an SVG element for an HTML page: named for screen readers, without ids that two plots
    would share."""
    text = DROPPED.sub("", text[text.index("<svg") :])
    text = GROUP_ID.sub("<g", XLINK.sub("href=", FAMILY.sub("", LINES.sub(" ", text))))
    text = BASE64.sub(lambda match: match[0].replace(" ", ""), text)
    for stand_in, colour in COLOURS.items():
        text = text.replace(stand_in, colour)
    title = html.escape(words, quote=True)
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
