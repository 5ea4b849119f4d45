"""What the report says in sentences. Every number in them is a field of the report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

from pydantic import JsonValue

from nmsparse_deploy.measure.report.artefacts import Sizes
from nmsparse_deploy.measure.report.compliance import Compliance
from nmsparse_deploy.measure.report.latency import LatencyResult
from nmsparse_deploy.measure.report.quality import MeasuredValue, PairedComparison, Quality
from nmsparse_deploy.measure.report.stages import NotChecked
from nmsparse_deploy.runs.wording import (
    capital,
    clean,
    listed,
    megabytes,
    number,
    plural,
    with_error,
)

State = Literal["holds", "fails", "unverified"]
NOT_EVALUATED = "what it costs in accuracy was not measured"
NO_SPEED = "no speed-up from sparsity was measured here"


@dataclass(frozen=True)
class Pruning:
    """How the model was pruned. `sparse_kernels`: can sparse tensor cores run every pattern?"""

    method: str
    pattern: str
    layers: int
    sparse_kernels: bool
    blocks: int
    weights: int
    finished: bool


@dataclass(frozen=True)
class Headline:
    """Who, how, does it hold, what it cost, how large, what nobody checked; `lines` are for the
    terminal."""

    model: str
    method: str
    pattern: str
    layers: int
    compliance: dict[str, int] | None
    metrics: tuple[MeasuredValue, ...] | None
    comparison: PairedComparison | None
    sizes: dict[str, int | None]
    speed: str | None
    not_checked: tuple[NotChecked, ...]
    state: State
    sentences: tuple[str, ...]
    verdict: str
    lines: tuple[str, ...]

    def to_json(self) -> dict[str, JsonValue]:
        """Return it as any JSON reader takes it."""
        readable: dict[str, JsonValue] = clean(asdict(self))
        return readable


def headline(
    model: str,
    pruning: Pruning,
    compliance: Compliance | None,
    quality: Quality | None,
    sizes: Sizes,
    latency: LatencyResult | None,
    engines: Iterable[str],
    not_checked: tuple[NotChecked, ...],
) -> Headline:
    """Summarise a run. `engines` are sentences about its engines."""
    clauses = (_pruned(model, pruning), _holds(compliance), _cost(quality), _speed(latency))
    sentences = (
        f"{clauses[0]}.",
        f"Pattern: {clauses[1]}.",
        f"Accuracy: {clauses[2]}.",
        f"Speed: {clauses[3]}.",
    )
    values = (
        "; ".join(
            f"{row.label} {row.metric} = {with_error(row.value, row.standard_error)}"
            for row in quality.rows
        )
        if quality
        else NOT_EVALUATED
    )
    compared = f"; {quality.comparison.words()}" if quality and quality.comparison else ""
    lines = [
        clauses[0],
        capital(clauses[1]),
        f"{capital(values)}{compared}",
        f"Size: weights {megabytes(sizes.model_bytes)} with their zeros stored, masks "
        f"{megabytes(sizes.masks_bytes)}",
        capital(clauses[3]),
    ]
    missing = "; ".join(f"{row.place} ({row.why})" for row in not_checked)
    lines = [
        *(f"{line}." for line in lines),
        *engines,
        *([f"Not checked here: {missing}."] if missing else []),
    ]
    held = (
        {"checked": compliance.checked, "failed": compliance.failed, "ok": compliance.ok}
        if compliance
        else None
    )
    state: State = (
        "unverified"
        if not compliance or not compliance.checked
        else "holds"
        if compliance.ok
        else "fails"
    )
    return Headline(
        model,
        pruning.method,
        pruning.pattern,
        pruning.layers,
        held,
        quality.rows if quality else None,
        quality.comparison if quality else None,
        {"model_bytes": sizes.model_bytes, "masks_bytes": sizes.masks_bytes},
        latency.verdict if latency else None,
        not_checked,
        state,
        sentences,
        " ".join(sentences),
        tuple(" ".join(line.split()) for line in lines),
    )


def _pruned(model: str, pruning: Pruning) -> str:
    what, were = ("weight matrix", "was") if pruning.layers == 1 else ("weight matrices", "were")
    limit = "" if pruning.sparse_kernels else ", which no sparse tensor core runs,"
    return f"{pruning.layers:,} {what} of {model} {were} pruned to {pruning.pattern}{limit} with {pruning.method}"


def _holds(compliance: Compliance | None) -> str:
    if compliance is None or not compliance.checked:
        return "whether they hold the pattern was not checked"
    if compliance.ok:
        places = listed([place.place for place in compliance.places])
        return f"{plural(compliance.checked, 'tensor')} checked in the {places}, and every one holds the pattern"
    wrong = listed([place.place for place in compliance.places if not place.ok])
    whole = (
        f" and {plural(compliance.problems, 'problem')} of whole files"
        if compliance.problems
        else ""
    )
    return (
        f"VERIFICATION FAILED in the {wrong}: {compliance.failed:,} of "
        f"{plural(compliance.checked, 'checked tensor')}{whole}"
    )


def _cost(quality: Quality | None) -> str:
    rows = (
        {row.label: row for row in reversed(quality.rows)} if quality else {}
    )  # the first metric matters most
    if quality is None or not rows:
        return NOT_EVALUATED
    if "dense" not in rows or "pruned" not in rows:
        return listed(
            [f"{row.metric} of {label} is {number(row.value)}" for label, row in rows.items()]
        )
    dense, pruned = rows["dense"], rows["pruned"]
    text = f"{pruned.metric} went from {number(dense.value)} dense to {number(pruned.value)} pruned"
    return f"{text} ({quality.comparison.words()})" if quality.comparison else text


def _speed(latency: LatencyResult | None) -> str:
    if latency is None:
        return f"{NO_SPEED}, because latency was not timed"
    reason = latency.verdict.rstrip(".")
    return f"{NO_SPEED}: {reason[:1].lower()}{reason[1:]}" if latency.where == "cpu" else reason
