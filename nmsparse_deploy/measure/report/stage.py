"""The report stage: write the pages of a run, or publish it to a model hub."""

from __future__ import annotations

from pathlib import Path

from nmsparse_deploy.errors import CheckFailed
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.ship.verify_run import verify
from nmsparse_deploy.system.progress import Progress, silent


def report(run: RunDir) -> Path:
    """Write the report and the model card of everything the run holds so far; returns the HTML
    page."""
    from nmsparse_deploy.measure.report.build import build_report
    from nmsparse_deploy.measure.report.card import write_card

    page = build_report(run)
    write_card(run)
    return page


def publish(run: RunDir, repo: str, private: bool = False, progress: Progress = silent) -> str:
    """Verify the run once more, and publish weights, card and masks to a model hub; returns the
    address.

    Raises `CheckFailed` when a tensor does not hold the pattern, `NmsparseError` when the hub
    cannot be written to.
    """
    from nmsparse_deploy.measure.report.hub import push, require_token

    require_token(repo)
    bad = [report for report in verify(run, progress) if not report.ok]
    if bad:
        raise CheckFailed(f"The run fails verification and is not published: {bad[0].summary()}")
    return push(run, repo, private, progress)
