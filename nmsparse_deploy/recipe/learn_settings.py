"""The section `learn:` of a recipe: the settings of the learned methods. The code of each is in
`methods/NAME.py`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, SerializeAsAny, field_validator

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.recipe.refine_steps import Training
from nmsparse_deploy.recipe.section import Frozen, one_of
from nmsparse_deploy.registry import LEARNERS, METHODS

Objective = Literal["auto", "block", "global"]
STEPS = {"block": 60, "global": 1000}
STEP_SIZES = {"block": 2.0, "global": 1.0}
FORWARDS = 10
"""How many times as many steps a method takes that learns from forward passes alone."""


def is_file(prior: str) -> bool:
    """Return whether a prior is a mask file, and not a method."""
    return prior.endswith(".safetensors")


class Augment(Frozen):
    """Augmentation of training images by timm's own factories; the defaults are those of
    MaskLLM-4V."""

    policy: str = Field("rand-m8-inc1", description="timm's name of a policy; empty: none")
    erasing: float = Field(0.15, ge=0, le=1, description="probability that a part is erased")
    mixup: float = Field(0.8, ge=0)
    cutmix: float = Field(1.0, ge=0)
    smoothing: float = Field(0.1, ge=0, lt=1, description="of the labels")


class Learn(Training):
    """Settings of every learned method: how long, on what, judged how often. `name` is that of the
    method."""

    name: str
    objective: Objective = Field(
        "auto",
        description="what a learned method learns from: block, the output of one "
        "dense block; global, the whole model's loss; auto, global where there is a GPU",
    )
    steps: int = Field(
        0,
        ge=0,
        description="optimiser steps of a learned method, of every block with the block "
        "objective; 0: 60 for a block, 1000 for a whole model",
    )
    priors: tuple[str, ...] = Field(
        ("magnitude", "wanda", "sparsegpt-mask"),
        min_length=1,
        description="one-shot methods, or masks.safetensors files of the same model "
        "and pattern; learning starts from the best mask among them",
    )
    prior_samples: int = Field(
        64, ge=1, description="calibration samples for the priors (global objective)"
    )
    task: float = Field(
        1.0,
        ge=0,
        description="weight of the model's own loss (global; language models, and "
        "images with labels)",
    )
    distill: float = Field(
        1.0, ge=0, description="weight of the divergence from the dense model's outputs (global)"
    )
    labels: bool = Field(
        False, description="learn from the classes that the images' folders name (global, vision)"
    )
    augment: Augment | None = Field(
        None, description="augment the images that are learned from (global, vision)"
    )

    def settled(self, objective: Literal["block", "global"]) -> Self:
        """Return the same settings with the objective, the steps and their size decided."""
        if objective == "block" and (self.labels or self.augment):
            raise UsageError(
                "Labels and augmentation are for masks that are learned through the whole model.",
                "--objective global",
            )
        return self.model_copy(
            update={"objective": objective, "steps": self.steps or STEPS[objective]}
        )

    @field_validator("priors")
    @classmethod
    def _known_priors(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not is_file(name):
                METHODS.check(name)
        return names

    @property
    def scope(self) -> Literal["block", "global"]:
        """The objective of settled settings."""
        if self.objective == "auto":
            raise ValueError("The recipe is not settled yet: its objective is 'auto'.")
        return self.objective

    @property
    def prior_methods(self) -> tuple[str, ...]:
        return tuple(name for name in self.priors if not is_file(name))

    @property
    def prior_files(self) -> tuple[str, ...]:
        return tuple(name for name in self.priors if is_file(name))


class MaskLLM(Learn):
    """A distribution over the masks of every group, learned by gradient."""

    name: Literal["maskllm"] = "maskllm"
    form: Literal["auto", "candidates", "compact", "scores"] = Field(
        "auto",
        description="a logit per candidate, a logit per weight, or straight-through scores; auto: candidates "
        "up to ten of them, compact beyond",
    )
    confidence: float = Field(
        0.83, gt=0, lt=1, description="probability of the prior's candidate at the start"
    )
    step_size: float = Field(
        0.0,
        ge=0,
        description="learning rate times the last kappa; 0: 2 for a block, 1 for a "
        "whole model; much more makes masks worse",
    )
    kappa: tuple[float, float] = Field(
        (100.0, 500.0), description="scale of the logits, first and last step"
    )
    tau: tuple[float, float] = Field(
        (1.0, 0.05), description="temperature of the samples, first and last step"
    )
    noise: bool = Field(True, description="sample candidates; false: anneal without noise")
    regulariser: float = Field(1e-5, ge=0, description="reward for large kept weights")
    decay: float = Field(0.0, ge=0, description="weight decay on the logits")
    moments: Literal[8, 32] = Field(32, description="bits of each of AdamW's two moments")

    def settled(self, objective: Literal["block", "global"]) -> Self:
        done = super().settled(objective)
        return done.model_copy(update={"step_size": self.step_size or STEP_SIZES[objective]})


class ProxSparse(Learn):
    """A copy of the weights that is drawn towards the pattern, and whose support is the mask."""

    name: Literal["proxsparse"] = "proxsparse"
    pressure: float = Field(
        2.0, ge=0, description="strength of all proximal steps together, relative to each matrix"
    )
    reach: float = Field(
        2.0,
        gt=0,
        description="how far a weight can be carried over the run, in root mean squares of "
        "its matrix; sets the learning rate",
    )
    lambda1: float | None = Field(
        None, ge=0, description="strength of one step as published, instead of pressure"
    )
    rate: float | None = Field(
        None, gt=0, description="learning rate as published, instead of reach"
    )
    lambda2: float = Field(
        0.0, ge=0, description="weight of the term that holds weights near their original values"
    )
    epsilon: float = Field(
        0.1, gt=0, description="keeps that term finite where the original weight is small"
    )


class MaskPro(Learn):
    """A logit per weight, learned from forward passes alone."""

    name: Literal["maskpro"] = "maskpro"
    clip: float = Field(0.0, ge=0, description="largest gradient norm; 0 = no clipping")
    floor: float = Field(
        1.0, ge=0, le=1, description="learning rate at the end as a share of its peak"
    )
    flips: float = Field(
        300.0, gt=0, description="groups that differ from the prior in a draw, at the start"
    )
    step_size: float = Field(
        0.05, gt=0, description="share of C that a usual residual moves the logit of a drawn weight"
    )
    magnitude: float | None = Field(
        None, gt=0, description="C, the logit of the prior's weights, instead of flips"
    )
    rate: float | None = Field(
        None, gt=0, description="learning rate as published, instead of step_size"
    )

    def settled(self, objective: Literal["block", "global"]) -> Self:
        """Return the same settings decided, with more steps: forward passes are cheap and tell
        little."""
        steps = {name: FORWARDS * count for name, count in STEPS.items()}[objective]
        return super().settled(objective).model_copy(update={"steps": self.steps or steps})


_OWN = Annotated[MaskLLM | MaskPro | ProxSparse, Field(discriminator="name")]

AnyLearn = Annotated[Learn, one_of(_OWN, LEARNERS, Learn), SerializeAsAny()]
"""The section of a learned method: one of ours, told apart by `name`, or of a plug-in."""
