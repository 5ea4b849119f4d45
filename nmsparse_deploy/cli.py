"""The command line. A verb parses, calls the API, and hands the result to `output`; nothing else.

Nothing heavy is imported before a verb runs, so `--help` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import CheckFailed, NmsparseError, UsageError, from_os_error
from .output import Output

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
                  help="Find N:M sparsity masks for pretrained transformers, prove them, and ship them.")
output = Output()

Model = Annotated[str, typer.Argument(help="hub name, folder or .gguf file; left out: the demo model")]
Run = Annotated[Path | None, typer.Argument(help="run folder; left out: the newest under runs/")]
Out = Annotated[Path | None, typer.Option(help="run folder [default: runs/MODEL-METHOD-PATTERN]")]
Force = Annotated[bool, typer.Option("--force", help="start over, even if the run is finished")]
Include = Annotated[list[str], typer.Option(help="glob on parameter names to prune; may be repeated")]
Exclude = Annotated[list[str], typer.Option(help="glob on parameter names to leave dense; may be repeated")]
DEMO = "demo"


def version(show: bool) -> None:
    if show:
        from importlib.metadata import version as installed

        print(f"nmsparse-deploy {installed('nmsparse-deploy')}")
        raise typer.Exit


@app.callback()
def options(as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON on stdout")] = False,
            quiet: Annotated[bool, typer.Option("--quiet", "-q", help="print errors only")] = False,
            show_version: Annotated[bool, typer.Option("--version", callback=version, is_eager=True)] = False) -> None:
    output.as_json, output.quiet = as_json, quiet


@app.command()
def inspect(model: Model = DEMO, pattern: str = "2:4", include: Include = [], exclude: Exclude = [],  # noqa: B006
            cost: Annotated[bool, typer.Option("--cost", help="predict time, memory and disk of a prune")] = False,
            method: Annotated[str, typer.Option(help="with --cost")] = "sparsegpt",
            refine: Annotated[list[str], typer.Option(help="with --cost; may be repeated")] = [],  # noqa: B006
            samples: Annotated[int, typer.Option(help="with --cost")] = 64,
            length: Annotated[int, typer.Option(help="with --cost")] = 512) -> None:
    """Show what would be pruned, in which fusion groups, and why the rest stays dense; or what it would cost."""
    from .pipeline import inspect as api

    _say_default(model)
    if cost:
        _show_cost(model, {"pattern": pattern, "include": include, "exclude": exclude, "method": method,
                           "refine": [{"name": name} for name in refine],
                           "calibration": {"samples": samples, "length": length}})
        return
    plan = api(model, pattern, include, exclude, output.progress)
    rows = [(r.target.name, f"{r.target.k}x{r.target.n}", r.pattern or "dense", r.shape_verdict() or "", r.reason)
            for r in plan.rows]
    rows += [(s.name, "x".join(map(str, s.shape)), "dense", "", s.reason) for s in plan.skipped]
    output.table(plan.to_json(), ("parameter", "K x N", "pattern", "kernel shape", "why"), rows, [plan.summary()])


@app.command()
def plan(model: Model = DEMO,
         max_ppl_increase: Annotated[float | None, typer.Option(
             help="win the most time within this relative rise, for example 0.10")] = None,
         min_speedup: Annotated[float | None, typer.Option(help="lose the least for a model this much faster")] = None,
         budget: Annotated[float | None, typer.Option(
             help="lose the least with this share of the prunable weights pruned")] = None,
         pattern: Annotated[str, typer.Option(help="keep:group")] = "2:4",
         vary_keep: Annotated[bool, typer.Option(
             "--vary-keep", help="choose among keep-1, keep, keep+1, never dense; needs --budget")] = False,
         estimator: Annotated[str, typer.Option(help="direct (try every group) or hutchinson (curvature)")] = "direct",
         method: Annotated[str, typer.Option(help="how a group is pruned for the trial")] = "wanda",
         probes: Annotated[int, typer.Option(help="random vectors of hutchinson")] = 8,
         latency_table: Annotated[Path | None, typer.Option(help="measured GEMM times (JSON), see the guide")] = None,
         gpu: Annotated[str, typer.Option(help="whose roofline predicts times without a table")] = "A100",
         rows: Annotated[int | None, typer.Option(
             help="batch times tokens of a GEMM [default: the table's, or 2048]")] = None,
         data: Annotated[str, typer.Option(help="calibration text or images; auto suits the model")] = "auto",
         samples: Annotated[int, typer.Option(help="calibration windows")] = 16,
         length: Annotated[int, typer.Option(help="tokens per window")] = 256,
         seed: int = 0,
         include: Include = [], exclude: Exclude = [],  # noqa: B006
         out: Annotated[Path | None, typer.Option(help="write the plan here (.yaml or .json) for prune --plan")] = None,
         ) -> None:
    """Decide which fusion groups get the pattern, under exactly one constraint."""
    from .plan_file import check_name, save
    from .planning import plan as api
    from .recipe import Allocate, validate

    spec = validate(Allocate, {
        "max_ppl_increase": max_ppl_increase, "min_speedup": min_speedup, "budget": budget, "pattern": pattern,
        "vary_keep": vary_keep, "estimator": estimator, "method": method, "probes": probes, "gpu": gpu, "rows": rows,
        "latency_table": str(latency_table) if latency_table else None, "include": include, "exclude": exclude,
        "calibration": {"data": data, "samples": samples, "length": length, "seed": seed}})
    if out:
        check_name(out)
    _say_default(model)
    found = api(model, spec, output.progress)
    if out:
        save(found.to_json(), out)
    cells = [(", ".join(found.short_names(d)), f"{d.k}x{d.n}", f"{d.sensitivity:.2g} ± {d.error:.1g}",
              f"{d.saving_us:.1f} ({d.gain:.2%})", d.pattern, d.reason if d.pattern == "dense" else "")
             for d in found.decisions]
    lines = found.summary() + ([f"next: nmsparse-deploy prune {model} --plan {out}"] if out else [])
    output.table(found.to_json(), ("fusion group", "K x N", "sensitivity", "saves, us", "decision", "why dense"), cells,
                 lines)


@app.command()
def prune(model: Model = DEMO,
          method: Annotated[str, typer.Option(help="see `nmsparse-deploy list`; auto: by time budget")] = "sparsegpt",
          refine: Annotated[list[str], typer.Option(
              help="what follows the method, see `nmsparse-deploy list`; may be repeated")] = [],  # noqa: B006
          sequential: Annotated[bool, typer.Option(
              "--sequential", help="statistics of a layer see the pruned ones before it in its block")] = False,
          permute: Annotated[bool, typer.Option(
              "--permute", help="first reorder the channels that are free to move, for better groups")] = False,
          pattern: Annotated[str | None, typer.Option(
              help="keep:group, or unstructured:SHARE_OF_ZEROS [default: 2:4, or the plan's]")] = None,
          plan: Annotated[Path | None, typer.Option(help="what `nmsparse-deploy plan --out` wrote")] = None,
          wbits: Annotated[int | None, typer.Option(help="4 or 8: round kept weights in the same sweep")] = None,
          wgroup: Annotated[int | None, typer.Option(
              help="columns that share a scale, with --wbits; left out: a whole row")] = None,
          steps: Annotated[int | None, typer.Option(
              help="optimiser steps of a learned method [default: 60 per block, 1000 for a whole model]")] = None,
          objective: Annotated[str | None, typer.Option(
              help="of a learned method: block, global, or auto [default: auto, global on a GPU]")] = None,
          data: Annotated[str, typer.Option(help="calibration text or images; auto suits the model")] = "auto",
          samples: Annotated[int, typer.Option(help="calibration windows")] = 64,
          length: Annotated[int, typer.Option(help="tokens per window")] = 512,
          seed: int = 0,
          include: Include = [], exclude: Exclude = [],  # noqa: B006
          time_budget: Annotated[float | None, typer.Option(help="minutes, for --method auto [default: 10]")] = None,
          out: Out = None, force: Force = False) -> None:
    """Find a mask, apply it, verify it, and save the pruned model with its masks."""
    from .prune import prune as api
    from .recipe import Prune, validate

    _say_default(model)
    calibration = {"data": data, "samples": samples, "length": length, "seed": seed}
    settings = {"refine": [{"name": name} for name in refine], "sequential": sequential, "permute": permute,
                **_patterns(pattern, plan), **_learning(steps, objective),
                "wbits": wbits, "wgroup": wgroup, "calibration": calibration, "include": include, "exclude": exclude}
    if method == "auto":
        from .auto import choose

        choice = choose(model, settings, time_budget or 10.0, output.progress)
        output.message(choice.why)
        spec = choice.spec
    elif time_budget is not None:
        raise UsageError("--time-budget belongs to --method auto.")
    else:
        spec = validate(Prune, {"method": method, **settings})
    run = api(model, spec, out, force, output.progress)
    facts = run.manifest()["stages"]["prune"]
    how = "as planned" if plan else f"to {spec.pattern}"
    output.result({"run": str(run.path), **facts},
                  [f"{run.path}: {facts['layers']} layers pruned {how} and verified "
                   f"in {facts['seconds']:.0f} s.", *_learned(facts), f"next: nmsparse-deploy evaluate {run.path}"])


@app.command()
def verify(target: Annotated[Path | None, typer.Argument(
               help="run folder, checkpoint (file or folder) or .onnx; left out: the newest run")] = None,
           pattern: Annotated[str, typer.Option(help="keep:group, for files without a run")] = "2:4",
           expect: Annotated[list[str], typer.Option(
               help="glob on tensors that have to be sparse, for files without a run; may be repeated")] = []) -> None:  # noqa: B006
    """Check every tensor of a run or of any checkpoint or ONNX file. Exit code 1 when one fails."""
    from .pipeline import verify_any

    reports, missing = verify_any(target, pattern, expect, output.progress)
    failures = [failure for report in reports for failure in report.failures()]
    output.result({"ok": not failures, "reports": [r.to_json() for r in reports], "not_checked": missing},
                  [*(r.summary() for r in reports), *_sparse_set(reports),
                   *(f"not checked here: {row['place']} ({row['why']})" for row in missing)])
    if failures:
        raise CheckFailed(f"{len(failures)} checks failed; the first: {failures[0]}")


@app.command()
def export(run: Run = None,
           precision: Annotated[list[str], typer.Option(help="fp32, fp16 or bf16; may be repeated")] = ["fp32", "fp16"],  # noqa: B006
           opset: Annotated[int, typer.Option(help="20 or 23")] = 20) -> None:
    """Export a run to ONNX, verify each graph, and compare it with the model in ONNX Runtime."""
    from .pipeline import export as api
    from .recipe import Export, validate
    from .rundir import RunDir

    opened = RunDir.open(run)
    rows = api(opened, validate(Export, {"precisions": precision, "opset": opset}), output.progress)
    lines = [f"{opened / row['path']}: {sum(row['files'].values()) / 1e6:.0f} MB, {row['links']} weights linked and "
             f"verified; {_agreement(row['agreement'])}" for row in rows]
    output.result({"run": str(opened.path), "files": rows}, [*lines, rows[0]["size_note"]])


@app.command()
def evaluate(run: Run = None,
             data: Annotated[str, typer.Option(help="held-out text or images; auto suits the model")] = "auto",
             tokens: Annotated[int, typer.Option(help="tokens to score (language models)")] = 16384,
             context: Annotated[int, typer.Option(help="tokens per window (language models)")] = 1024,
             continuation: Annotated[int, typer.Option(help="tokens of the sample texts; 0 leaves them out")] = 40,
             images: Annotated[int, typer.Option(help="labelled test images (vision models)")] = 600,
             probe: Annotated[int, typer.Option(help="labelled images that the probes learn from")] = 1500,
             size: Annotated[int, typer.Option(help="pixels per side of the labelled images; 0 = the model's own")] = 0,
             photos: Annotated[str, typer.Option(help="images for agreement and saliency maps")] = "photos-20",
             onnx: Annotated[bool, typer.Option("--onnx", help="also score the exported graphs")] = False) -> None:
    """The dense and the pruned model on the same held-out data: perplexity, accuracy or similarity."""
    from .pipeline import evaluate as api
    from .recipe import Evaluate, validate
    from .rundir import RunDir

    spec = validate(Evaluate, {"data": data, "tokens": tokens, "context": context, "continuation": continuation,
                               "images": images, "probe": probe, "size": size, "photos": photos, "onnx": onnx})
    result = api(RunDir.open(run), spec, output.progress)
    rows = [(label, row["metric"], f"{row['value']:.4g} ± {row['standard_error']:.2g}", row["samples"])
            for label, found in result["results"].items() for row in (found if isinstance(found, list) else [found])]
    share = result.get("ratio")
    lines = [f"pruned / dense: {share['ratio']:.2f} (95 % interval {share['low']:.2f} to {share['high']:.2f}) on the "
             "same samples"] if share else []
    gap = result.get("difference")
    lines += [f"{gap['metric']}, pruned - dense: {gap['difference']:+.3f} (95 % interval {gap['low']:+.3f} to "
              f"{gap['high']:+.3f}) on the same samples"] if gap else []
    output.table(result, ("model", "metric", "value", "samples"), rows, lines)


@app.command()
def bench(run: Run = None, batch: int = 1, length: Annotated[int, typer.Option(help="tokens per sample")] = 128,
          rounds: Annotated[int, typer.Option(help="timed calls per arm")] = 10) -> None:
    """Time the dense and the pruned model side by side on this machine."""
    from .pipeline import bench as api
    from .recipe import Bench, validate
    from .rundir import RunDir

    result = api(RunDir.open(run), validate(Bench, {"batch": batch, "length": length, "rounds": rounds}),
                 output.progress)
    rows = []
    for arm in result.arms:
        speed = result.ratios.get(arm.name)
        none = "1" if arm.name == "dense" else "no dense twin on these kernels"
        shown = f"{speed['speedup']:.2f} ({speed['low']:.2f} to {speed['high']:.2f})" if speed else none
        rows.append((arm.name, arm.kernel, f"{arm.median_ms:.1f}", f"{arm.p10_ms:.1f} to {arm.p90_ms:.1f}", shown))
    bounds = [f"predicted upper bound, {p['gpu']}, {p['rows']} rows: GEMMs {p['gemm_speedup']:.2f}x, model "
              f"{p['model_speedup']:.2f}x ({p['flop_share']:.0%} of FLOPs in pruned GEMMs)" for p in result.predicted]
    output.table(result.to_json(), ("arm", "kernels", "median ms", "p10 to p90", "speed-up over dense"), rows,
                 [result.verdict, *bounds])


@app.command()
def report(run: Run = None) -> None:
    """Write the report (HTML, Markdown, JSON) of everything a run holds."""
    from .pipeline import report as api
    from .rundir import RunDir

    page = api(RunDir.open(run))
    output.result({"html": str(page), "markdown": str(page.with_name("report.md")),
                   "json": str(page.with_name("report.json"))}, [str(page)])


@app.command()
def compare(recipes: Annotated[list[str], typer.Argument(
                help="recipe files, or METHOD or METHOD+REFINEMENT; the first is the reference")],
            model: Annotated[str, typer.Option(help="hub name, folder or .gguf file")] = DEMO,
            data: Annotated[str, typer.Option(help="held-out text or images; auto suits the model")] = "auto",
            tokens: Annotated[int, typer.Option(help="tokens to score (language models)")] = 16384,
            context: Annotated[int, typer.Option(help="tokens per window (language models)")] = 1024,
            out: Annotated[Path | None, typer.Option(help="where the runs go [default: runs/compare]")] = None) -> None:
    """Prune one model by several recipes and put accuracy beside cost; finished runs are kept."""
    from .compare import compare as api
    from .compare import load
    from .recipe import Evaluate, validate

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
        dry_run: Annotated[bool, typer.Option("--dry-run", help="validate the recipe and stop")] = False) -> None:
    """Run every stage of a recipe."""
    from .recipe import Recipe

    loaded = Recipe.load(recipe)
    if dry_run:
        output.result(loaded.model_dump(mode="json"), [f"{recipe} is valid."])
        return
    from .pipeline import run_recipe

    _finish_run(run_recipe(loaded, out, force, output.progress))


@app.command()
def demo(model: Annotated[str, typer.Option(help="demo (a language model) or vit (a vision transformer)")] = DEMO,
         out: Annotated[Path | None, typer.Option(help="run folder [default: runs/demo or runs/demo-MODEL]")] = None,
         force: Force = False) -> None:
    """Prune a packaged model to 2:4, prove it, export it, compare it with its dense twin, and report."""
    from .pipeline import run_recipe
    from .recipe import CLOSED_FORM, Recipe

    folder = out or Path("runs") / (DEMO if model == DEMO else f"{DEMO}-{model}")
    _finish_run(run_recipe(Recipe(model=model, prune=CLOSED_FORM), folder, force, output.progress))
    output.message("Small models suffer most from 2:4; larger ones lose far less. "
                   "docs/methods.md says what else there is.")


@app.command()
def doctor() -> None:
    """What this machine can do, what is missing, what clashes, and what to type next."""
    from .doctor import examine, next_command

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
    from .registry import LEARNERS, METHODS, REFINEMENTS

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


def _show_cost(model: str, settings: dict[str, Any]) -> None:
    from .pipeline import predict_cost
    from .recipe import Prune, validate

    spec = validate(Prune, settings)
    cost = predict_cost(model, spec, output.progress)
    output.table(cost, ("predicted", ""), [(name.replace("_", " "), f"{value:,.0f}") for name, value in cost.items()
                                           if not isinstance(value, str)])


def _patterns(pattern: str | None, plan: Path | None) -> dict[str, Any]:
    """The pattern and the decisions about single parameters."""
    if plan is None:
        return {"pattern": pattern or "2:4"}
    from .plan_file import load

    if pattern is not None:
        raise UsageError("--plan decides the pattern; leave --pattern out.")
    found = load(plan)
    return {"pattern": found.pattern, "patterns": found.patterns}


def _learning(steps: int | None, objective: str | None) -> dict[str, Any]:
    """The section of a learned method, as far as options set it."""
    asked = {name: value for name, value in (("steps", steps), ("objective", objective)) if value is not None}
    return {"learn": asked} if asked else {}


def _learned(facts: dict[str, Any]) -> list[str]:
    """What was learned, if something was."""
    if "learned" not in facts:
        return []
    from .learn import sentence

    return [sentence(facts["learned"])]


def _sparse_set(reports: list[Any]) -> list[str]:
    """What a foreign file turned out to hold; a run's own tensors are known."""
    checks = [check for report in reports for check in report.checks if check.parameter is None and not check.skipped]
    return [f"  {check.tensor}: {check.pattern} along axis {check.axis}, {check.groups:,} groups" for check in checks]


