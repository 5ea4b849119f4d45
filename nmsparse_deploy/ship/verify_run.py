"""Verify everything that a run holds, or a file that came from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nmsparse_deploy.errors import UsageError, from_os_error
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.pattern import Unstructured, parse_pattern
from nmsparse_deploy.prove import VerifyReport, verify_checkpoint, verify_onnx
from nmsparse_deploy.prove.report import NOT_CHECKED
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.ship.onnx import LinkMap
from nmsparse_deploy.ship.torch_sparse.artefact import verify_packed
from nmsparse_deploy.ship.torch_sparse.record import packed_models
from nmsparse_deploy.system.progress import Progress, silent


def verify(run: RunDir, progress: Progress = silent) -> list[VerifyReport]:
    """Check the run's weights, every exported graph and every packed model against its masks.
    Writes `verify.json`; does not raise."""
    masks = MaskSet.load(run / "masks.safetensors")
    reports = [verify_checkpoint(run / "model", masks, progress=progress)]
    for path in run.graphs():
        link = LinkMap.load(path.with_suffix(".link.json")).by_parameter()
        reports.append(verify_onnx(path, masks, link, progress=progress))
    reports += [verify_packed(folder, masks) for folder in packed_models(run)]
    run.write_json(
        "verify.json",
        {"reports": [report.to_json() for report in reports], "not_checked": not_checked(run)},
    )
    return reports


def not_checked(run: RunDir) -> list[dict[str, str]]:
    """Return steps of the chain that were not taken; a run with engines has its evidence in
    `engines.json`."""
    return [] if (run / "engines.json").is_file() else list(NOT_CHECKED)


def verify_any(
    target: Path | None = None,
    pattern: str = "2:4",
    expect: Sequence[str] = (),
    progress: Progress = silent,
) -> tuple[list[VerifyReport], list[dict[str, str]]]:
    """Check a run, or a checkpoint or ONNX file that came from elsewhere; returns reports and what
    was not checked.

    A file without a run has no masks: its sparse tensors are reported, and `expect` names the ones
    that must be.
    """
    try:
        is_run = target is None or (target / "manifest.json").is_file()
    except OSError as error:  # a name that is too long, a circle of links
        raise from_os_error(error) from error
    if target is None or is_run:
        if expect:
            raise UsageError(
                "--expect is for files without a run; a run knows which tensors have to be sparse."
            )
        run = RunDir.open(target)
        return verify(run, progress), not_checked(run)
    wanted = parse_pattern(pattern)
    if isinstance(wanted, Unstructured):
        raise UsageError(
            f"'{target}' has no masks, and zeros alone cannot show that it is {wanted}.",
            "verify the run that it belongs to",
        )
    check = verify_onnx if target.suffix == ".onnx" else verify_checkpoint
    return [check(target, pattern=wanted, expect=expect, progress=progress)], []
