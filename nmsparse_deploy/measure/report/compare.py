"""The page of a comparison: one table and one picture, accuracy against the time that pruning took."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from nmsparse_deploy.measure.report import plots
from nmsparse_deploy.measure.report.views import page


def html(result: dict[str, Any]) -> str:
    """One self-contained page: no script, nothing loaded from anywhere."""
    points = [(row["recipe"], row["seconds"], row["value"]) for row in result["rows"]]
    metric = result["dense"]["metric"]
    pictures = [plots.against_cost(points, result["dense"]["value"], metric, width, f"cost-{width}")
                for width in (10.2, 4.6)]
    return page("compare.html.j2", result=result, pictures=[Markup(svg) for svg in pictures])


def markdown(result: dict[str, Any]) -> str:
    return page("compare.md.j2", result=result)
