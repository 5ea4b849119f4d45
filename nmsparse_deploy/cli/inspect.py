"""`nmsparse-deploy inspect`."""

import nmsparse_deploy as nms
from nmsparse_deploy.cli.app import DEMO, output, say_default, verb
from nmsparse_deploy.cli.options import Asked, Fields


@verb(
    Fields("Prune", "pattern include exclude"),
    Fields(
        "Prune",
        "method refine learn.steps learn.objective calibration.samples calibration.length",
        note="with --cost: ",
    ),
    cost="predict time, memory and disk of a prune",
)
def inspect(asked: Asked, model: str = DEMO, *, cost: bool = False) -> None:
    """Show what would be pruned, in which fusion groups, and why the rest stays dense; or what it
    would cost."""
    from nmsparse_deploy.find.inspect import predict_cost

    spec = asked.read(nms.Prune)
    say_default(model)
    if cost:
        predicted = predict_cost(model, spec, output.progress).to_json()
        output.table(
            predicted,
            ("predicted", ""),
            [
                (name.replace("_", " "), f"{value:,.0f}")
                for name, value in predicted.items()
                if not isinstance(value, str)
            ],
        )
        return
    plan = nms.inspect(model, spec.pattern, spec.include, spec.exclude, output.progress)
    rows = [
        (
            r.target.name,
            f"{r.target.k}x{r.target.n}",
            r.pattern or "dense",
            r.shape_verdict() or "",
            r.reason,
        )
        for r in plan.rows
    ]
    rows += [(s.name, "x".join(map(str, s.shape)), "dense", "", s.reason) for s in plan.skipped]
    output.table(
        plan.to_json(),
        ("parameter", "K x N", "pattern", "kernel shape", "why"),
        rows,
        [plan.summary()],
    )
