"""Show what would be pruned in a model, and predict what pruning it would take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nmsparse_deploy import models
from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.find.cost import Rates, estimate
from nmsparse_deploy.find.offload import load_fitting
from nmsparse_deploy.find.plan.make_plan import Plan, make_plan
from nmsparse_deploy.models.discovery import discover, trace_inputs
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.pattern import parse_pattern
from nmsparse_deploy.recipe import DEFAULT_MODEL, Prune, Recipe
from nmsparse_deploy.system import hardware
from nmsparse_deploy.system.progress import Progress, silent


def inspect(model: str = DEFAULT_MODEL, pattern: str = "2:4", include: Sequence[str] = (), exclude: Sequence[str] = (),
            progress: Progress = silent) -> Plan:
    """What would be pruned, and why the rest stays dense."""
    progress(f"loading {model}", 0, 0)
    loaded = load_fitting(model)
    found = loaded.discover()
    return make_plan(found, parse_pattern(pattern), include, exclude)


def predict_cost(model: str = DEFAULT_MODEL, spec: Prune = Prune(),  # noqa: B008
                 progress: Progress = silent) -> dict[str, Any]:
    """What pruning would take on this machine, predicted from shapes and the speed of one matrix product."""
    progress(f"loading {model}", 0, 0)
    return _cost(load_fitting(model), spec)


def price(recipe: Recipe, progress: Progress = silent) -> dict[str, Any]:
    """What the prune stage of a recipe would take, from shapes alone: no weight is read, nothing is downloaded.

    Holds `not_priced` with the reason when neither the recipe, this machine nor timm says what the model looks like.
    Raises `UsageError` when the recipe does not fit the model.
    """
    progress(f"shapes of {recipe.model}", 0, 0)
    try:
        loaded = models.shapes(recipe.model, recipe.config)
    except NmsparseError as error:
        return {"not_priced": error.message}
    return _cost(loaded, recipe.prune)


def _cost(loaded: LoadedModel, spec: Prune) -> dict[str, Any]:
    inputs = loaded.sample_inputs()
    found = discover(loaded.module, inputs, loaded.weights)
    plan = make_plan(found, parse_pattern(spec.pattern), spec.include, spec.exclude, spec.patterns)
    if loaded.family == "vision":  # an image has as many tokens as the model makes of it
        reads = trace_inputs(loaded.module, found.blocks, inputs)
        tokens = max(reads[row.target.name].rows for row in plan.rows) // len(next(iter(inputs.values())))
        spec = spec.model_copy(update={"calibration": spec.calibration.model_copy(update={"length": tokens})})
    device = hardware.device()
    compute = hardware.compute_dtype(spec.compute, device)
    return estimate(loaded, plan, spec.settled(gpu=device.type == "cuda"), Rates.measure(compute)).to_json()
