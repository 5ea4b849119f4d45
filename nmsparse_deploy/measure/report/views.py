"""The pages: HTML and Markdown made from the same sections by one macro each, escaped by
default."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from nmsparse_deploy.measure.report.data import Report, sections
from nmsparse_deploy.runs import wording
from nmsparse_deploy.runs.section import Section

TEMPLATES = Path(__file__).parent / "templates"
BADGES = {"holds": "Pattern holds", "fails": "Verification failed", "unverified": "Not verified"}


@dataclass(frozen=True)
class Page:
    """Sections under a title. `state` colours the verdict, which is left out where it is empty."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]
    footer: str
    state: str = ""
    badge: str = ""
    verdict: tuple[str, ...] = ()
    warning: str = ""


def report_page(report: Report) -> Page:
    """Make the page of a run."""
    pruning, top = report.pruning, report.headline
    warning = "" if pruning.finished else "The prune stage of this run is not recorded as finished."
    return Page(
        f"{top.model}: {top.pattern} with {top.method}",
        f"{wording.plural(pruning.layers, 'layer')} in {wording.plural(pruning.blocks, 'block')}, "
        f"{pruning.weights:,} weights",
        sections(report),
        f"Every number on this page is a field of report.json ({report.format}) in the same folder; report.md holds "
        "the same as text.",
        top.state,
        BADGES[top.state],
        top.sentences,
        warning,
    )


def html(page: Page) -> str:
    """Render one self-contained page: no script, nothing loaded from anywhere."""
    style = Markup((TEMPLATES / "style.css").read_text(encoding="utf-8"))
    return _environment(markdown=False).get_template("page.html.j2").render(page=page, style=style)


def markdown(page: Page) -> str:
    """Render the same as text."""
    return render_markdown("page.md.j2", page=page)


def render_markdown(template: str, **values: Any) -> str:
    """Fill in a Markdown template of this folder."""
    return _environment(markdown=True).get_template(template).render(**values)


@cache
def _environment(markdown: bool) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=True,
        finalize=_markdown_text if markdown else None,
    )
    environment.filters["block"] = lambda text: Markup(
        "\n".join(f"    {line}" for line in text.splitlines())
    )
    return environment


def _markdown_text(value: object) -> Markup:
    """Escape everything but what a macro or a filter has finished."""
    return value if isinstance(value, Markup) else Markup(wording.markdown(value))
