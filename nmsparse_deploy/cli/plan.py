"""`nmsparse-deploy plan`."""

from pathlib import Path

import nmsparse_deploy as nms
from nmsparse_deploy.cli.app import DEMO, output, say_default, verb
from nmsparse_deploy.cli.options import Asked, Fields


@verb(
    Fields(
        "Allocate",
        "max_ppl_increase min_speedup budget pattern spread vary_keep estimator method probes "
        "latency_table gpu rows calibration.data calibration.samples calibration.length calibration.seed "
        "include exclude",
    ),
    out="write the plan here (.yaml or .json) for prune --plan",
)
def plan(asked: Asked, model: str = DEMO, *, out: Path | None = None) -> None:
    """Decide which fusion groups get the pattern, under exactly one constraint."""
    from nmsparse_deploy.find.plan.file import check_name, save

    spec = asked.read(nms.Allocate)
    if out:
        check_name(out)
    say_default(model)
    result = nms.plan(model, spec, output.progress)
    if out:
        save(result.to_json(), out)
    rows = [
        (
            ", ".join(result.short_names(d)),
            f"{d.k}x{d.n}",
            f"{d.sensitivity:.2g} ± {d.error:.1g}",
            f"{d.saving_us:.1f} ({d.gain:.2%})",
            d.pattern,
            d.reason if d.pattern == "dense" else "",
        )
        for d in result.decisions
    ]
    lines = result.summary() + (
        [f"next: nmsparse-deploy prune {model} --plan {out}"] if out else []
    )
    output.table(
        result.to_json(),
        ("fusion group", "K x N", "sensitivity", "saves, us", "decision", "why dense"),
        rows,
        lines,
    )
