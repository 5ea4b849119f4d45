"""`nmsparse-deploy verify`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import nmsparse_deploy as nms
from nmsparse_deploy.cli.app import output, verb
from nmsparse_deploy.cli.shapes import shape_lines
from nmsparse_deploy.errors import CheckFailed
from nmsparse_deploy.runs.wording import first_names
from nmsparse_deploy.system.sparse_cores import INELIGIBLE

if TYPE_CHECKING:
    from nmsparse_deploy.prove import TensorCheck


@verb(
    target="run folder, checkpoint (file or folder), .onnx or .engine; left out: the newest run",
    pattern="keep:group, for files without a run",
    expect="glob on tensors that have to be sparse, for files without a run",
    strict="fail when a weight could not be unpacked, or not be followed to its multiplication",
    counters="CSV of Nsight Compute, for an .engine",
)
def verify(
    target: Path | None = None,
    *,
    pattern: str = "2:4",
    expect: tuple[str, ...] = (),
    strict: bool = False,
    counters: Path | None = None,
) -> None:
    """Check every tensor of a run or of any checkpoint or ONNX file; for an engine, show which
    kernels are sparse."""
    if target is not None and target.suffix.lower() in (".engine", ".plan"):
        _verify_engine(target, counters)
        return
    from nmsparse_deploy.ship.verify_run import verify_any

    reports, missing = verify_any(target, pattern, expect, output.progress)
    if strict:
        reports = [report.strict() for report in reports]
    failures = [failure for report in reports for failure in report.failures()]
    rows = [check for report in reports for check in report.checks]
    claims = [check for check in rows if check.skipped is None]
    ineligible = list(
        dict.fromkeys(c.parameter or c.tensor for c in claims if c.shape_verdict == INELIGIBLE)
    )
    output.result(
        {
            "ok": not failures,
            "reports": [report.to_json() for report in reports],
            "not_checked": missing,
        },
        [
            *(report.summary() for report in reports),
            *(f"  {_claim(c)}" for c in claims if c.parameter is None or not c.ok),
            *_skipped(rows),
            *shape_lines(ineligible),
            *(f"not checked here: {row['place']} ({row['why']})" for row in missing),
        ],
    )
    if failures:
        raise CheckFailed(f"{len(failures)} checks failed; the first: {failures[0]}")


def _claim(check: "TensorCheck") -> str:
    """Say what a tensor claims, or why that does not hold."""
    name = first_names([check.tensor])
    if check.problems:
        return f"{name}: fails: {'; '.join(check.problems)}"
    note = f" ({check.note})" if check.note else ""
    return f"{name}: {check.pattern} along axis {check.axis}{note}, {check.groups:,} groups"


def _skipped(rows: Sequence["TensorCheck"]) -> list[str]:
    """Say what makes no claim, in a line for every reason; shapes do not make another reason."""
    reasons: dict[str, list[TensorCheck]] = {}
    for check in rows:
        if check.skipped is not None:
            reasons.setdefault(re.sub(r"\d+", "", check.skipped), []).append(check)
    return [
        f"  {'' if not alike[0].followed else 'skipped, '}{alike[0].skipped}: "
        f"{first_names([check.tensor for check in alike])}"
        for alike in reasons.values()
    ]


def _verify_engine(engine: Path, counters: Path | None) -> None:
    evidence = nms.verify_engine(engine, counters, output.progress)
    rows = [
        (
            layer.name,
            f"{layer.k}x{layer.n}",
            layer.dtype,
            layer.level or "none",
            layer.reason or "",
            layer.why_not,
        )
        for layer in evidence.layers
    ]
    output.table(
        evidence.to_json(),
        ("weight", "K x N", "type", "evidence", "stopped because", ""),
        rows,
        [evidence.verdict],
    )
    if evidence.problems:
        raise CheckFailed(evidence.problems[0])
