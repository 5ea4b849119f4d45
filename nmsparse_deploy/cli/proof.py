"""`nmsparse-deploy proof`."""

from pathlib import Path

from nmsparse_deploy.cli.app import output, verb
from nmsparse_deploy.errors import CheckFailed, UsageError


@verb(
    out="folder of the result",
    only="a part of the proof",
    check="read a file of a proof instead, and check it",
    dry="tiny models and stand-in kernels on a CPU; measures nothing",
)
def proof(
    *,
    out: Path = Path("results/gpu"),
    only: tuple[str, ...] = (),
    check: Path | None = None,
    dry: bool = False,
) -> None:
    """Show what sparse kernels do on this GPU, unattended, in at most nine minutes; downloads and
    uploads nothing."""
    from nmsparse_deploy.measure.proof.record import ProofRecord
    from nmsparse_deploy.measure.proof.run import prove

    if check and (only or dry):
        raise UsageError("--check reads a file and runs nothing.", "leave the other options out")
    path = check or prove(out, dry, only, progress=output.progress)
    record = ProofRecord.load(path)
    rows = [
        (name, part.state, f"{part.seconds:.0f} s", part.reason or "")
        for name, part in record.parts.items()
    ]
    output.table(
        {
            "file": str(path),
            "gpu": record.gpu,
            "dry": record.dry,
            "parts": {name: part.state for name, part in record.parts.items()},
        },
        ("part", "state", "took", "why"),
        rows,
        [str(path), *(["dry run: nothing here was measured"] if record.dry else [])],
    )
    if not record.complete:
        raise CheckFailed("Not every part finished; the file says why.")
