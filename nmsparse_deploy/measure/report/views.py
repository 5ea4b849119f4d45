"""The pages: HTML and Markdown made from the same dict, escaped by default."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from nmsparse_deploy.measure.report import plots
from nmsparse_deploy.runs import wording as text

TEMPLATES = Path(__file__).parent / "templates"
FILTERS = {"number": text.number, "megabytes": text.megabytes, "seconds": text.seconds, "shape": text.shape,
           "milliseconds": text.milliseconds, "plain": text.plain, "moment": text.moment,
           "counts": text.counts, "counted": text.counted}
FUNCTIONS = {"with_error": text.with_error, "interval": text.interval, "within": text.within, "plural": text.plural}
WORDS = {"holds": "Pattern holds", "fails": "Verification failed", "unverified": "Not verified"}


def html(report: dict[str, Any]) -> str:
    """One self-contained page: no script, nothing loaded from anywhere."""
    return page("index.html.j2", report=report, pictures=_pictures(report))


def markdown(report: dict[str, Any]) -> str:
    return page("report.md.j2", report=report)


def page(template: str, **values: Any) -> str:
    """A template of this folder, filled in; `.html` ones get the style sheet."""
    if template.endswith(".md.j2"):
        return _text().get_template(template).render(**values)
    style = Markup((TEMPLATES / "style.css").read_text(encoding="utf-8"))
    return _page().get_template(template).render(style=style, **values)


@cache
def _page() -> Environment:
    return _environment(autoescape=True, finalize=lambda value: text.MISSING if value is None else value)


@cache
def _text() -> Environment:
    environment = _environment(autoescape=False, finalize=_markdown_cell)
    environment.filters["block"] = lambda value: Markup(_indented(value))
    return environment


def _environment(**options: Any) -> Environment:
    environment = Environment(loader=FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True,
                              undefined=StrictUndefined, keep_trailing_newline=True, **options)
    environment.filters |= FILTERS
    environment.globals |= {**FUNCTIONS, "words": WORDS}
    return environment


def _markdown_cell(value: Any) -> str:
    """Everything is escaped but what a filter marked as finished."""
    return str(value) if isinstance(value, Markup) else text.markdown(text.MISSING if value is None else value)


def _indented(value: str) -> str:
    """A code block that no text can end early."""
    return "\n".join(f"    {line}" for line in value.splitlines())


def _pictures(report: dict[str, Any]) -> dict[str, list[Markup]]:
    """Inline SVG by section; plots with much in them in a wide and a narrow form."""
    series, masks, latency = report["layers"]["series"], report["masks"], report["latency"]
    found: dict[str, list[str | None]] = {
        "errors": [plots.relative_errors(series, 10.2, "errors-wide"), plots.relative_errors(series, 4.6, "errors")],
        "masks": [plots.mask_corner(masks), *(plots.kept_by_position(entry, f"position-{number}")
                                              for number, entry in enumerate(masks["positions"]))] if masks else [],
        "latency": [plots.latency_arms(latency["arms"], 10.2, "latency-wide"),
                    plots.latency_arms(latency["arms"], 4.6, "latency")] if latency else []}
    return {name: [Markup(svg) for svg in svgs if svg] for name, svgs in found.items()}
