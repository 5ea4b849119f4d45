"""Show what would be pruned in a model, and predict what pruning it would take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from nmsparse_deploy import models
from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.find.cost import Cost, Rates, estimate
from nmsparse_deploy.find.facts import Json
from nmsparse_deploy.find.offload import load_fitting
from nmsparse_deploy.find.plan.make_plan import Plan, make_plan
from nmsparse_deploy.models.discovery import discover, trace_inputs
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.pattern import parse_pattern
from nmsparse_deploy.recipe import DEFAULT_MODEL, Prune, Recipe
from nmsparse_deploy.system import hardware
from nmsparse_deploy.system.progress import Progress, silent


def inspect(
    model: str = DEFAULT_MODEL,
    pattern: str = "2:4",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Progress = silent,
) -> Plan:
    """Plan what would be pruned, and say why the rest stays dense."""
    progress(f"loading {model}", 0, 0)
    return make_plan(load_fitting(model).discover(), parse_pattern(pattern), include, exclude)


def predict_cost(
    model: str = DEFAULT_MODEL, spec: Prune = Prune(), progress: Progress = silent
) -> Cost:
    """Predict what pruning would take on this machine, from shapes and the speed of one matrix
    product."""
    progress(f"loading {model}", 0, 0)
    return _cost(load_fitting(model), spec)


@dataclass(frozen=True)
class NotPriced:
    """The reason why a recipe has no price: neither it, this machine nor timm says what the model
    looks like."""

    not_priced: str

    def to_json(self) -> Json:
        return asdict(self)


def price(recipe: Recipe, progress: Progress = silent) -> Cost | NotPriced:
    """Predict what the prune stage of a recipe would take, from shapes alone: no weight is read,
    nothing is downloaded.

    Raises `UsageError` when the recipe does not fit the model.
    """
    progress(f"shapes of {recipe.model}", 0, 0)
    try:
        loaded = models.shapes(recipe.model, recipe.config)
    except NmsparseError as error:
        return NotPriced(error.message)
    return _cost(loaded, recipe.prune)


def _cost(loaded: LoadedModel, spec: Prune) -> Cost:
    inputs = loaded.trial_inputs()
    discovery = discover(loaded.module, inputs, loaded.weights)
    plan = make_plan(
        discovery, parse_pattern(spec.pattern), spec.include, spec.exclude, spec.patterns
    )
    if loaded.family == "vision":  # an image has as many tokens as the model makes of it
        reads = trace_inputs(loaded.module, discovery.blocks, inputs)
        tokens = max(reads[row.target.name].rows for row in plan.rows) // len(
            next(iter(inputs.values()))
        )
        spec = spec.model_copy(
            update={"calibration": spec.calibration.model_copy(update={"length": tokens})}
        )
    device = hardware.device()
    compute = hardware.compute_dtype(spec.compute, device)
    return estimate(loaded, plan, spec.settled(gpu=device.type == "cuda"), Rates.measure(compute))
