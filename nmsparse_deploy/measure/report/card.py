"""The model card: `README.md` beside the pruned weights, with the metadata that a model hub reads
at its top."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import yaml
from markupsafe import Markup

from nmsparse_deploy.measure.report.compliance import held, unchecked
from nmsparse_deploy.measure.report.data import Report, collect
from nmsparse_deploy.measure.report.quality import accuracy, results
from nmsparse_deploy.measure.report.views import render_markdown
from nmsparse_deploy.models import adapter_for, hub_name
from nmsparse_deploy.models.loaded import HubCard
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.runs.section import Fold, Section

NAME = "model/README.md"


def write_card(run: RunDir) -> Path:
    """Write the card of everything the run holds so far. Raises `UsageError` when nothing is pruned
    yet."""
    text = model_card(run)
    with run.replacing(NAME) as file:
        file.write_text(text, encoding="utf-8")
    return run / NAME


def model_card(run: RunDir) -> str:
    """Return Markdown under YAML front matter: base model, library, job, results."""
    report = collect(run)
    card = adapter_for(str(run / "model")).hub_card(run / "model")
    base = hub_name(report.model.source)
    # A path says nothing to a reader elsewhere, and may say something about the writer.
    prune = {key: value for key, value in report.provenance.recipe.items() if key != "model"}
    recipe = yaml.safe_dump(
        {"model": base or report.model.name, "prune": prune},
        sort_keys=False,
        allow_unicode=True,
        width=100,
    )
    measured = (
        accuracy(None) if report.quality is None else Section("Results", results(report.quality))
    )
    return render_markdown(
        "card.md.j2",
        report=report,
        base=base,
        front=Markup(_front(report, card, base)),
        link=Markup(f"https://huggingface.co/{base}"),
        usage=card.usage,
        recipe=recipe,
        sections=(measured, _unfolded(held(report.compliance)), unchecked(report.not_checked)),
    )


def _unfolded(section: Section) -> Section:
    return replace(
        section, blocks=tuple(block for block in section.blocks if not isinstance(block, Fold))
    )


def _front(report: Report, card: HubCard, base: str | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type=card.task or "other",
            dataset_type=str(row.protocol.get("data", "unknown")),
            dataset_name=str(row.protocol.get("data", "unknown")),
            metric_type=row.metric,
            metric_value=row.value,
        )
        for row in (report.quality.rows if report.quality else ())
        if row.label == "pruned" and math.isfinite(row.value)
    ]
    tags = ["nmsparse-deploy", "pruned", "sparse", *report.pruning.pattern.split(", ")]
    data = ModelCardData(
        base_model=base,
        library_name=card.library,
        pipeline_tag=card.task,
        tags=tags,
        model_name=f"{report.model.name}-{report.pruning.pattern}" if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()
