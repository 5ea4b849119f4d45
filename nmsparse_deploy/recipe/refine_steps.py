"""The refinement steps that a recipe may list, with their settings. The code of each is in
`refine/NAME.py`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, SerializeAsAny

from nmsparse_deploy.recipe.section import Frozen, one_of
from nmsparse_deploy.registry import REFINEMENTS


class Step(Frozen):
    """A refinement of the mask or of the weights that stay; `name` is that of its entry in the
    registry."""

    name: str

    @property
    def dense_stream(self) -> bool:
        """Whether it looks at what the dense model computes beside the pruned one."""
        return False

    def outlook(self, left: int) -> bool:
        """Return whether it looks at the model's output where `left` blocks are left, the present
        one included."""
        return False


class Training(Frozen):
    """Settings of every training run: how long, on what, judged how often."""

    steps: int = Field(200, ge=1, description="optimiser steps")
    batch: int | None = Field(
        None,
        ge=1,
        description="samples per optimiser step, calibration.batch of them at a "
        "time; left out: calibration.batch",
    )
    warmup: int = Field(0, ge=0, description="optimiser steps of rising learning rate")
    schedule: Literal["cosine", "linear"] = Field(
        "cosine", description="how the learning rate falls to `floor`"
    )
    floor: float = Field(
        0.1, ge=0, le=1, description="learning rate at the end as a share of its peak"
    )
    clip: float = Field(1.0, ge=0, description="largest gradient norm; 0 = no clipping")
    task: float = Field(1.0, ge=0, description="weight of the model's own loss (language models)")
    distill: float = Field(
        1.0, ge=0, description="weight of the divergence from the dense model's outputs"
    )
    temperature: float = Field(1.0, gt=0, description="of the distillation")
    holdout: float = Field(
        0.1, gt=0, lt=1, description="share of the batches that judges and is not trained on"
    )
    evaluate_every: int = Field(25, ge=1, description="steps between judgements of the hard mask")
    checkpoint_every: int = Field(50, ge=1, description="steps between checkpoints")
    gradient_checkpointing: bool = Field(
        False, description="recompute blocks in the backward pass (whole models)"
    )
    shard: bool = Field(
        False,
        description="split weights, trained values and optimiser over the processes of the run "
        "(FSDP2); false: every process holds all of them",
    )
    track: str | None = Field(
        None, description="one of accelerate's trackers: tensorboard, wandb, trackio..."
    )


class Refit(Step):
    """Least squares on the fixed mask."""

    name: Literal["refit"] = "refit"
    blend: float = Field(0.5, ge=0, le=1, description="share of the dense stream in the target")
    residual: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of the residual stream's drift that layers which "
        "write to it make up for",
    )
    steps: int = Field(20, ge=1, description="conjugate-gradient steps")
    damping: float = Field(0.01, gt=0, description="ridge relative to the normalised Gram")

    @property
    def dense_stream(self) -> bool:
        return self.blend > 0 or self.residual > 0


class Reconstruct(Step):
    """Gradient steps on the surviving weights, norms and biases of one block against the dense
    model's output."""

    name: Literal["reconstruct"] = "reconstruct"
    unit: Literal["half", "block"] = Field(
        "block", description="all together, or attention before MLP"
    )
    epochs: int = Field(5, ge=1, description="passes over the calibration batches, per unit")
    rate: float = Field(
        1.5e-3, gt=0, description="learning rate of Adam at the start; falls to zero along a cosine"
    )
    holdout: float = Field(
        0.1, ge=0, lt=1, description="share of the batches that decides when to stop"
    )
    through: int = Field(
        0,
        ge=0,
        description="how many of the last blocks are trained on what the model makes of "
        "their output, instead of on the output",
    )

    @property
    def dense_stream(self) -> bool:
        return True

    def outlook(self, left: int) -> bool:
        return left <= self.through


