"""`nmsparse-deploy list`."""

from nmsparse_deploy.cli.app import output, verb


@verb(called="list")
def list_methods() -> None:
    """List the methods that find a mask, the refinements that can follow, and where they come from."""
    from nmsparse_deploy.registry import LEARNERS, METHODS, REFINEMENTS

    methods, learned, refinements = ([(name, registry.load(name)) for name in registry.names()]
                                     for registry in (METHODS, LEARNERS, REFINEMENTS))
    data = {"methods": [{"name": n, "needs": m.needs, "updates_weights": m.updates_weights, "unstructured": m.scope,
                         "summary": m.summary, "source": m.source} for n, m in methods],
            "learned": [{"name": n, "updates_weights": m.updates_weights, "summary": m.summary, "source": m.source}
                        for n, m in learned],
            "refinements": [{"name": n, "needs": r.needs, "changes": r.changes, "summary": r.summary,
                             "source": r.source} for n, r in refinements]}
    rows = [(f"--method {n}", m.summary, "updated" if m.updates_weights else "kept", getattr(m, "needs", "learned"),
             m.source) for n, m in methods + learned]
    rows += [(f"--refine {n}", r.summary, "kept" if r.changes == "mask" else "updated", r.needs, r.source)
             for n, r in refinements]
    output.table(data, ("option", "what it does", "weights", "data", "source"), rows)
