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
    "NMPattern": "pattern", "Unstructured": "pattern", "parse_pattern": "pattern", "project": "masks",
    "check": "prove.group_counter",
    "Mask": "masks", "MaskSet": "masks",
    "Recipe": "recipe", "Prune": "recipe", "Calibration": "recipe", "Export": "recipe",
    "Evaluate": "recipe", "Bench": "recipe", "Allocate": "recipe", "Build": "recipe",
    "Pack": "recipe",
    "RunDir": "runs.run_dir",
    "prune": "find.prune", "plan": "find.plan.stage",
    "inspect": "find.inspect", "verify": "ship.verify_run", "export": "ship.onnx.stage",
    "evaluate": "measure.evaluate.stage", "bench": "measure.bench.cpu",
    "report": "measure.report.stage", "publish": "measure.report.stage",
    "run_recipe": "pipeline", "compare": "comparison",
    "export_torch": "ship.torch_sparse.stage", "crossover": "measure.bench.stages", "bench_run": "measure.bench.stages",
    "build": "ship.tensorrt.stage", "verify_engine": "ship.tensorrt.stage", "EngineEvidence": "ship.evidence",
    "NmsparseError": "errors", "UsageError": "errors", "CheckFailed": "errors",
}
"""By name: the module that defines it. No room of the package has the name of a verb, so importing one hides none."""
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    return value