class GroupDescent(Step):
    """A better mask for the original weights: every pattern of every group, one group at a time."""

    name: Literal["group-descent"] = "group-descent"
    sweeps: int = Field(
        20, ge=1, description="passes over the groups at most; a row without a change is done"
    )
    protect: float = Field(
        0.0, ge=0, le=1, description="share of a row's kept weights, highest |w|·‖X‖, that stay"
    )


class Swap(Step):
    """A better mask for the original weights: the best exchange of two weights of a group in every
    row, repeatedly."""

    name: Literal["swap"] = "swap"
    steps: int = Field(100, ge=1, description="swaps per row at most")
    protect: float = Field(
        0.0, ge=0, le=1, description="share of a row's kept weights, highest |w|·‖X‖, that stay"
    )


class Dsnot(Step):
    """A mask for the original weights whose mean error is small."""

    name: Literal["dsnot"] = "dsnot"
    cycles: int = Field(50, ge=1, description="swaps per row at most")
    threshold: float = Field(
        0.1, ge=0, description="a row whose mean error is smaller than this is done"
    )


class Admm(Step):
    """Weights by ADMM, on the given mask or on one that is tightened on the way."""

    name: Literal["admm"] = "admm"
    steps: int = Field(20, ge=1, description="iterations")
    damping: float = Field(0.1, gt=0, description="ridge relative to the normalised Gram")
    rho: float = Field(
        1.0, gt=0, description="penalty that ties weights and mask, relative to the normalised Gram"
    )
    gradual: bool = Field(True, description="choose the mask on the way; false keeps the given one")


class Bias(Step):
    """Biases that make the mean error of every output zero; layers without one are left alone."""

    name: Literal["bias"] = "bias"


class LlmBarber(Step):
    """Swaps of kept and pruned weights where the loss of attention or MLP says so."""

    name: Literal["llm-barber"] = "llm-barber"
    share: float = Field(
        0.01,
        gt=0,
        le=1,
        description="of the groups of a row that would gain, how many swap a pair; "
        "0.01 after Wanda or SparseGPT, 0.1 after magnitude",
    )


class Finetune(Step, Training):
    """Training of what survives in the whole model, with the dense one as the teacher. Comes
    last."""

    name: Literal["finetune"] = "finetune"
    how: Literal["fixed", "sr-ste", "s-ste", "adapters"] = Field(
        "fixed",
        description="fixed: the mask stays; sr-ste, s-ste: it follows the weights until it is frozen; "
        "adapters: low-rank, merged under the mask",
    )
    rate: float = Field(1e-4, gt=0, description="learning rate of AdamW at its peak")
    warmup: int = Field(20, ge=0, description="optimiser steps of rising learning rate")
    task: float = Field(1 / 3, ge=0, description="weight of the model's own loss (language models)")
    distill: float = Field(
        2 / 3, ge=0, description="weight of the divergence from the dense model's outputs"
    )
    refresh: int = Field(10, ge=1, description="steps between two looks at the mask (sr-ste)")
    frozen: float = Field(
        0.2, ge=0, lt=1, description="share of the steps, at the end, with the mask fixed"
    )
    decay: float = Field(
        2e-4, ge=0, description="pull of pruned weights to zero, in the gradient (sr-ste)"
    )
    rank: int = Field(16, ge=1, description="of the adapters")
    prior_samples: int = Field(
        0, ge=0, description="calibration samples for the method and the steps before; 0: all"
    )

    @property
    def moves_mask(self) -> bool:
        return self.how in ("sr-ste", "s-ste")


_OWN = Annotated[
    Admm | Bias | Dsnot | Finetune | GroupDescent | LlmBarber | Reconstruct | Refit | Swap,
    Field(discriminator="name"),
]

AnyStep = Annotated[Step, one_of(_OWN, REFINEMENTS, Step), SerializeAsAny()]
"""A step of the recipe: one of ours, told apart by `name`, or of a plug-in."""
