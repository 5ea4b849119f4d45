"""How the run came about, and what to type to get it again."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

import yaml

from nmsparse_deploy.measure.report.quality import Quality, several
from nmsparse_deploy.measure.report.stages import Circumstances, Recorded, Stages
from nmsparse_deploy.models.base import Skipped
from nmsparse_deploy.recipe import Calibration, Prune
from nmsparse_deploy.runs.manifest import RecipeRecord
from nmsparse_deploy.runs.section import Block, Code, Facts, Paragraph, Section, Table, columns
from nmsparse_deploy.runs.wording import facts, moment, quantity, shape

Options = list[tuple[str, object]]


@dataclass(frozen=True)
class FinishedStage:
    """A stage with its cost."""

    stage: str
    finished: str
    seconds: float
    peak_memory_mb: int | None


@dataclass(frozen=True)
class Provenance:
    """Recipe, versions, hardware, data, stages, and the commands that give the run again."""

    recipe: Recorded
    recipe_yaml: str
    fingerprint: str
    created: str
    versions: dict[str, str]
    hardware: Recorded
    base_model: Recorded
    compute: str | None
    calibration: Recorded | None
    stages: tuple[FinishedStage, ...]
    commands: tuple[str, ...]


def provenance(stages: Stages) -> Provenance:
    """Collect where the run comes from."""
    manifest = stages.manifest
    prune = manifest.stages.get("prune")
    done = tuple(
        FinishedStage(name, record.finished, record.seconds, record.peak_memory_mb)
        for name, record in manifest.stages.items()
    )
    recipe = manifest.recipe.to_json()
    return Provenance(
        recipe,
        _yaml(recipe),
        manifest.fingerprint,
        manifest.created,
        manifest.versions,
        manifest.hardware,
        (prune.provenance if prune else None) or {},
        prune.compute if prune else None,
        prune.calibration if prune else None,
        done,
        commands(stages),
    )


def _yaml(recipe: Recorded) -> str:
    """Write the recorded recipe in the form that `nmsparse-deploy run` reads."""
    prune = {key: value for key, value in recipe.items() if key != "model"}
    return yaml.safe_dump(
        {"model": recipe["model"], "prune": prune}, sort_keys=False, allow_unicode=True, width=100
    )


def commands(stages: Stages) -> tuple[str, ...]:
    """Return one command per stage that the run holds, with every setting that was recorded."""
    run = f"runs/{stages.path.resolve().name}"
    specs = {name: record.spec or {} for name, record in stages.manifest.stages.items()}
    lines = [_prune(stages.manifest.recipe, run)]
    if stages.export and stages.export.files:
        options: Options = [("precision", graph.precision) for graph in stages.export.files]
        lines.append(_command("export", [run], [*options, ("opset", stages.export.files[0].opset)]))
    if "build" in specs:
        lines.append(_command("build", [run], _build(specs["build"])))
    if stages.evaluate:
        lines.append(_command("evaluate", [run], _evaluate(stages, specs.get("evaluate", {}))))
    if stages.bench:
        rounds: Options = [("rounds", arm.calls) for arm in stages.bench.arms[:1]]
        lines.append(_command("bench", [run], [*stages.bench.shape.items(), *rounds]))
    return (*lines, _command("report", [run], []))


def _build(spec: Recorded) -> Options:
    shapes = spec.get("shapes")
    sized: Options = (
        [
            ("shape", f"{name}={'x'.join(map(str, size))}")
            for name, size in shapes.items()
            if isinstance(size, list)
        ]
        if isinstance(shapes, dict)
        else []
    )
    plain = ("precision", "batch", "length", "level", "timing_iterations", "route")
    return [
        *((name.replace("_", "-"), spec.get(name)) for name in plain),
        *sized,
        *([("allow-fp32", "")] if spec.get("allow_fp32") else []),
    ]


def _evaluate(stages: Stages, spec: Recorded) -> Options:
    """Return the options of an evaluation by protocols and tasks, or of the usual one."""
    named: Options = [
        (option, name)
        for option, key in (("protocol", "protocols"), ("task", "tasks"))
        for name in _listed(spec.get(key))
    ]
    if named:
        return [
            *named,
            ("data", spec.get("data")),
            ("paper-context", spec.get("paper_context")),
            ("limit", spec.get("limit")),
            *([("onnx", "")] if spec.get("onnx") else []),
        ]
    measured = [
        result
        for rows in (stages.evaluate.results.values() if stages.evaluate else ())
        for result in several(rows)
    ]
    protocol = measured[0].protocol if measured else {}
    return [(key, protocol.get(key)) for key in ("data", "tokens", "context")]


def _prune(recipe: RecipeRecord, run: str) -> str:
    """Return `prune` with its options, or `run` where the recipe sets what has no option; `import`
    for found masks."""
    if recipe.imported:
        return _command(
            "import",
            [recipe.model],
            [*recipe.imported.to_json().items(), ("pattern", recipe.pattern), ("out", run)],
        )
    steps = [str(step.get("name")) for step in recipe.refine]
    usual = [
        step.model_dump(mode="json")
        for step in Prune.model_validate({"refine": [{"name": name} for name in steps]}).refine
    ]
    calibration = recipe.calibration
    if (
        calibration.batch != Calibration().batch
        or list(recipe.refine) != usual
        or (recipe.compute != Prune().compute)
        or recipe.patterns
    ):
        return f"{_command('run', ['recipe.yaml'], [('out', run)])}  # the recipe below, saved as recipe.yaml"
    flags = [
        name
        for name, wanted in (("permute", recipe.permute), ("sequential", recipe.sequential))
        if wanted
    ]
    return _command(
        "prune",
        [recipe.model],
        [
            ("method", recipe.method),
            *(("refine", step) for step in steps),
            *((name, "") for name in flags),
            ("pattern", recipe.pattern),
            ("wbits", recipe.wbits),
            ("wgroup", recipe.wgroup),
            *((key, getattr(calibration, key)) for key in ("data", "samples", "length", "seed")),
            *(("include", glob) for glob in recipe.include),
            *(("exclude", glob) for glob in recipe.exclude),
            ("out", run),
        ],
    )


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _command(verb: str, arguments: list[str], options: Options) -> str:
    words = ["nmsparse-deploy", verb, *arguments]
    for name, value in options:
        if value is not None:
            words += [f"--{name}", *([str(value)] if value != "" else [])]
    return shlex.join(words)


def stayed_dense(stages: Stages) -> tuple[Skipped, ...]:
    """List weights that stayed dense, each with the reason."""
    if stages.plan is None:
        return ()
    planned = [
        Skipped(row.name, (row.k, row.n), row.reason) for row in stages.plan.rows if not row.pattern
    ]
    return (*planned, *stages.plan.skipped)


def origin(
    past: Provenance, source: str, quality: Quality | None, timed: Circumstances | None
) -> Section:
    """Write the section about where the run comes from."""
    about = {
        "model": source,
        "run fingerprint": past.fingerprint,
        "created": moment(past.created),
        "forward passes in": past.compute or "not recorded",
    }
    blocks: list[Block] = [
        Facts(tuple(about.items())),
        Section("To get it again", (Code("\n".join(past.commands), wrap=True),)),
        Section("Recipe", (Code(past.recipe_yaml),)),
        Section(
            "Base model", (_facts(past.base_model, "Nothing about the base model was recorded."),)
        ),
        Section(
            "Calibration",
            (
                _facts(
                    past.calibration, "The method used no calibration data, or none was recorded."
                ),
                *_held_out(quality),
            ),
        ),
        Section("Hardware and versions", (Facts(facts({**past.hardware, **past.versions})),)),
    ]
    here = Circumstances(past.versions, past.hardware)
    for name, later in (
        ("Evaluation", quality.environment if quality else None),
        ("Latency", timed),
    ):
        if later and later not in (here, Circumstances()):
            blocks.append(
                Section(
                    f"{name} ran elsewhere", (Facts(facts({**later.hardware, **later.versions})),)
                )
            )
    rows = tuple(
        (
            row.stage,
            moment(row.finished),
            quantity(row.seconds, "s"),
            quantity(row.peak_memory_mb, "MB"),
        )
        for row in past.stages
    )
    blocks.append(
        Section(
            "Cost of every stage",
            (
                Table(
                    "Stages of the run", columns("stage", "finished", "took", "peak memory"), rows
                ),
            ),
        )
    )
    return Section("How this came about", tuple(blocks), "provenance")


def _facts(recorded: Recorded | None, otherwise: str) -> Block:
    return Facts(facts(recorded)) if recorded else Paragraph(otherwise)


def _held_out(quality: Quality | None) -> tuple[Block, ...]:
    if quality is None or not quality.held_out:
        return ()
    if None in quality.held_out.values():
        return (Paragraph("There was no calibration sample to compare the evaluation data with."),)
    counts = ", ".join(f"{count} {name}" for name, count in facts(quality.held_out))
    return (Paragraph(f"Evaluation data against calibration data: {counts}."),)


def dense(rows: tuple[Skipped, ...]) -> Section:
    """Write the section about weights that stayed dense."""
    heads = columns("parameter", "shape (K × N of a prunable matrix)", "reason", text=("reason",))
    table = Table(
        "Weights that stayed dense",
        heads,
        tuple((row.name, shape(row.shape), row.reason) for row in rows),
    )
    return Section(
        f"Weights that stayed dense ({len(rows)})",
        (table if rows else Paragraph("Nothing is recorded."),),
        "skipped",
    )
