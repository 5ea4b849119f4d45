"""Run every stage of a recipe in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.measure.bench.cpu import bench
from nmsparse_deploy.measure.evaluate.stage import evaluate
from nmsparse_deploy.measure.report.stage import report
from nmsparse_deploy.recipe import Recipe
from nmsparse_deploy.runs.inputs import is_current
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.ship.build import build
from nmsparse_deploy.ship.onnx.stage import export
from nmsparse_deploy.system import distributed
from nmsparse_deploy.system.progress import Progress, silent


def run_recipe(
    recipe: Recipe, out: Path | None = None, force: bool = False, progress: Progress = silent
) -> RunDir:
    """Every stage of a recipe in order; finished stages of the same run are kept. Several processes
    prune together, and the first one does the rest."""
    run = prune(recipe.model, recipe.prune, out, force, progress)
    if not distributed.current().first:  # this process has only helped another one to prune
        return run
    stages: dict[str, tuple[Any, Any]] = {
        "export": (export, recipe.export),
        "evaluate": (evaluate, recipe.evaluate),
        "build": (build, recipe.build),
        "bench": (bench, recipe.bench),
    }
    manifest = run.manifest()
    for name, (stage, spec) in stages.items():
        if spec is not None and not is_current(manifest, name, spec):
            stage(run, spec, progress)
    progress("writing the report", 0, 0)
    report(run)
    return run
