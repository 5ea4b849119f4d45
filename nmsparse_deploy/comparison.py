"""Run several recipes on one model and put accuracy beside cost.

Every recipe sees the same calibration sample (drawn by its seed, and checked to be the same), and
all models are scored on the same held-out samples, so differences are paired. Statistics of a block
depend on how the blocks before it were pruned, so they cannot be shared between recipes without
changing them; within a recipe every Gram is computed once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.measure.evaluate.result import Evaluation, bootstrap_interval
from nmsparse_deploy.measure.evaluate.stage import evaluate
from nmsparse_deploy.measure.report.compare import (
    ComparedRecipe,
    Comparison,
    PairedMean,
    Score,
    compare_page,
)
from nmsparse_deploy.measure.report.views import html, markdown
from nmsparse_deploy.recipe import DEFAULT_MODEL, Evaluate, Prune, Recipe, validate
from nmsparse_deploy.registry import check_method
from nmsparse_deploy.runs.inputs import is_current
from nmsparse_deploy.runs.run_dir import RUNS, RunDir
from nmsparse_deploy.runs.stage_file import read_stage
from nmsparse_deploy.system.environment import environment, now
from nmsparse_deploy.system.progress import Progress, silent


def load(names: Sequence[str]) -> dict[str, Prune]:
    """Turn recipe files (by their stem) or method names with `+refinement` parts (`wanda+refit`)
    into prune sections.

    Raises `UsageError` for a name that is neither, and for two recipes of one name.
    """
    recipes: dict[str, Prune] = {}
    for name in names:
        path = Path(name)
        if path.suffix in (".yaml", ".yml"):
            key, spec = path.stem, Recipe.load(path).prune
        else:
            method, *steps = name.split("+")
            check_method(method)
            key, spec = (
                name,
                validate(Prune, {"method": method, "refine": [{"name": step} for step in steps]}),
            )
        if key in recipes:
            raise UsageError(f"Two recipes are called '{key}'; rename one of the files.")
        recipes[key] = spec
    if len(recipes) < 2:
        raise UsageError(
            "Comparing takes two recipes or more.",
            "nmsparse-deploy compare sparsegpt group-obs+refit",
        )
    return recipes


def compare(
    recipes: dict[str, Prune],
    model: str = DEFAULT_MODEL,
    spec: Evaluate = Evaluate(),
    out: Path | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Prune with every recipe, score all of them, and write `compare.json`, `.md` and `.html` into
    `out`.

    Finished runs in `out` are kept, so a stopped comparison goes on where it was. The first recipe
    is the reference.
    """
    folder = out or RUNS / "compare"
    rows: list[ComparedRecipe] = []
    samples: set[str] = set()
    for number, (name, prune_spec) in enumerate(recipes.items()):
        progress(f"recipe {number + 1} of {len(recipes)}: {name}", number, len(recipes))
        run = prune(model, prune_spec, folder / name, progress=progress)
        manifest = run.manifest()
        if not is_current(manifest, "evaluate", spec):
            evaluate(run, spec, progress)
        dense, pruned = (_score(run, label) for label in ("dense", "pruned"))
        record = manifest.stages["prune"]
        samples |= {str(record.calibration["fingerprint"])} if record.calibration else set()
        row = ComparedRecipe(
            **vars(pruned),
            recipe=name,
            spec=prune_spec.model_dump(mode="json"),
            run=str(run.path),
            seconds=record.seconds,
            peak_memory_mb=record.peak_memory_mb or 0,
        )
        rows.append(_against(row, rows[0] if rows else row, dense))
    comparison = Comparison(
        model,
        now(),
        spec.model_dump(mode="json"),
        dense,
        tuple(rows),
        len(samples) <= 1,
        str(folder / "compare.html"),
        **environment(),
    )
    _write(folder, comparison)
    return comparison


def _score(run: RunDir, label: str) -> Score:
    """Read the first metric of a model's results."""
    evaluation = read_stage(run, "evaluate.json", Evaluation)
    assert evaluation is not None
    results = evaluation.results[label]
    first = results[0] if isinstance(results, list) else results
    return Score(first.metric, first.value, first.standard_error, first.samples, first.per_sample)


def _against(row: ComparedRecipe, reference: ComparedRecipe, dense: Score) -> ComparedRecipe:
    """Add the share of the reference's gap to dense that a recipe closes, and for a mean a paired
    interval."""
    gap = reference.loss - dense.loss
    share = (reference.loss - row.loss) / gap if gap else 0.0
    pairs = [b - a for a, b in zip(reference.per_sample, row.per_sample)]
    interval = bootstrap_interval(torch.tensor(pairs, dtype=torch.float64)) if pairs else None
    return replace(
        row,
        gap_closed=share,
        difference=PairedMean(sum(pairs) / len(pairs), *interval) if interval else None,
    )


def _write(folder: Path, comparison: Comparison) -> None:
    page = compare_page(comparison)
    home = RunDir(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {
        "compare.json": json.dumps(comparison.to_json(), indent=1) + "\n",
        "compare.md": markdown(page),
        "compare.html": html(page),
    }.items():
        with home.replacing(name) as file:
            file.write_text(text, encoding="utf-8")
