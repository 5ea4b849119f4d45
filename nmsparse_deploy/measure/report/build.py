"""Write the report of everything a run holds: report.json is the source, the HTML page and the
Markdown are views."""

from __future__ import annotations

import json
from pathlib import Path

from nmsparse_deploy.measure.report import views
from nmsparse_deploy.measure.report.data import collect
from nmsparse_deploy.measure.report.verdict import Headline
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.runs.wording import clean


def build_report(run: RunDir) -> Path:
    """Write `report/` into the run and return its HTML page.

    Raises `UsageError` when nothing is pruned yet or a stage file is damaged; the previous report
    then stays.
    """
    report = collect(run)
    text = json.dumps(clean(report.to_json()), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    page = views.report_page(report)
    files = {"report.json": text, "report.md": views.markdown(page), "index.html": views.html(page)}
    with run.lock(), run.replacing("report") as folder:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")
    return run / "report/index.html"


def summary(run: RunDir) -> Headline:
    """Return the report's headline, with `lines` for the terminal. Raises like `build_report`."""
    return collect(run).headline
