"""Verify everything that a run holds, or a file that came from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nmsparse_deploy.errors import UsageError, from_os_error
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.pattern import Unstructured, parse_pattern
from nmsparse_deploy.prove import VerifyReport, verify_checkpoint, verify_onnx
from nmsparse_deploy.prove.checkpoint import NOTHING_CALLED
from nmsparse_deploy.prove.report import NOT_CHECKED
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.ship.onnx.link import LinkMap, verify_linked
from nmsparse_deploy.ship.torch_sparse.artefact import verify_packed
from nmsparse_deploy.ship.torch_sparse.record import packed_models
from nmsparse_deploy.system.progress import Progress, silent


def verify(run: RunDir, progress: Progress = silent) -> list[VerifyReport]:
    """Check the run's weights, every exported graph and every packed model against its masks.
    Writes `verify.json`; does not raise."""
    masks = MaskSet.load(run / "masks.safetensors")
    stored = run.stored_views()
    reports = [verify_checkpoint(run / "model", masks, progress=progress, stored=stored)]
    for path in run.graphs():
        link = LinkMap.load(path.with_suffix(".link.json"))
        reports.append(verify_linked(path, masks, link, progress))
    reports += [verify_packed(folder, masks) for folder in packed_models(run)]
    run.write_json(
        "verify.json",
        {"reports": [report.to_json() for report in reports], "not_checked": not_checked(run)},
    )
    return reports


def not_checked(run: RunDir) -> list[dict[str, str]]:
    """Return steps of the chain that were not taken; a run with engines has its evidence in
    `engines.json`."""
    engines = [] if (run / "engines.json").is_file() else list(NOT_CHECKED)
    return [*engines, *_in_no_graph(run)]


def _in_no_graph(run: RunDir) -> list[dict[str, str]]:
    """Return the pruned weights of a vision-language model that were not exported, by precision."""
    rows = []
    for precision in sorted({path.parent for path in run.graphs()}):
        links = [LinkMap.load(path) for path in sorted(precision.glob("*.link.json"))]
        linked = {row.parameter for link in links for row in link.rows}
        left = {name for link in links for name in link.elsewhere} - linked
        if left:
            why = f"{len(left)} weights that only pictures reach are in no {precision.name} graph"
            rows.append({"place": "onnx", "why": why})
    return rows


def verify_any(
    target: Path | None = None,
    pattern: str = "2:4",
    expect: Sequence[str] = (),
    progress: Progress = silent,
) -> tuple[list[VerifyReport], list[dict[str, str]]]:
    """Check a run, or what came from elsewhere: a checkpoint, an ONNX or GGUF file, or a folder of
    these; returns reports and what was not checked.

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
    reports = []
    for path in _artefacts(target):
        check = verify_onnx if path.suffix.lower() == ".onnx" else verify_checkpoint
        reports.append(check(path, pattern=wanted, expect=expect, progress=progress))
    return _expected_once(reports), []


def _artefacts(target: Path) -> list[Path]:
    """Return what is to be verified: a file, or the checkpoint and the models in a folder."""
    try:
        files = sorted(target.iterdir()) if target.is_dir() else []
    except OSError as error:
        raise from_os_error(error) from error
    models = [file for file in files if file.suffix.lower() in (".onnx", ".gguf")]
    weights = any(file.suffix.lower() == ".safetensors" for file in files)
    return [target, *models] if weights or not models else models


def _expected_once(reports: list[VerifyReport]) -> list[VerifyReport]:
    """Return the reports, where a name that was expected is missed only if none of them has it."""
    first, *others = reports
    missed = set(first.problems).intersection(*(report.problems for report in others))
    return [
        replace(
            report,
            problems=tuple(
                problem
                for problem in report.problems
                if problem in missed or not problem.startswith(NOTHING_CALLED)
            ),
        )
        for report in reports
    ]
