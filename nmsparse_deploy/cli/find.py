"""Verbs that find a mask, or take over one that was found elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nmsparse_deploy.cli.app import DEMO, Exclude, Force, Include, Model, Out, app, output, say_default
from nmsparse_deploy.errors import UsageError


@app.command()
def inspect(model: Model = DEMO, pattern: str = "2:4", include: Include = [], exclude: Exclude = [],  # noqa: B006
            cost: Annotated[bool, typer.Option("--cost", help="predict time, memory and disk of a prune")] = False,
            method: Annotated[str, typer.Option(help="with --cost; one-shot or learned")] = "sparsegpt",
            refine: Annotated[list[str], typer.Option(help="with --cost; may be repeated")] = [],  # noqa: B006
            steps: Annotated[int | None, typer.Option(help="with --cost, of a learned method")] = None,
            objective: Annotated[str | None, typer.Option(help="with --cost, of a learned method")] = None,
            samples: Annotated[int, typer.Option(help="with --cost")] = 64,
            length: Annotated[int, typer.Option(help="with --cost")] = 512) -> None:
    """Show what would be pruned, in which fusion groups, and why the rest stays dense; or what it would cost."""
    from nmsparse_deploy.find.inspect import inspect as api

    say_default(model)
    if cost:
        _show_cost(model, {"pattern": pattern, "include": include, "exclude": exclude, "method": method,
                           "refine": [{"name": name} for name in refine], **_learning(steps, objective),
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
         pattern: Annotated[str, typer.Option(
             help="keep:group, or unstructured:SHARE_OF_ZEROS, the mean of what every matrix gets")] = "2:4",
         spread: Annotated[float, typer.Option(help="with unstructured: how far shares lie from the mean")] = 0.1,
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
    from nmsparse_deploy.find.plan.file import check_name, save
    from nmsparse_deploy.find.plan.stage import plan as api
    from nmsparse_deploy.recipe import Allocate, validate

    spec = validate(Allocate, {
        "max_ppl_increase": max_ppl_increase, "min_speedup": min_speedup, "budget": budget, "pattern": pattern,
        "spread": spread, "vary_keep": vary_keep, "estimator": estimator, "method": method, "probes": probes,
        "gpu": gpu, "rows": rows, "latency_table": str(latency_table) if latency_table else None,
        "include": include, "exclude": exclude,
        "calibration": {"data": data, "samples": samples, "length": length, "seed": seed}})
    if out:
        check_name(out)
    say_default(model)
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
          wbits: Annotated[int | None, typer.Option(help="4 or 8: round kept weights to so many bits")] = None,
          wgroup: Annotated[int | None, typer.Option(
              help="columns that share a scale, with --wbits; left out: a whole row")] = None,
          steps: Annotated[int | None, typer.Option(
              help="optimiser steps of a learned method [default: 60 per block, 1000 for a whole model]")] = None,
          objective: Annotated[str | None, typer.Option(
              help="of a learned method: block, global, or auto [default: auto, global on a GPU]")] = None,
          data: Annotated[str, typer.Option(
              help="calibration text or images, inputs.safetensors, or generated; auto suits the model")] = "auto",
          samples: Annotated[int, typer.Option(help="calibration windows")] = 64,
          length: Annotated[int, typer.Option(help="tokens per window")] = 512,
          seed: int = 0,
          include: Include = [], exclude: Exclude = [],  # noqa: B006
          time_budget: Annotated[float | None, typer.Option(help="minutes, for --method auto [default: 10]")] = None,
          max_memory: Annotated[str | None, typer.Option(
              help="for example 3GB: to stay below, stream weights from their files, hidden states to disk")] = None,
          out: Out = None, force: Force = False) -> None:
    """Find a mask, apply it, verify it, and save the pruned model with its masks."""
    from nmsparse_deploy.find.prune import prune as api
    from nmsparse_deploy.recipe import Prune, validate
    from nmsparse_deploy.system.memory import parse_size

    limit = parse_size(max_memory) if max_memory else None
    say_default(model)
    calibration = {"data": data, "samples": samples, "length": length, "seed": seed}
    settings = {"refine": [{"name": name} for name in refine], "sequential": sequential, "permute": permute,
                **_patterns(pattern, plan), **_learning(steps, objective),
                "wbits": wbits, "wgroup": wgroup, "calibration": calibration, "include": include, "exclude": exclude}
    if method == "auto":
        from nmsparse_deploy.find.auto import choose

        choice = choose(model, settings, time_budget or 10.0, output.progress, limit)
        output.message(choice.why)
        spec = choice.spec
    elif time_budget is not None:
        raise UsageError("--time-budget belongs to --method auto.")
    else:
        spec = validate(Prune, {"method": method, **settings})
    run = api(model, spec, out, force, output.progress, limit)
    facts = run.manifest()["stages"]["prune"]
    how = "as planned" if plan else f"to {spec.pattern}"
    few = facts.get("experts_by_magnitude", {"matrices": 0})
    lines = [f"{few['matrices']} of {few['of']} expert matrices were reached by too few calibration tokens and were "
             "pruned by magnitude (layers.json names them); more --samples reach more."] if few["matrices"] else []
    output.result({"run": str(run.path), **facts},
                  [f"{run.path}: {facts['layers']} layers pruned {how} and verified "
                   f"in {facts['seconds']:.0f} s.", *_memory(facts), *lines, *_learned(facts),
                   f"next: nmsparse-deploy evaluate {run.path}"])


@app.command(name="import")
def import_(model: Annotated[str, typer.Argument(help="the dense model; or a sparse one, if nothing else is given")],
            masks: Annotated[Path | None, typer.Option(
                help="masks for it: .npz (packed bits), .pt, .safetensors, or a folder of them")] = None,
            sparse: Annotated[str | None, typer.Option(help="the same model, pruned elsewhere")] = None,
            pattern: Annotated[str, typer.Option(help="keep:group")] = "2:4",
            out: Annotated[Path | None, typer.Option(
                help="run folder [default: runs/MODEL-imported-PATTERN]")] = None) -> None:
    """Make a run of masks or of a sparse model that were found elsewhere, and verify it."""
    from nmsparse_deploy.find.import_masks import import_result

    done = import_result(model, masks, sparse, pattern, out, output.progress)
    output.result(done.to_json(), [done.summary(), f"next: nmsparse-deploy export {done.run.path}"])


def _show_cost(model: str, settings: dict[str, Any]) -> None:
    from nmsparse_deploy.find.inspect import predict_cost
    from nmsparse_deploy.recipe import Prune, validate

    spec = validate(Prune, settings)
    cost = predict_cost(model, spec, output.progress)
    output.table(cost, ("predicted", ""), [(name.replace("_", " "), f"{value:,.0f}") for name, value in cost.items()
                                           if not isinstance(value, str)])


def _patterns(pattern: str | None, plan: Path | None) -> dict[str, Any]:
    """The pattern and the decisions about single parameters."""
    if plan is None:
        return {"pattern": pattern or "2:4"}
    from nmsparse_deploy.find.plan.file import load

    if pattern is not None:
        raise UsageError("--plan decides the pattern; leave --pattern out.")
    found = load(plan)
    return {"pattern": found.pattern, "patterns": found.patterns}


def _learning(steps: int | None, objective: str | None) -> dict[str, Any]:
    """The section of a learned method, as far as options set it."""
    asked = {name: value for name, value in (("steps", steps), ("objective", objective)) if value is not None}
    return {"learn": asked} if asked else {}


def _memory(facts: dict[str, Any]) -> list[str]:
    """How the model was held, if it was not simply in memory."""
    held = facts.get("memory", {})
    if held.get("weights") != "streamed" and not held.get("limit_bytes"):
        return []
    return [f"weights {held['weights']}, hidden states {held['hidden_states']}; peak memory "
            f"{held['peak_bytes'] / 1e9:.2f} GB, predicted {held['predicted_bytes'] / 1e9:.2f} GB."]


def _learned(facts: dict[str, Any]) -> list[str]:
    """What was learned, if something was."""
    if "learned" not in facts:
        return []
    from nmsparse_deploy.find.learn.session import sentence

    return [sentence(facts["learned"])]