def _finish_run(run: Any) -> None:
    from .report.build import summary

    facts = summary(run)
    output.result({"run": str(run.path), **facts}, [*facts["lines"], f"report: {run / 'report/index.html'}"])


def _say_default(model: str) -> None:
    if model == DEMO:
        output.message("MODEL left out: using the demo model SmolLM2-135M-Instruct.")


def _agreement(row: dict[str, Any]) -> str:
    if "not_checked" in row:
        return f"not run here: {row['not_checked']}"
    same = f", same top token at {row['argmax_share']:.1%}" if row["argmax_share"] is not None else ""
    return f"largest difference to PyTorch {row['max_abs']:.2g}{same}"


def main() -> None:
    """Entry point: expected failures become one sentence and an exit code."""
    signal.signal(signal.SIGINT, _interrupted)
    sys.exit(invoke(app))


def _interrupted(number: int, frame: object) -> None:
    raise NmsparseError("Interrupted; what was finished is kept.", "the same command goes on from there")


def invoke(call: Callable[[], Any]) -> int:
    """Run the app; 0 ok, 1 a check or stage failed, 2 usage."""
    try:
        call()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except NmsparseError as error:
        output.error(error)
        return error.exit_code
    except OSError as error:
        if os.environ.get("NMSPARSE_DEBUG"):
            raise
        expected = from_os_error(error)
        output.error(expected)
        return expected.exit_code
    return 0
