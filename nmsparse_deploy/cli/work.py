"""Verbs for whole jobs and their reports, and about this tool and machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nmsparse_deploy.cli.app import DEMO, Force, Out, Run, app, output
from nmsparse_deploy.errors import CheckFailed


@app.command()
def report(run: Run = None,
           push_to_hub: Annotated[str | None, typer.Option(
               help="OWNER/NAME: then publish weights, model card and masks there")] = None,
           private: Annotated[bool, typer.Option("--private", help="with --push-to-hub")] = False) -> None:
    """Write the report (HTML, Markdown, JSON) and the model card of everything a run holds."""
    from nmsparse_deploy.measure.report.stage import publish
    from nmsparse_deploy.measure.report.stage import report as api
    from nmsparse_deploy.runs.run_dir import RunDir

    opened = RunDir.open(run)
    page = api(opened)
    data = {"html": str(page), "markdown": str(page.with_name("report.md")),
            "json": str(page.with_name("report.json")), "card": str(opened / "model/README.md")}
    if push_to_hub is None:
        output.result(data, [str(page)])
        return
    address = publish(opened, push_to_hub, private, output.progress)
    output.result({**data, "published": address}, [str(page), address])


@app.command()
def compare(recipes: Annotated[list[str], typer.Argument(
                help="recipe files, or METHOD or METHOD+REFINEMENT; the first is the reference")],
            model: Annotated[str, typer.Option(help="hub name, folder or .gguf file")] = DEMO,
            data: Annotated[str, typer.Option(help="held-out text or images; auto suits the model")] = "auto",
            tokens: Annotated[int, typer.Option(help="tokens to score (language models)")] = 16384,
            context: Annotated[int, typer.Option(help="tokens per window (language models)")] = 1024,
            out: Annotated[Path | None, typer.Option(help="where the runs go [default: runs/compare]")] = None) -> None:
    """Prune one model by several recipes and put accuracy beside cost; finished runs are kept."""
    from nmsparse_deploy.comparison import compare as api
    from nmsparse_deploy.comparison import load
    from nmsparse_deploy.recipe import Evaluate, validate

    spec = validate(Evaluate, {"data": data, "tokens": tokens, "context": context, "continuation": 0})
    result = api(load(recipes), model, spec, out, output.progress)
    dense = result["dense"]
    rows = [("dense", f"{dense['value']:.4g} ± {dense['standard_error']:.2g}", "", "", "")]
    rows += [(row["recipe"], f"{row['value']:.4g} ± {row['standard_error']:.2g}",
              f"{row['gap_closed']:.0%}" if number else "reference", f"{row['seconds']:.0f} s",
              f"{row['peak_memory_mb']:,} MB") for number, row in enumerate(result["rows"])]
    output.table(result, ("recipe", dense["metric"], "gap to dense closed", "prune time", "peak memory"), rows,
                 [result["page"]])


@app.command()
def run(recipe: Annotated[Path, typer.Argument(help="YAML file, see recipes/")], out: Out = None,
        force: Force = False,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="validate and price it, and stop")] = False) -> None:
    """Run every stage of a recipe."""
    from nmsparse_deploy.recipe import Recipe

    loaded = Recipe.load(recipe)
    if dry_run:
        _show_price(loaded, recipe)
        return
    from nmsparse_deploy.pipeline import run_recipe

    _finish_run(run_recipe(loaded, out, force, output.progress))


@app.command()
def demo(model: Annotated[str, typer.Option(help="demo (a language model) or vit (a vision transformer)")] = DEMO,
         out: Annotated[Path | None, typer.Option(help="run folder [default: runs/demo or runs/demo-MODEL]")] = None,
         force: Force = False) -> None:
    """Prune a packaged model to 2:4, prove it, export it, compare it with its dense twin, and report."""
    from nmsparse_deploy.pipeline import run_recipe
    from nmsparse_deploy.recipe import CLOSED_FORM, Recipe

    folder = out or Path("runs") / (DEMO if model == DEMO else f"{DEMO}-{model}")
    _finish_run(run_recipe(Recipe(model=model, prune=CLOSED_FORM), folder, force, output.progress))
    output.message("Small models suffer most from 2:4; larger ones lose far less. "
                   "docs/methods.md says what else there is.")


@app.command()
def doctor() -> None:
    """What this machine can do, what is missing, what clashes, and what to type next."""
    from nmsparse_deploy.system.doctor import examine, next_command

    findings = examine()
    marks = {"ok": "ok", "missing": "-", "problem": "PROBLEM"}
    output.table({"findings": [f.to_json() for f in findings], "next": next_command(findings)},
                 ("", "", "found", "to change it"), [(marks[f.state], f.subject, f.found, f.hint) for f in findings],
                 [f"next: {next_command(findings)}"])
    if any(f.state == "problem" for f in findings):
        raise CheckFailed("Something needs attention first.", next_command(findings))


@app.command(name="list")
def list_() -> None:
    """The methods that can find a mask, the refinements that can follow, and where they come from."""
    from nmsparse_deploy.registry import LEARNERS, METHODS, REFINEMENTS

    methods = {name: METHODS.load(name) for name in METHODS.names()}
    learned = {name: LEARNERS.load(name) for name in LEARNERS.names()}
    refinements = {name: REFINEMENTS.load(name) for name in REFINEMENTS.names()}
    data = {"methods": [{"name": n, "needs": m.needs, "updates_weights": m.updates_weights, "unstructured": m.scope,
                         "summary": m.summary, "source": m.source} for n, m in methods.items()],
            "learned": [{"name": n, "updates_weights": m.updates_weights, "summary": m.summary, "source": m.source}
                        for n, m in learned.items()],
            "refinements": [{"name": n, "needs": r.needs, "changes": r.changes, "summary": r.summary,
                             "source": r.source} for n, r in refinements.items()]}
    rows = [(f"--method {n}", m.summary, "updated" if m.updates_weights else "kept", m.needs, m.source)
            for n, m in methods.items()]
    rows += [(f"--method {n}", m.summary, "updated" if m.updates_weights else "kept", "learned", m.source)
             for n, m in learned.items()]
    rows += [(f"--refine {n}", r.summary, "kept" if r.changes == "mask" else "updated", r.needs, r.source)
             for n, r in refinements.items()]
    output.table(data, ("option", "what it does", "weights", "data", "source"), rows)


def _show_price(recipe: Any, path: Path) -> None:
    """What pruning would take; a recipe of a model that nothing is known of is still a valid one."""
    from nmsparse_deploy.find.inspect import price

    cost = price(recipe, output.progress)
    lines = [f"{path} is valid."]
    if "not_priced" in cost:
        lines.append(f"not priced: {cost['not_priced']}")
    else:
        hours = f"{cost['seconds'] / 3600:,.1f} h" if cost["seconds"] > 7200 else f"{cost['seconds']:,.0f} s"
        lines.append(f"predicted for pruning on this machine: {hours}, {cost['memory_mb'] / 1e3:,.1f} GB of memory, "
                     f"{cost['disk_mb'] / 1e3:,.1f} GB of disk")
    output.result({**recipe.model_dump(mode="json"), "cost": cost}, lines)


def _finish_run(run: Any) -> None:
    from nmsparse_deploy.measure.report.build import summary
    from nmsparse_deploy.system import distributed

    if not distributed.current().first:  # this process has only helped another one to prune
        return

    facts = summary(run)
    output.result({"run": str(run.path), **facts.to_json()}, [*facts.lines, f"report: {run / 'report/index.html'}"])
