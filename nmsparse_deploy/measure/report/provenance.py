"""How the run came about, and what to type to get it again."""

from __future__ import annotations

import shlex
from typing import Any

import yaml

from nmsparse_deploy.measure.report.stages import Stages
from nmsparse_deploy.recipe import Calibration, Prune


def provenance(stages: Stages) -> dict[str, Any]:
    """Recipe, fingerprint, versions, hardware, data, stages, and commands."""
    manifest = stages.manifest
    with stages.of("manifest.json"):
        prune = manifest["stages"].get("prune", {})
        return {"recipe": manifest["recipe"], "recipe_yaml": _yaml(manifest["recipe"]),
                "fingerprint": manifest["fingerprint"], "created": manifest.get("created"),
                "versions": manifest.get("versions") or {}, "hardware": manifest.get("hardware") or {},
                "base_model": prune.get("provenance") or {}, "compute": prune.get("compute"),
                "calibration": prune.get("calibration"), "stages": _stage_rows(manifest["stages"]),
                "commands": commands(stages)}


def _yaml(recipe: dict[str, Any]) -> str:
    """The recorded recipe in the form that `nmsparse-deploy run` reads."""
    prune = {key: value for key, value in recipe.items() if key != "model"}
    return yaml.safe_dump({"model": recipe["model"], "prune": prune}, sort_keys=False, allow_unicode=True, width=100)


def _stage_rows(stages: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"stage": name, "finished": facts.get("finished"), "seconds": facts.get("seconds"),
             "peak_memory_mb": facts.get("peak_memory_mb")} for name, facts in stages.items()]


def commands(stages: Stages) -> list[str]:
    """One command per stage that the run holds, with every setting that was recorded."""
    run = f"runs/{stages.path.resolve().name}"
    with stages.of("manifest.json"):
        found = [_prune(stages.manifest["recipe"], run)]
    with stages.of("export.json"):
        if stages.export:
            files = stages.export["files"]
            options = [("precision", row["precision"]) for row in files] + [("opset", files[0]["opset"])]
            found.append(_command("export", [run], options))
    with stages.of("manifest.json"):
        if stages.engines:
            spec = stages.manifest["stages"].get("build", {}).get("spec") or {}
            shapes = [("shape", f"{name}={'x'.join(map(str, size))}") for name, size in
                      (spec.get("shapes") or {}).items()]
            plain = ("precision", "batch", "length", "level", "timing_iterations", "route")
            options = [(name.replace("_", "-"), spec.get(name)) for name in plain] + shapes
            found.append(_command("build", [run], options + ([("allow-fp32", "")] if spec.get("allow_fp32") else [])))
    with stages.of("evaluate.json"):
        if stages.evaluate:
            protocol = next(iter(stages.evaluate["results"].values()))
            protocol = (protocol[0] if isinstance(protocol, list) else protocol).get("protocol") or {}
            spec = stages.manifest["stages"].get("evaluate", {}).get("spec") or {}
            options = _as_papers(spec) or [(key, protocol.get(key)) for key in ("data", "tokens", "context")]
            found.append(_command("evaluate", [run], options))
    with stages.of("bench.json"):
        if stages.bench:
            rounds = [("rounds", arm["calls"]) for arm in stages.bench["arms"][:1]]
            found.append(_command("bench", [run], [*stages.bench["shape"].items(), *rounds]))
    return [*found, _command("report", [run], [])]


def _as_papers(spec: dict[str, Any]) -> list[tuple[str, Any]]:
    """Options of an evaluation by protocols and tasks; none for any other."""
    named = [("protocol", name) for name in spec.get("protocols") or []]
    named += [("task", name) for name in spec.get("tasks") or []]
    more = [("data", spec.get("data")), ("paper-context", spec.get("paper_context")), ("limit", spec.get("limit"))]
    return [*named, *more, *([("onnx", "")] if spec.get("onnx") else [])] if named else []


def _prune(recipe: dict[str, Any], run: str) -> str:
    """`prune` with its options, or `run` where the recipe sets what has no option."""
    calibration, steps = recipe.get("calibration") or {}, recipe.get("refine") or []
    usual = [step.model_dump(mode="json") for step in Prune(refine=[{"name": step["name"]} for step in steps]).refine]
    if calibration.get("batch", Calibration().batch) != Calibration().batch or steps != usual or (
            recipe.get("compute", Prune().compute) != Prune().compute) or recipe.get("patterns"):
        return f"{_command('run', ['recipe.yaml'], [('out', run)])}  # the recipe below, saved as recipe.yaml"
    options = [("method", recipe.get("method")), *(("refine", step["name"]) for step in steps),
               *((name, "") for name in ("permute", "sequential") if recipe.get(name)),
               *((name, recipe.get(name)) for name in ("pattern", "wbits", "wgroup")),
               *((key, calibration.get(key)) for key in ("data", "samples", "length", "seed")),
               *(("include", glob) for glob in recipe.get("include") or []),
               *(("exclude", glob) for glob in recipe.get("exclude") or []), ("out", run)]
    return _command("prune", [recipe["model"]], options)


def _command(verb: str, arguments: list[str], options: list[tuple[str, Any]]) -> str:
    words = ["nmsparse-deploy", verb, *arguments]
    for name, value in options:
        if value is not None:
            words += [f"--{name}", *([str(value)] if value != "" else [])]
    return shlex.join(words)


def skipped(stages: Stages) -> list[dict[str, Any]]:
    """Weights that stayed dense, each with the reason."""
    with stages.of("plan.json"):
        plan = stages.plan or {"rows": [], "skipped": []}
        dense = [{"name": row["name"], "shape": f"{row['k']} × {row['n']} (K × N)", "reason": row["reason"]}
                 for row in plan["rows"] if not row["pattern"]]
        never = [{"name": row["name"], "shape": " × ".join(str(size) for size in row["shape"]),
                  "reason": row["reason"]} for row in plan["skipped"]]
    return dense + never
