"""`nmsparse-deploy demo`."""

from pathlib import Path

import nmsparse_deploy as nms
from nmsparse_deploy.cli.app import DEMO, output, verb
from nmsparse_deploy.cli.run import show_run


@verb(
    model="demo (a language model) or vit (a vision transformer)",
    out="run folder [default: runs/demo or runs/demo-MODEL]",
)
def demo(*, model: str = DEMO, out: Path | None = None, force: bool = False) -> None:
    """Prune a packaged model to 2:4, prove it, export it, compare it with its dense twin, and
    report."""
    from nmsparse_deploy.recipe import CLOSED_FORM

    folder = out or Path("runs") / (DEMO if model == DEMO else f"{DEMO}-{model}")
    show_run(
        nms.run_recipe(nms.Recipe(model=model, prune=CLOSED_FORM), folder, force, output.progress)
    )
    output.message(
        "Small models suffer most from 2:4; larger ones lose far less. "
        "docs/methods.md says what else there is."
    )
