"""`nmsparse-deploy demo`."""

from pathlib import Path

from nmsparse_deploy.cli.app import DEMO, output, verb
from nmsparse_deploy.cli.run import show_run


@verb(model="demo (a language model) or vit (a vision transformer)",
      out="run folder [default: runs/demo or runs/demo-MODEL]")
def demo(*, model: str = DEMO, out: Path | None = None, force: bool = False) -> None:
    """Prune a packaged model to 2:4, prove it, export it, compare it with its dense twin, and report."""
    from nmsparse_deploy.pipeline import run_recipe
    from nmsparse_deploy.recipe import CLOSED_FORM, Recipe

    folder = out or Path("runs") / (DEMO if model == DEMO else f"{DEMO}-{model}")
    show_run(run_recipe(Recipe(model=model, prune=CLOSED_FORM), folder, force, output.progress))
    output.message("Small models suffer most from 2:4; larger ones lose far less. "
                   "docs/methods.md says what else there is.")
