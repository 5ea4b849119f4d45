"""Checks before a prune: what would only fail after hours of work fails in a sentence at the
start."""

from __future__ import annotations

import torch

from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.find.plan.make_plan import Plan
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.recipe import Prune
from nmsparse_deploy.registry import REFINEMENTS
from nmsparse_deploy.system.distributed import Processes


def check_finite(loaded: LoadedModel, plan: Plan) -> None:
    """Raise `NmsparseError` when a weight that is to be pruned contains NaN or Inf."""
    for number, path in enumerate(plan.blocks):
        with loaded.weights.materialise(path):
            for name in (row.target.name for row in plan.pruned(number)):
                if not torch.isfinite(loaded.module.get_parameter(name)).all():
                    raise NmsparseError(
                        f"The weight '{name}' of '{loaded.source}' contains NaN or Inf.",
                        f"repair the checkpoint, or leave it dense with --exclude '{name}'",
                    )


def check_shared(spec: Prune, team: Processes) -> None:
    """Raise `UsageError` when several processes have nothing to share.

    They share calibration sequences where statistics are drawn from them, or what is learned
    through the whole model.
    """
    if spec.learn is not None and spec.learn.scope == "global" and not spec.finetune:
        return
    alone = next(
        (step.name for step in spec.refine if REFINEMENTS[step.name].level != "layer"), None
    )
    if spec.learn is not None or alone:
        raise UsageError(
            f"'{alone or spec.method}' sees all sequences at a time, so {team.world} processes cannot "
            "share them.",
            "run it in one process; masks learned with --objective global can be shared",
        )
    if spec.needs == "none":
        raise UsageError(
            f"'{spec.method}' uses no data, so there is nothing for {team.world} processes to share.",
            "run it in one process",
        )
    batches = -(-spec.calibration.samples // spec.calibration.batch)
    if batches < team.world:
        raise UsageError(
            f"{spec.calibration.samples} samples in batches of {spec.calibration.batch} cannot be shared "
            f"by {team.world} processes.",
            "more --samples, or a smaller calibration.batch in a recipe",
        )


def check_scales_fit(plan: Plan, spec: Prune) -> None:
    """Raise `UsageError` when `wgroup` does not divide the inputs of a matrix, or cuts through a
    group."""
    for row in plan.pruned() if spec.wgroup else []:
        assert spec.wgroup is not None and row.pattern is not None
        if spec.wgroup % row.pattern.block_size:
            raise UsageError(
                f"wgroup {spec.wgroup} cuts through what {row.pattern} prunes at a time in "
                f"'{row.target.name}'.",
                f"take a multiple of {row.pattern.block_size}",
            )
        if row.target.k % spec.wgroup:
            raise UsageError(
                f"wgroup {spec.wgroup} does not divide the {row.target.k} inputs of '{row.target.name}'.",
                f"leave it out, or leave the layer dense with --exclude '{row.target.name}'",
            )
