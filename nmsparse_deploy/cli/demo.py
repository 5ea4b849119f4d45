"""`nmsparse-deploy demo`."""

from pathlib import Path

import nmsparse_deploy as nms
from nmsparse_deploy.cli.app import DEMO, output, verb
from nmsparse_deploy.cli.run import show_run

MINUTES = 4.0
"""For pruning; export, evaluation and report take as long again on a slow machine."""


@verb(
    model="demo (a language model) or vit (a vision transformer)",
    out="run folder [default: runs/demo or runs/demo-MODEL]",
    full="the whole calibration sample, two precisions and 16k tokens of evaluation",
)
def demo(
    *, model: str = DEMO, out: Path | None = None, force: bool = False, full: bool = False
) -> None:
    """Prune a packaged model to 2:4, prove it, export it, compare it with its dense twin, and
    report; in a few minutes, with fewer samples where the machine is slow."""
    folder = out or Path("runs") / (DEMO if model == DEMO else f"{DEMO}-{model}")
    recipe = _full(model) if full else _short(model, folder, force)
    show_run(nms.run_recipe(recipe, folder, force, output.progress))
    if recipe != _full(model):
        output.message(
            f"This was the short demo: {recipe.prune.calibration.samples} calibration samples, one "
            "exported precision, 8k tokens of evaluation. `demo --full --force` does it all."
        )
    output.message(
        "Small models suffer most from 2:4; larger ones lose far less. "
        "docs/methods.md says what else there is."
    )


def _full(model: str) -> "nms.Recipe":
    from nmsparse_deploy.recipe import CLOSED_FORM

    return nms.Recipe(model=model, prune=CLOSED_FORM)


def _short(model: str, folder: Path, force: bool) -> "nms.Recipe":
    """Return the recipe with as many samples as fit; of a run that is there already, those that it
    has."""
    from nmsparse_deploy.find.auto import sampled, shorten
    from nmsparse_deploy.recipe import Evaluate, Export

    recipe = _full(model)
    if (folder / "manifest.json").is_file() and not force:
        samples = nms.RunDir(folder).manifest().recipe.calibration.samples
        spec = sampled(recipe.prune, samples)
    else:
        shortened = shorten(model, recipe.prune, MINUTES * 60, output.progress)
        spec = shortened.spec
        output.message(
            f"Predicted for pruning on this machine: {shortened.seconds:.0f} s with "
            f"{spec.calibration.samples} calibration samples ({shortened.whole:.0f} s with all "
            f"{recipe.prune.calibration.samples}); export, evaluation and report come on top."
        )
    return recipe.model_copy(
        update={
            "prune": spec,
            "export": Export(precisions=("fp32",)),
            "evaluate": Evaluate(tokens=8192),
        }
    )
