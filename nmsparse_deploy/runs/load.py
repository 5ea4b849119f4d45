"""The two models of a run: what pruning made, and the dense one that it was made from."""

from __future__ import annotations

import torch

from nmsparse_deploy import models
from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.models.permutations import Permutations
from nmsparse_deploy.runs.inputs import hashes
from nmsparse_deploy.runs.manifest import InputsRecord
from nmsparse_deploy.runs.run_dir import RunDir


def load_pruned(run: RunDir, dtype: torch.dtype | None = None) -> LoadedModel:
    """Load what pruning made. Raises `UsageError` when the run is not pruned yet."""
    if not run.finished("prune"):
        raise UsageError(
            f"The run '{run.path}' is not pruned yet.",
            "nmsparse-deploy prune with the same options resumes it",
        )
    return models.load(str(run / "model"), dtype)


def load_dense(run: RunDir) -> LoadedModel:
    """Load the dense twin, its channels in the run's order.

    Raises `CheckFailed` when it is not the very model that the masks were found for, `UsageError`
    when another of its files has changed since.
    """
    recipe = run.manifest().recipe
    source = recipe.imported
    if source is not None and source.masks is None and source.sparse is None:
        raise NmsparseError(
            f"'{run.path}' was imported from a checkpoint that was sparse already; its dense twin is "
            "not known, so there is nothing to compare it with.",
            f"nmsparse-deploy import DENSE_MODEL --sparse '{recipe.model}'",
        )
    loaded = models.load(recipe.model)
    if (run / "permutations.safetensors").is_file():
        Permutations.load(run / "permutations.safetensors").apply(loaded.module)
    MaskSet.load(run / "masks.safetensors").check_base(dict(loaded.module.named_parameters()))
    run.check_inputs(InputsRecord(model=hashes(models.files(loaded.source))))
    return loaded
