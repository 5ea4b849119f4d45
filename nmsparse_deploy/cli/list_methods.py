"""`nmsparse-deploy list`."""

from nmsparse_deploy.cli.app import output, verb


@verb(called="list")
def list_methods() -> None:
    """List the methods that find a mask, the refinements that can follow, and the runtimes of
    engines."""
    from nmsparse_deploy.registry import ENGINES, LEARNERS, METHODS, REFINEMENTS

    methods, learned, refinements = METHODS.readable(), LEARNERS.readable(), REFINEMENTS.readable()
    engines = ENGINES.readable()
    damaged = [
        error.message for _, errors in (methods, learned, refinements, engines) for error in errors
    ]
    data = {
        "methods": [
            {
                "name": n,
                "needs": m.needs,
                "updates_weights": m.updates_weights,
                "unstructured": m.scope,
                "summary": m.summary,
                "source": m.source,
            }
            for n, m in methods[0].items()
        ],
        "learned": [
            {
                "name": n,
                "updates_weights": m.updates_weights,
                "summary": m.summary,
                "source": m.source,
            }
            for n, m in learned[0].items()
        ],
        "refinements": [
            {
                "name": n,
                "needs": r.needs,
                "changes": r.changes,
                "summary": r.summary,
                "source": r.source,
            }
            for n, r in refinements[0].items()
        ],
        "engines": [
            {"name": n, "summary": e.summary, "source": e.source} for n, e in engines[0].items()
        ],
        **({"damaged": damaged} if damaged else {}),
    }
    rows: list[tuple[str, ...]] = []
    rows += [
        (f"--method {n}", m.summary, "updated" if m.updates_weights else "kept", m.needs, m.source)
        for n, m in methods[0].items()
    ]
    rows += [
        (
            f"--method {n}",
            m.summary,
            "updated" if m.updates_weights else "kept",
            "learned",
            m.source,
        )
        for n, m in learned[0].items()
    ]
    rows += [
        (
            f"--refine {n}",
            r.summary,
            "kept" if r.changes == "mask" else "updated",
            r.needs,
            r.source,
        )
        for n, r in refinements[0].items()
    ]
    rows += [(f"--engine {n}", e.summary, "", "", e.source) for n, e in engines[0].items()]
    output.table(data, ("option", "what it does", "weights", "data", "source"), rows, damaged)
