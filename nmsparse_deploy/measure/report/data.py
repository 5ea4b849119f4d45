"""Everything that the report says, as one JSON-able dict; the pages are views of it."""

from __future__ import annotations

from typing import Any

from nmsparse_deploy.measure.report import artefacts, compliance, provenance, quality
from nmsparse_deploy.measure.report.engines import engines
from nmsparse_deploy.measure.report.layers import layers
from nmsparse_deploy.measure.report.packed import gpu_arms, packed
from nmsparse_deploy.measure.report.stages import Stages
from nmsparse_deploy.measure.report.verdict import headline
from nmsparse_deploy.models import short_name
from nmsparse_deploy.pattern import TWO_FOUR, parse_pattern
from nmsparse_deploy.runs.wording import clean

FORMAT = "nmsparse-report-1"


def collect(stages: Stages) -> dict[str, Any]:
    """The report without its mask pictures. Raises `UsageError` for a damaged stage file."""
    with stages.of("manifest.json"):
        recipe = stages.manifest["recipe"]
        model = {"source": str(recipe["model"]), "name": str(clean(short_name(recipe["model"])))}
    measured, timed, sizes = quality.quality(stages), artefacts.latency(stages), artefacts.sizes(stages)
    exported, found = artefacts.graphs(stages), layers(stages)
    report: dict[str, Any] = {
        "format": FORMAT, "model": model, "pruning": _pruning(stages, recipe), "quality": measured,
        "continuations": quality.continuations(stages), "images": quality.images(stages),
        "compliance": compliance.compliance(stages),
        "not_checked": compliance.not_checked(stages), "sizes": sizes, "graphs": exported,
        "engines": engines(stages), "packed": packed(stages), "gpu_arms": gpu_arms(stages), "layers": found,
        "latency": timed, "overview": artefacts.overview(measured, exported, timed, sizes["model_bytes"]),
        "provenance": provenance.provenance(stages), "skipped": provenance.skipped(stages)}
    with stages.of("verify.json"):
        return {"headline": headline(report), **report}


def _pruning(stages: Stages, recipe: dict[str, Any]) -> dict[str, Any]:
    with stages.of("layers.json"):
        values = sum(_size(row["shape"]) for row in stages.layers)
        held = sorted({str(row["pattern"]) for row in stages.layers})
        blocks = len({row["block"] for row in stages.layers})
    with stages.of("manifest.json"):
        patterns = held or [str(recipe["pattern"])]
        return {"method": _method(recipe), "pattern": ", ".join(patterns), "layers": len(stages.layers),
                "sparse_kernels": all(parse_pattern(text).implies(TWO_FOUR) for text in patterns),
                "blocks": blocks, "weights": values, "finished": "prune" in stages.manifest["stages"]}


def _method(recipe: dict[str, Any]) -> str:
    """The method with everything that the recipe has around it, in the order in which it happens."""
    bits = [f"{recipe['wbits']} bits"] if recipe.get("wbits") else []
    before = ["permuted channels"] if recipe.get("permute") else []
    after = [str(step["name"]) for step in recipe.get("refine") or []]
    return " + ".join([*before, str(recipe["method"]), *bits, *after])


def _size(shape: list[int]) -> int:
    size = 1
    for length in shape:
        size *= int(length)
    return size
