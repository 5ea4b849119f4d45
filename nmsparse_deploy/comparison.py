"""Run several recipes on one model and put accuracy beside cost.

Every recipe sees the same calibration sample (drawn by its seed, and checked to be the same), and all models are scored
on the same held-out samples, so differences are paired. Statistics of a block depend on how the blocks before it were
pruned, so they cannot be shared between recipes without changing them; within a recipe every Gram is computed once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.measure.evaluate.result import bootstrap_interval
from nmsparse_deploy.measure.evaluate.stage import evaluate
from nmsparse_deploy.recipe import DEFAULT_MODEL, Evaluate, Prune, Recipe, validate
from nmsparse_deploy.registry import check_method
from nmsparse_deploy.runs.run_dir import RUNS, RunDir
from nmsparse_deploy.system.environment import environment, now
from nmsparse_deploy.system.progress import Progress, silent


def load(names: Sequence[str]) -> dict[str, Prune]:
    """Turn recipe files (by their stem) or method names with `+refinement` parts (`wanda+refit`) into prune sections.

    Raises `UsageError` for a name that is neither, and for two recipes of one name.
    """
    found: dict[str, Prune] = {}
    for name in names:
        path = Path(name)
        if path.suffix in (".yaml", ".yml"):
            key, spec = path.stem, Recipe.load(path).prune
        else:
            method, *steps = name.split("+")
            check_method(method)
            key, spec = name, validate(Prune, {"method": method, "refine": [{"name": step} for step in steps]})
        if key in found:
            raise UsageError(f"Two recipes are called '{key}'; rename one of the files.")
        found[key] = spec
    if len(found) < 2:
        raise UsageError("Comparing takes two recipes or more.", "nmsparse-deploy compare sparsegpt group-obs+refit")
    return found


def compare(recipes: dict[str, Prune], model: str = DEFAULT_MODEL, spec: Evaluate = Evaluate(),  # noqa: B008
            out: Path | None = None, progress: Progress = silent) -> dict[str, Any]:
    """Prune with every recipe, score all of them, and write `compare.json`, `.md` and `.html` into `out`.

    Finished runs in `out` are kept, so a stopped comparison goes on where it was. The first recipe is the reference.
    """
    folder = out or RUNS / "compare"
    rows: list[dict[str, Any]] = []
    dense: dict[str, Any] = {}
    samples: dict[str, str] = {}
    for number, (name, prune_spec) in enumerate(recipes.items()):
        progress(f"recipe {number + 1} of {len(recipes)}: {name}", number, len(recipes))
        run = prune(model, prune_spec, folder / name, progress=progress)
        manifest = run.manifest()
        if manifest.spec("evaluate") != spec.model_dump(mode="json"):
            evaluate(run, spec, progress)
        measured = run.read_json("evaluate.json")
        dense, pruned = (_headline(measured["results"][label]) for label in ("dense", "pruned"))
        record = manifest.stages["prune"]
        if record.calibration:
            samples[name] = str(record.calibration["fingerprint"])
        rows.append({"recipe": name, "spec": prune_spec.model_dump(mode="json"), "run": str(run.path),
                     "seconds": record.seconds, "peak_memory_mb": record.peak_memory_mb, **pruned})
    for row in rows:
        row |= _against(row, rows[0], dense)
    result = {"model": model, "date": now(), "evaluate": spec.model_dump(mode="json"), "dense": dense, "rows": rows,
              "same_calibration": len(set(samples.values())) <= 1, "page": str(folder / "compare.html"),
              **environment()}
    _write(folder, result)
    return result


def _headline(found: dict[str, Any] | list[dict[str, Any]]) -> dict[str, Any]:
    """Return the first metric of a model's results: perplexity, accuracy or similarity."""
    row = found[0] if isinstance(found, list) else found
    return {key: row[key] for key in ("metric", "value", "standard_error", "samples", "per_sample")}


def _against(row: dict[str, Any], reference: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """Return the share of the reference's gap to dense that a recipe closes, and for a mean a paired interval."""
    gap = _loss(reference) - _loss(dense)
    share = (_loss(reference) - _loss(row)) / gap if gap else 0.0
    pairs = [b - a for a, b in zip(reference["per_sample"], row["per_sample"])]
    if not pairs:
        return {"gap_closed": share}
    low, high = bootstrap_interval(torch.tensor(pairs, dtype=torch.float64))
    return {"gap_closed": share, "difference": {"mean": sum(pairs) / len(pairs), "low": low, "high": high}}


def _loss(row: dict[str, Any]) -> float:
    """Return a figure that is better when smaller: log-perplexity, or minus a score."""
    return math.log(row["value"]) if "ppl" in row["metric"] else -float(row["value"])


def _write(folder: Path, result: dict[str, Any]) -> None:
    from nmsparse_deploy.measure.report.compare import compare_page
    from nmsparse_deploy.measure.report.views import html, markdown

    page = compare_page(result)
    home = RunDir(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {"compare.json": json.dumps(result, indent=1) + "\n", "compare.md": markdown(page),
                       "compare.html": html(page)}.items():
        with home.replacing(name) as file:
            file.write_text(text, encoding="utf-8")
