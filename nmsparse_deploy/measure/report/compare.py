"""The page of a comparison: one table and one plot, accuracy against the time that pruning took."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from nmsparse_deploy.measure.report import plots
from nmsparse_deploy.measure.report.views import Page
from nmsparse_deploy.runs.section import Figure, Paragraph, Section, Table, columns
from nmsparse_deploy.runs.wording import megabytes, moment, number, plain, quantity, with_error


@dataclass(frozen=True)
class Score:
    """The first metric of a model: perplexity, accuracy or similarity."""

    metric: str
    value: float
    standard_error: float
    samples: int
    per_sample: tuple[float, ...]

    @property
    def loss(self) -> float:
        """Return a figure that is better when smaller: log-perplexity, or minus a score."""
        return math.log(self.value) if "ppl" in self.metric else -self.value


@dataclass(frozen=True)
class PairedMean:
    """The mean of paired differences with a 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class ComparedRecipe(Score):
    """A recipe with its score and its cost."""

    recipe: str
    spec: Mapping[str, object]
    run: str
    seconds: float
    peak_memory_mb: int
    gap_closed: float = 0.0
    """Share of the gap between the first recipe and the dense model."""
    difference: PairedMean | None = None
    """To the first recipe, where the metric is a mean."""


@dataclass(frozen=True)
class Comparison:
    """The content of `compare.json`."""

    model: str
    date: str
    evaluate: Mapping[str, object]
    dense: Score
    rows: tuple[ComparedRecipe, ...]
    same_calibration: bool
    page: str
    versions: dict[str, str]
    hardware: Mapping[str, object]

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def compare_page(compared: Comparison) -> Page:
    """Make the page of a comparison."""
    metric, dense = compared.dense.metric, compared.dense
    calibration = (
        "the same calibration data for all"
        if compared.same_calibration
        else "their calibration data differ"
    )
    rows = [("dense", with_error(dense.value, dense.standard_error), "", "", "")]
    rows += [
        (
            row.recipe,
            with_error(row.value, row.standard_error),
            f"{100 * row.gap_closed:.0f} %" if place else "reference",
            quantity(row.seconds, "s"),
            megabytes(row.peak_memory_mb * 1_000_000),
        )
        for place, row in enumerate(compared.rows)
    ]
    of_log = ", of the logarithm of the perplexity" if "ppl" in metric else ""
    body = Section(
        "Accuracy and cost",
        (
            Table(
                "Recipes",
                columns("recipe", metric, "gap to dense closed", "prune time", "peak memory"),
                tuple(rows),
            ),
            Paragraph(
                f"{number(dense.samples)} samples, the same for every model. The gap is that between the first "
                f"recipe and the dense model{of_log}. ± is the standard error; it covers the choice of evaluation "
                "samples, not of calibration data.",
                "soft",
            ),
            Figure(
                (_plot(compared.rows, dense, plots.WIDE),),
                narrow=(_plot(compared.rows, dense, plots.NARROW),),
            ),
        ),
    )
    return Page(
        f"{compared.model}: {len(compared.rows)} recipes",
        f"{len(compared.rows)} recipes side by side; {calibration}",
        (body,),
        f"{moment(compared.date)} · {plain(compared.versions)}",
    )


def _plot(rows: Sequence[ComparedRecipe], dense: Score, width: float) -> plots.Graphic:
    points = [(row.recipe, row.seconds, row.value) for row in rows]
    return plots.against_cost(points, dense.value, dense.metric, width, f"cost-{width}")
