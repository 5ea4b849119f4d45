"""`nmsparse-deploy run`."""

from pathlib import Path

import nmsparse_deploy as nms
from nmsparse_deploy.cli.app import output, verb


@verb(recipe="YAML file, see recipes/", dry_run="validate and price it, and stop")
def run(
    recipe: Path, *, out: Path | None = None, force: bool = False, dry_run: bool = False
) -> None:
    """Run every stage of a recipe."""
    loaded = nms.Recipe.load(recipe)
    if not dry_run:
        show_run(nms.run_recipe(loaded, out, force, output.progress))
        return
    from nmsparse_deploy.find.inspect import NotPriced, price

    cost = price(loaded, output.progress)
    if isinstance(
        cost, NotPriced
    ):  # a recipe of a model that nothing is known of is still a valid one
        line = f"not priced: {cost.not_priced}"
    else:
        time = f"{cost.seconds / 3600:,.1f} h" if cost.seconds > 7200 else f"{cost.seconds:,.0f} s"
        line = (
            f"predicted for pruning on this machine: {time}, {cost.memory_mb / 1e3:,.1f} GB of memory, "
            f"{cost.disk_mb / 1e3:,.1f} GB of disk"
        )
    output.result(
        {**loaded.model_dump(mode="json"), "cost": cost.to_json()}, [f"{recipe} is valid.", line]
    )


def show_run(run: "nms.RunDir") -> None:
    """Say what a run holds, once: other processes have only helped the first one to prune."""
    from nmsparse_deploy.measure.report.build import summary
    from nmsparse_deploy.system import distributed

    if distributed.current().first:
        facts = summary(run)
        output.result(
            {"run": str(run.path), **facts.to_json()},
            [*facts.lines, f"report: {run / 'report/index.html'}"],
        )
