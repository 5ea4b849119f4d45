"""Write the report of everything a run holds: report.json is the source, the HTML page and the Markdown are views."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nmsparse_deploy.measure.report import views
from nmsparse_deploy.measure.report.data import collect
from nmsparse_deploy.measure.report.layers import masks
from nmsparse_deploy.measure.report.stages import Stages
from nmsparse_deploy.runs.run_dir import RunDir


def build_report(run: RunDir) -> Path:
    """Write `report/` into the run and return its HTML page.

    Raises `UsageError` when nothing is pruned yet or a stage file is damaged; the previous report then stays.
    """
    report = {**collect(Stages.read(run)), "masks": masks(run)}
    pages = {"report.json": json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
             "report.md": views.markdown(report), "index.html": views.html(report)}
    with run.lock(), run.replacing("report") as folder:
        folder.mkdir()
        for name, text in pages.items():
            (folder / name).write_text(text, encoding="utf-8")
    return run / "report/index.html"


def summary(run: RunDir) -> dict[str, Any]:
    """The report's headline, JSON-able, with `lines` for the terminal. Raises like `build_report`."""
    return collect(Stages.read(run))["headline"]
