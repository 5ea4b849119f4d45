"""Find N:M sparsity masks for pretrained transformers, prove them in every artefact, and ship them.

The public API has the same verbs as the command line:

    import nmsparse_deploy as nms
    run = nms.prune("demo", nms.Prune(method="sparsegpt", pattern="2:4"))
    assert all(report.ok for report in nms.verify(run))

Nothing is imported until it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what an editor and a type checker see of the names below
    from nmsparse_deploy.comparison import compare as compare
    from nmsparse_deploy.errors import CheckFailed as CheckFailed
    from nmsparse_deploy.errors import NmsparseError as NmsparseError
    from nmsparse_deploy.errors import UsageError as UsageError
    from nmsparse_deploy.find.import_masks import import_result as import_result
    from nmsparse_deploy.find.inspect import inspect as inspect
    from nmsparse_deploy.find.keep_pattern import keep_pattern as keep_pattern
    from nmsparse_deploy.find.plan.stage import plan as plan
    from nmsparse_deploy.find.prune import prune as prune
    from nmsparse_deploy.masks import Mask as Mask
    from nmsparse_deploy.masks import MaskSet as MaskSet
    from nmsparse_deploy.masks import project as project
    from nmsparse_deploy.measure.bench.cpu import bench as bench
    from nmsparse_deploy.measure.bench.stages import bench_run as bench_run
    from nmsparse_deploy.measure.bench.stages import crossover as crossover
    from nmsparse_deploy.measure.evaluate.stage import evaluate as evaluate
    from nmsparse_deploy.measure.report.stage import publish as publish
    from nmsparse_deploy.measure.report.stage import report as report
    from nmsparse_deploy.pattern import NMPattern as NMPattern
    from nmsparse_deploy.pattern import Unstructured as Unstructured
    from nmsparse_deploy.pattern import parse_pattern as parse_pattern
    from nmsparse_deploy.pipeline import run_recipe as run_recipe
    from nmsparse_deploy.prove.checkpoint import verify_checkpoint as verify_checkpoint
    from nmsparse_deploy.prove.group_counter import check as check
    from nmsparse_deploy.recipe import Allocate as Allocate
    from nmsparse_deploy.recipe import Bench as Bench
    from nmsparse_deploy.recipe import Build as Build
    from nmsparse_deploy.recipe import Calibration as Calibration
    from nmsparse_deploy.recipe import Evaluate as Evaluate
    from nmsparse_deploy.recipe import Export as Export
    from nmsparse_deploy.recipe import Pack as Pack
    from nmsparse_deploy.recipe import Prune as Prune
    from nmsparse_deploy.recipe import Recipe as Recipe
    from nmsparse_deploy.runs.run_dir import RunDir as RunDir
    from nmsparse_deploy.ship.build import build as build
    from nmsparse_deploy.ship.evidence import EngineEvidence as EngineEvidence
    from nmsparse_deploy.ship.onnx.stage import export as export
    from nmsparse_deploy.ship.tensorrt.gather import verify_engine as verify_engine
    from nmsparse_deploy.ship.torch_sparse.stage import export_torch as export_torch
    from nmsparse_deploy.ship.verify_run import verify as verify

_PUBLIC = {
    "NMPattern": "pattern",
    "Unstructured": "pattern",
    "parse_pattern": "pattern",
    "project": "masks",
    "check": "prove.group_counter",
    "verify_checkpoint": "prove.checkpoint",
    "Mask": "masks",
    "MaskSet": "masks",
    "Recipe": "recipe",
    "Prune": "recipe",
    "Calibration": "recipe",
    "Export": "recipe",
    "Evaluate": "recipe",
    "Bench": "recipe",
    "Allocate": "recipe",
    "Build": "recipe",
    "Pack": "recipe",
    "RunDir": "runs.run_dir",
    "prune": "find.prune",
    "plan": "find.plan.stage",
    "inspect": "find.inspect",
    "import_result": "find.import_masks",
    "keep_pattern": "find.keep_pattern",
    "verify": "ship.verify_run",
    "export": "ship.onnx.stage",
    "evaluate": "measure.evaluate.stage",
    "bench": "measure.bench.cpu",
    "report": "measure.report.stage",
    "publish": "measure.report.stage",
    "run_recipe": "pipeline",
    "compare": "comparison",
    "export_torch": "ship.torch_sparse.stage",
    "crossover": "measure.bench.stages",
    "bench_run": "measure.bench.stages",
    "build": "ship.build",
    "verify_engine": "ship.tensorrt.gather",
    "EngineEvidence": "ship.evidence",
    "NmsparseError": "errors",
    "UsageError": "errors",
    "CheckFailed": "errors",
}
"""By name: the module that defines it. No room of the package has the name of a verb, so importing
one hides none."""
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("nmsparse-deploy")
    if name not in _PUBLIC:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    return value
