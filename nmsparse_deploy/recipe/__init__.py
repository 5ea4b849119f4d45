"""What the user asked for: a recipe, validated before anything is loaded. Nothing here imports
torch."""

from nmsparse_deploy.recipe.calibration import AUTO, Calibration
from nmsparse_deploy.recipe.learn_settings import (
    AnyLearn,
    Augment,
    Learn,
    MaskLLM,
    MaskPro,
    ProxSparse,
)
from nmsparse_deploy.recipe.prune import CLOSED_FORM, DENSE, Prune, decided
from nmsparse_deploy.recipe.recipe import DEFAULT_MODEL, Recipe, differences, fingerprint, validate
from nmsparse_deploy.recipe.refine_steps import (
    Admm,
    AnyStep,
    Bias,
    Dsnot,
    Finetune,
    GroupDescent,
    LlmBarber,
    Reconstruct,
    Refit,
    Step,
    Swap,
    Training,
)
from nmsparse_deploy.recipe.section import Frozen
from nmsparse_deploy.recipe.stages import Allocate, Bench, Build, Evaluate, Export, Pack, Published

__all__ = [
    "AUTO",
    "CLOSED_FORM",
    "DEFAULT_MODEL",
    "DENSE",
    "Admm",
    "Allocate",
    "AnyLearn",
    "AnyStep",
    "Augment",
    "Bench",
    "Bias",
    "Build",
    "Calibration",
    "Dsnot",
    "Evaluate",
    "Export",
    "Finetune",
    "Frozen",
    "GroupDescent",
    "Learn",
    "LlmBarber",
    "MaskLLM",
    "MaskPro",
    "Pack",
    "ProxSparse",
    "Prune",
    "Published",
    "Recipe",
    "Reconstruct",
    "Refit",
    "Step",
    "Swap",
    "Training",
    "decided",
    "differences",
    "fingerprint",
    "validate",
]
