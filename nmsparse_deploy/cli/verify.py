"""`nmsparse-deploy verify`."""

from pathlib import Path

import nmsparse_deploy as nms
from nmsparse_deploy.cli.app import output, verb
from nmsparse_deploy.errors import CheckFailed


@verb(
    target="run folder, checkpoint (file or folder), .onnx or .engine; left out: the newest run",
    pattern="keep:group, for files without a run",
    expect="glob on tensors that have to be sparse, for files without a run",
    strict="fail when a weight of an ONNX model could not be followed to its multiplication",
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
    if target is not None and target.suffix in (".engine", ".plan"):
        _verify_engine(target, counters)
        return
    from nmsparse_deploy.ship.verify_run import verify_any

    reports, missing = verify_any(target, pattern, expect, output.progress)
    if strict:
        reports = [report.strict() for report in reports]
    failures = [failure for report in reports for failure in report.failures()]
    foreign = [
        check
        for report in reports
        for check in report.checks
        if check.parameter is None and not check.skipped
    ]
    output.result(
        {
            "ok": not failures,
            "reports": [report.to_json() for report in reports],
            "not_checked": missing,
        },
        [
            *(report.summary() for report in reports),
            *(
                f"  {c.tensor}: {c.pattern} along axis {c.axis}, {c.groups:,} groups"
                for c in foreign
            ),
            *(f"not checked here: {row['place']} ({row['why']})" for row in missing),
        ],
    )
    if failures:
        raise CheckFailed(f"{len(failures)} checks failed; the first: {failures[0]}")


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
