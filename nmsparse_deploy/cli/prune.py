"""`nmsparse-deploy prune`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import nmsparse_deploy as nms
from nmsparse_deploy.cli.app import DEMO, output, say_default, verb
from nmsparse_deploy.cli.options import Asked, Fields
from nmsparse_deploy.cli.shapes import planned, shape_lines
from nmsparse_deploy.errors import UsageError

if TYPE_CHECKING:
    from nmsparse_deploy.runs.manifest import StageRecord


@verb(
    Fields(
        "Prune",
        "method refine sequential permute pattern wbits wgroup learn.steps learn.objective "
        "calibration.data calibration.samples calibration.length calibration.seed include exclude",
    ),
    plan="what `nmsparse-deploy plan --out` wrote; it decides the pattern",
    time_budget="minutes, with --method auto, which takes the best recipe that fits [default: 10]",
    max_memory="for example 3GB: to stay below, stream weights from their files, hidden states to disk",
)
def prune(
    asked: Asked,
    model: str = DEMO,
    *,
    plan: Path | None = None,
    time_budget: float | None = None,
    max_memory: str | None = None,
    out: Path | None = None,
    force: bool = False,
) -> None:
    """Find a mask, apply it, verify it, and save the pruned model with its masks."""
    from nmsparse_deploy.find.auto import MINUTES, choose
    from nmsparse_deploy.find.plan.file import load
    from nmsparse_deploy.system.memory import parse_size

    settings = asked.sections["Prune"]
    automatic = settings.get("method") == "auto"
    if automatic:
        del settings["method"]
    elif time_budget is not None:
        raise UsageError("--time-budget belongs to --method auto.")
    if plan and "pattern" in settings:
        raise UsageError("--plan decides the pattern; leave --pattern out.")
    if plan:
        decided = load(plan)
        decided.check_model(model, plan)
        settings |= {"pattern": decided.pattern, "patterns": decided.patterns}
    limit = parse_size(max_memory) if max_memory else None
    spec = asked.read(nms.Prune)
    say_default(model)
    if automatic:
        choice = choose(model, settings, time_budget or MINUTES, output.progress, limit)
        output.message(choice.why)
        spec = choice.spec
    run = nms.prune(model, spec, out, force, output.progress, limit)
    record = run.manifest().stages["prune"]
    ineligible = planned(run)
    how = "as planned" if plan else f"to {spec.pattern}"
    output.result(
        {"run": str(run.path), **record.to_json(), "ineligible_by_shape": ineligible},
        [
            f"{run.path}: {record.layers} layers pruned {how} and verified in {record.seconds:.0f} s.",
            *_remarks(record),
            *shape_lines(ineligible),
            f"next: nmsparse-deploy evaluate {run.path}",
        ],
    )


def _remarks(record: "StageRecord") -> Iterator[str]:
    """Say how the model was held if not simply in memory, which experts saw too little, and what
    was learned."""
    held, few = record.memory, record.experts_by_magnitude
    if held and (held.weights == "streamed" or held.limit_bytes):
        yield (
            f"weights {held.weights}, hidden states {held.hidden_states}; peak memory "
            f"{held.peak_bytes / 1e9:.2f} GB, predicted {held.predicted_bytes / 1e9:.2f} GB."
        )
    if few and few.matrices:
        yield (
            f"{few.matrices} of {few.of} expert matrices were reached by too few calibration tokens and were "
            "pruned by magnitude (layers.json names them); more --samples reach more."
        )
    if record.learned:
        from nmsparse_deploy.find.learn.session import sentence

        yield sentence(record.learned)
