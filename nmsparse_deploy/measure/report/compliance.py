"""Does every tensor hold, in every place that was checked; and what nobody checked here."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from nmsparse_deploy.measure.report.stages import NotChecked, Stages
from nmsparse_deploy.pattern import NMPattern, parse_pattern
from nmsparse_deploy.prove.agreement import NotCompared
from nmsparse_deploy.prove.report import TensorCheck, VerifyReport
from nmsparse_deploy.runs.section import (
    Block,
    Bullets,
    Cell,
    Fold,
    Paragraph,
    Section,
    Table,
    columns,
)
from nmsparse_deploy.runs.wording import (
    counts,
    megabytes,
    number,
    percent,
    plain,
    plural,
    quantity,
    shape,
)


@dataclass(frozen=True)
class CheckedPlace:
    """An artefact with its counts and tensors, the failed ones first."""

    place: str
    artefact: str
    ok: bool
    checked: int
    failed: int
    skipped: int
    groups: int
    bad: int
    negative_zeros: int
    nonfinite: int
    mask_mismatch: int | None
    zero_share: float | None
    shape_verdicts: dict[str, int]
    skipped_because: dict[str, int]
    problems: tuple[str, ...]
    bytes_read: int
    seconds: float
    tensors: tuple[TensorCheck, ...]


@dataclass(frozen=True)
class Compliance:
    """All places."""

    checked: int
    failed: int
    problems: int
    ok: bool
    places: tuple[CheckedPlace, ...]


def compliance(stages: Stages) -> Compliance | None:
    """Count what holds; None when nothing was verified."""
    if stages.verify is None:
        return None
    places = tuple(_place(stages.path, report) for report in stages.verify.reports)
    return Compliance(
        sum(place.checked for place in places),
        sum(place.failed for place in places),
        sum(len(place.problems) for place in places),
        bool(places) and all(place.ok for place in places),
        places,
    )


def _place(run: Path, report: VerifyReport) -> CheckedPlace:
    claims = sorted(
        (check for check in report.checks if check.skipped is None), key=lambda check: check.ok
    )
    compared = [check.mask_mismatch for check in claims if check.mask_mismatch is not None]
    artefact = inside(run, report.artefact)
    return CheckedPlace(
        _title(report.place, artefact),
        artefact,
        report.ok,
        report.checked,
        report.failed,
        report.skipped,
        sum(check.groups for check in claims),
        sum(check.bad for check in claims),
        sum(check.negative_zeros for check in claims),
        sum(check.nonfinite for check in claims),
        sum(compared) if compared else None,
        report.zero_share,
        dict(Counter(check.shape_verdict or "no 2:4 kernel for this pattern" for check in claims)),
        dict(Counter(check.skipped for check in report.checks if check.skipped)),
        report.problems,
        report.bytes_read,
        report.seconds,
        tuple(claims),
    )


def _title(place: str, artefact: str) -> str:
    parts = Path(artefact).parts
    if place == "onnx":
        which = "" if Path(artefact).stem == "model" else f" {Path(artefact).stem}"
        return f"ONNX {parts[-2]}{which}" if len(parts) > 1 else "ONNX"
    return {"file": "saved model", "torch": "model in memory"}.get(place, place)


def inside(run: Path, text: str) -> str:
    """Return an artefact's path within its run, also after the run was moved; else the text as it
    is."""
    parts = Path(text).parts
    for start in range(len(parts)):
        tail = Path(*parts[start:])
        if not tail.is_absolute() and (run / tail).exists():
            return tail.as_posix()
    return text


def not_checked(stages: Stages, engines: bool) -> tuple[NotChecked, ...]:
    """List steps that this run could not take or has not taken, each with its reason."""
    reports = stages.verify.reports if stages.verify else ()
    graphs = stages.export.files if stages.export else ()
    rows = list(stages.verify.not_checked) if stages.verify else []
    if engines:
        rows = [
            row for row in rows if row.place != "engine"
        ]  # it was built after that verification
    known = {row.place for row in rows} | {report.place for report in reports}
    if stages.verify is None:
        rows.append(
            NotChecked("pattern", "the run has no verification, see nmsparse-deploy verify")
        )
    if "onnx" not in known:
        rows.append(NotChecked("onnx", "no ONNX file was exported, see nmsparse-deploy export"))
    if not engines and "engine" not in known:
        rows.append(NotChecked("engine", "no inference engine was built"))
    if stages.evaluate is None:
        rows.append(NotChecked("accuracy", "not evaluated, see nmsparse-deploy evaluate"))
    rows += [
        NotChecked(f"output of ONNX {graph.precision}", graph.agreement.not_checked)
        for graph in graphs
        if isinstance(graph.agreement, NotCompared)
    ]
    compilers = [
        made.not_checked
        for graph in graphs
        for made in graph.tensorrt_rtx.values()
        if made.not_checked
    ]
    rows += [NotChecked("TensorRT-RTX compile", why) for why in compilers[:1]]
    if stages.bench is None:
        rows.append(NotChecked("latency", "not measured, see nmsparse-deploy bench"))
    elif stages.bench.where == "cpu":
        rows.append(NotChecked("sparse kernels", "the arms were timed on a CPU, which has none"))
    return tuple(rows)


def held(compliance: Compliance | None) -> Section:
    """Write the section about the pattern."""
    title = "Does every tensor hold the pattern?"
    if compliance is None:
        return Section(
            title,
            (Paragraph("Not verified: no verification is recorded in this run."),),
            "compliance",
        )
    heads = columns(
        "place",
        "tensors checked",
        "failed",
        "groups",
        "broken groups",
        "negative zeros",
        "NaN or infinite",
        "outside the mask",
        "shape for sparse tensor cores",
        "verdict",
    )
    failures = [(place.place, problem) for place in compliance.places for problem in place.problems]
    failures += [
        (place.place, f"{row.tensor}: {'; '.join(row.problems)}")
        for place in compliance.places
        for row in place.tensors
        if not row.ok
    ]
    patterns = {parse_pattern(row.pattern) for place in compliance.places for row in place.tensors}
    meaning = "; ".join(
        f"{pattern} means that of {pattern.group} neighbouring weights along the group axis at most "
        f"{pattern.keep} are not zero"
        for pattern in sorted(patterns, key=str)
        if isinstance(pattern, NMPattern)
    )
    blocks: list[Block] = [Paragraph(f"{meaning}.", "soft")] if meaning else []
    blocks.append(
        Table("Verification by place", heads, tuple(_counts(place) for place in compliance.places))
    )
    if failures:
        blocks.append(Bullets(tuple(failures)))
    return Section(
        title, (*blocks, *(_one_by_one(place) for place in compliance.places)), "compliance"
    )


def _counts(place: CheckedPlace) -> tuple[str | Cell, ...]:
    seen = (
        number(place.groups)
        if place.groups or place.zero_share is None
        else f"{percent(place.zero_share)} zeros"
    )
    return (
        place.place,
        number(place.checked),
        _count(place.failed),
        seen,
        _count(place.bad),
        _count(place.negative_zeros),
        _count(place.nonfinite),
        _outside(place.mask_mismatch),
        counts(place.shape_verdicts),
        Cell("holds", "good") if place.ok else Cell("FAILS", "bad"),
    )


def _count(faults: int) -> str | Cell:
    return Cell(number(faults), "bad") if faults else "0"


def _outside(mismatch: int | None) -> str | Cell:
    return "no mask" if mismatch is None else _count(mismatch)


def _one_by_one(place: CheckedPlace) -> Fold:
    heads = columns(
        "tensor",
        "number format",
        "shape",
        "pattern",
        "group axis",
        "groups",
        "broken groups",
        "negative zeros",
        "NaN or infinite",
        "outside the mask",
        "kernel shape",
        "verdict",
    )
    rows = tuple(
        (
            row.tensor,
            row.dtype,
            shape(row.shape),
            row.pattern,
            plain(row.axis),
            number(row.groups),
            _count(row.bad),
            _count(row.negative_zeros),
            _count(row.nonfinite),
            _outside(row.mask_mismatch),
            plain(row.shape_verdict),
            "holds" if row.ok else Cell("FAILS", "bad"),
        )
        for row in place.tensors
    )
    skipped = (
        f" {plural(place.skipped, 'tensor')} without a claim: {counts(place.skipped_because)}."
        if (place.skipped_because)
        else ""
    )
    return Fold(
        f"{place.place}: {plural(place.checked, 'tensor')}, one by one",
        (
            Paragraph(
                f"{place.artefact}; {megabytes(place.bytes_read)} read in {quantity(place.seconds, 's')}.{skipped}",
                "soft",
            ),
            Table(f"Tensors of the {place.place}", heads, rows, small=True),
        ),
        open=not place.ok,
        page_only=True,
    )


def unchecked(rows: tuple[NotChecked, ...]) -> Section:
    """Write the section about steps that were not taken."""
    body = (
        Bullets(tuple((row.place, row.why) for row in rows))
        if rows
        else Paragraph("Every step was checked.")
    )
    return Section(f"What was not checked here ({len(rows)})", (body,), "not-checked")
