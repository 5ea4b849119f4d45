"""The page of a comparison: one table and one plot, accuracy against the time that pruning took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter

from nmsparse_deploy.measure.report import plots
from nmsparse_deploy.measure.report.views import Page
from nmsparse_deploy.runs.section import Figure, Paragraph, Section, Table, columns
from nmsparse_deploy.runs.wording import megabytes, moment, number, plain, quantity, with_error


@dataclass(frozen=True)
class Score:
    """The first metric of a model."""

    metric: str
    value: float
    standard_error: float
    samples: int


@dataclass(frozen=True)
class ComparedRecipe(Score):
    """A recipe with its score and its cost."""

    recipe: str
    gap_closed: float
    seconds: float
    peak_memory_mb: int


@dataclass(frozen=True)
class CompareFile:
    """`compare.json`."""

    model: str
    date: str
    dense: Score
    rows: tuple[ComparedRecipe, ...]
    same_calibration: bool
    versions: dict[str, str]


def compare_page(data: object) -> Page:
    """Make the page of a `compare.json`."""
    compared = TypeAdapter(CompareFile).validate_python(data)
    metric, dense = compared.dense.metric, compared.dense
    calibration = "the same calibration data for all" if compared.same_calibration else "their calibration data differ"
    rows = [("dense", with_error(dense.value, dense.standard_error), "", "", "")]
    rows += [(row.recipe, with_error(row.value, row.standard_error),
              f"{100 * row.gap_closed:.0f} %" if place else "reference", quantity(row.seconds, "s"),
              megabytes(row.peak_memory_mb * 1_000_000)) for place, row in enumerate(compared.rows)]
    of_log = ", of the logarithm of the perplexity" if "ppl" in metric else ""
    body = Section("Accuracy and cost", (
        Table("Recipes", columns("recipe", metric, "gap to dense closed", "prune time", "peak memory"), tuple(rows)),
        Paragraph(f"{number(dense.samples)} samples, the same for every model. The gap is that between the first "
                  f"recipe and the dense model{of_log}. ± is the standard error; it covers the choice of evaluation "
                  "samples, not of calibration data.", "soft"),
        Figure((_plot(compared.rows, dense, plots.WIDE),), narrow=(_plot(compared.rows, dense, plots.NARROW),))))
    return Page(f"{compared.model}: {len(compared.rows)} recipes",
                f"{len(compared.rows)} recipes side by side; {calibration}", (body,),
                f"{moment(compared.date)} · {plain(compared.versions)}")


def _plot(rows: Sequence[ComparedRecipe], dense: Score, width: float) -> plots.Picture:
    points = [(row.recipe, row.seconds, row.value) for row in rows]
    return plots.against_cost(points, dense.value, dense.metric, width, f"cost-{width}")
