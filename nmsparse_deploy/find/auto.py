"""`--method auto`: the best recipe of a ladder that the model allows and the time at hand pays for.

The ladder is ordered by what was measured on the demo model (docs/methods.md). Times are predicted
from shapes and the speed of matrix products on this machine, which small models and small batches
do not reach; `SLACK` covers that.
"""

from __future__ import annotations

from dataclasses import dataclass

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.find.cost import Rates, estimate
from nmsparse_deploy.find.facts import Json
from nmsparse_deploy.find.footprint import footprint
from nmsparse_deploy.find.offload import load_fitting, planned
from nmsparse_deploy.pattern import NMPattern
from nmsparse_deploy.recipe import CLOSED_FORM, Prune, validate
from nmsparse_deploy.system import hardware
from nmsparse_deploy.system.memory import free_memory
from nmsparse_deploy.system.progress import Progress, silent

NAME = "auto"
MINUTES = 10.0
SLACK = 2.0
FEWEST = 8
"""Calibration samples that a recipe is never shortened below."""
CLOSED = CLOSED_FORM.model_dump(include={"method", "refine", "sequential"})
LADDER: dict[str, Json] = {
    "reconstructed, the last block on predictions": {
        **CLOSED,
        "refine": [*CLOSED["refine"], {"name": "reconstruct", "through": 1}],
    },
    "reconstructed": {**CLOSED, "refine": [*CLOSED["refine"], {"name": "reconstruct"}]},
    "closed form": CLOSED,
    "refitted Wanda": {
        "method": "wanda",
        "refine": [{"name": "refit", "blend": 0.0, "residual": 0.0}],
    },
    "Wanda": {"method": "wanda"},
}
"""From the best to the fastest."""


@dataclass(frozen=True)
class AutoRecipe:
    """The recipe that `auto` came to, and one sentence that says why."""

    spec: Prune
    why: str


def choose(
    model: str,
    settings: Json,
    minutes: float = MINUTES,
    progress: Progress = silent,
    max_memory: int | None = None,
) -> AutoRecipe:
    """Choose the first recipe of the ladder that is predicted to fit; `settings` are the other
    fields of the prune section.

    Raises `UsageError` when even the fastest recipe does not fit, or when the settings ask for
    refinements themselves.
    """
    if settings.get("refine"):
        raise UsageError(
            "--method auto chooses the refinements itself.", "leave --refine out, or name a method"
        )
    progress(f"loading {model} to choose a recipe", 0, 0)
    loaded = load_fitting(model, max_memory)
    base = validate(Prune, settings)
    NMPattern.parse(base.pattern)  # the ladder works in groups
    plan = planned(loaded, base)
    device = hardware.device()
    rates = Rates.measure(hardware.compute_dtype(base.compute, device))
    available = max_memory or free_memory()
    rejected: list[tuple[str, float]] = []
    for name, fields in LADDER.items():
        spec = validate(Prune, {**settings, **fields})
        settled = spec.settled(gpu=device.type == "cuda")
        if (
            loaded.streamed
            and settled.whole_model
            and footprint(loaded, plan, settled, rates.dtype).whole > available
        ):
            continue
        predicted = SLACK * estimate(loaded, plan, settled, rates).seconds / 60
        if predicted <= minutes:
            slower = "".join(f"; '{other}' would take {time:.0f} min" for other, time in rejected)
            return AutoRecipe(
                spec, f"auto: '{name}', predicted {predicted:.1f} of the {minutes:g} min{slower}"
            )
        rejected.append((name, predicted))
    raise UsageError(
        f"Even '{name}' is predicted to take {predicted:.0f} min, more than the {minutes:g} allowed.",
        "raise --time-budget, lower --samples, or choose --method magnitude",
    )


@dataclass(frozen=True)
class Shortened:
    """A prune section with fewer calibration samples, and what it and the whole one are predicted
    to take, in seconds."""

    spec: Prune
    seconds: float
    whole: float


def shorten(model: str, spec: Prune, seconds: float, progress: Progress = silent) -> Shortened:
    """Halve the calibration sample of `spec` until pruning `model` is predicted to fit into
    `seconds`, or `FEWEST` samples are left."""
    progress(f"loading {model} to choose a sample", 0, 0)
    loaded = load_fitting(model)
    plan, device = planned(loaded, spec), hardware.device()
    rates = Rates.measure(hardware.compute_dtype(spec.compute, device))
    settled = spec.settled(gpu=device.type == "cuda")

    def predicted(samples: int) -> float:
        return SLACK * estimate(loaded, plan, sampled(settled, samples), rates).seconds

    samples = spec.calibration.samples
    while predicted(samples) > seconds and samples > FEWEST:
        samples //= 2
    return Shortened(
        sampled(spec, samples), predicted(samples), predicted(spec.calibration.samples)
    )


def sampled(spec: Prune, samples: int) -> Prune:
    """Return `spec` with another number of calibration samples."""
    return spec.model_copy(
        update={"calibration": spec.calibration.model_copy(update={"samples": samples})}
    )
