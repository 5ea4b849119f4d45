"""The model card: `README.md` beside the pruned weights, with the metadata that a model hub reads at its top."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from nmsparse_deploy.measure.report.data import collect
from nmsparse_deploy.measure.report.stages import Stages
from nmsparse_deploy.measure.report.verdict import comparison_text
from nmsparse_deploy.measure.report.views import page
from nmsparse_deploy.models import hub_name
from nmsparse_deploy.runs.run_dir import RunDir

NAME = "model/README.md"
TASKS = {"ForCausalLM": "text-generation", "LMHeadModel": "text-generation", "ForMaskedLM": "fill-mask",
         "ForImageClassification": "image-classification", "ForSequenceClassification": "text-classification",
         "ForTokenClassification": "token-classification"}
"""How an architecture's name ends -> what a hub calls its job; for others the hub is told nothing."""


def write_card(run: RunDir) -> Path:
    """Write the card of everything the run holds so far. Raises `UsageError` when nothing is pruned yet."""
    text = model_card(run)
    with run.replacing(NAME) as file:
        file.write_text(text, encoding="utf-8")
    return run / NAME


def model_card(run: RunDir) -> str:
    """Markdown under YAML front matter: base model, library, job, results."""
    report = collect(Stages.read(run))
    config = run.read_json("model/config.json") if (run / "model/config.json").is_file() else {}
    base = hub_name(report["model"]["source"])
    origin = report["provenance"]
    # A path says nothing to a reader elsewhere, and may say something about the writer.
    recipe = {"model": base or report["model"]["name"],
              "prune": {key: value for key, value in origin["recipe"].items() if key != "model"}}
    compared = comparison_text((report["quality"] or {}).get("comparison"))
    return page("card.md.j2", report=report, base=base, front=Markup(_front(report, config, base)), compared=compared,
                link=Markup(f"https://huggingface.co/{base}"),
                usage=_usage(config), recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100))


def _front(report: dict[str, Any], config: dict[str, Any], base: str | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    task = _task(config)
    results = [EvalResult(task_type=task or "other", dataset_type=str(row["protocol"].get("data", "unknown")),
                          dataset_name=str(row["protocol"].get("data", "unknown")), metric_type=row["metric"],
                          metric_value=row["value"])
               for row in (report["quality"] or {"rows": []})["rows"]
               if row["label"] == "pruned" and isinstance(row["value"], float) and math.isfinite(row["value"])]
    tags = ["nmsparse-deploy", "pruned", "sparse", *report["pruning"]["pattern"].split(", ")]
    data = ModelCardData(base_model=base, library_name=_library(config), pipeline_tag=task, tags=tags,
                         model_name=f"{report['model']['name']}-{report['pruning']['pattern']}" if results else None,
                         eval_results=results or None)
    return data.to_yaml()


def _library(config: dict[str, Any]) -> str:
    return "timm" if "architecture" in config and "model_type" not in config else "transformers"


def _task(config: dict[str, Any]) -> str | None:
    if _library(config) == "timm":
        return "image-classification" if config.get("num_classes") else "image-feature-extraction"
    names = config.get("architectures") or [""]
    return next((task for end, task in TASKS.items() if names[0].endswith(end)), None)


def _usage(config: dict[str, Any]) -> str:
    """Code that loads the folder, as its own library does it."""
    if _library(config) == "timm":
        return "import timm\nmodel = timm.create_model(\"local-dir:FOLDER\", pretrained=True)"
    name = (config.get("architectures") or ["AutoModel"])[0]
    return f"from transformers import {name}\nmodel = {name}.from_pretrained(\"FOLDER\")"
