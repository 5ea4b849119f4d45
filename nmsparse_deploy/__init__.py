"""Find N:M sparsity masks for pretrained transformers, prove them in every artefact, and ship them.

The public API has the same verbs as the command line:

    from pathlib import Path
    import nmsparse_deploy as nms
    run = nms.prune("demo", nms.Prune(method="sparsegpt", pattern="2:4"))
    reports = nms.verify(run)

Nothing is imported until it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "NMPattern": ".pattern", "Unstructured": ".pattern", "parse_pattern": ".pattern", "project": ".pattern",
    "check": ".pattern",
    "Mask": ".masks", "MaskSet": ".masks",
    "Recipe": ".recipe", "Prune": ".recipe", "Calibration": ".recipe", "Export": ".recipe", "Evaluate": ".recipe",
    "Bench": ".recipe", "Allocate": ".recipe", "Build": ".recipe",
    "RunDir": ".rundir",
    "prune": ".prune", "plan": ".planning.stage",
    "inspect": ".pipeline", "verify": ".pipeline", "export": ".pipeline", "evaluate": ".pipeline", "bench": ".pipeline",
    "report": ".pipeline", "publish": ".pipeline", "run_recipe": ".pipeline", "compare": ".compare",
    "export_torch": ".packing", "crossover": ".bench.stages", "bench_run": ".bench.stages", "Pack": ".recipe",
    "build": ".deploy", "verify_engine": ".deploy", "EngineEvidence": ".engines.evidence",
    "NmsparseError": ".errors", "UsageError": ".errors", "CheckFailed": ".errors",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    # Importing a submodule puts it where a verb of the same name belongs, so all names are settled afterwards.
    modules = {module: import_module(module, __name__) for module in dict.fromkeys(_PUBLIC.values())}
    globals().update({public: getattr(modules[module], public) for public, module in _PUBLIC.items()})
    return globals()[name]
