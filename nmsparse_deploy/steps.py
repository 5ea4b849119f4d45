"""The refinement steps that a recipe may list, with their settings. The code of each is in `refine/NAME.py`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Frozen(BaseModel):
    """Part of a recipe: immutable, and unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Step(Frozen):
    """A refinement of the mask or of the weights that stay; `name` is that of its file in `refine/`."""

    @property
    def dense_stream(self) -> bool:
        """Does it look at what the dense model computes beside the pruned one?"""
        return False


class Refit(Step):
    """Least squares on the fixed mask."""

    name: Literal["refit"] = "refit"
    blend: float = Field(0.25, ge=0, le=1, description="share of the dense stream in the target")
    steps: int = Field(20, ge=1, description="conjugate-gradient steps")
    damping: float = Field(0.01, gt=0, description="ridge relative to the normalised Gram")

    @property
    def dense_stream(self) -> bool:
        return self.blend > 0


class Reconstruct(Step):
    """Gradient steps on the surviving weights, norms and biases of one block against the dense model's output."""

    name: Literal["reconstruct"] = "reconstruct"
    unit: Literal["half", "block"] = Field("half", description="attention and MLP one after the other, or together")
    epochs: int = Field(4, ge=1, description="passes over the calibration batches, per unit")
    rate: float = Field(3e-4, gt=0, description="learning rate of Adam at the start; falls to zero along a cosine")
    holdout: float = Field(0.1, ge=0, lt=1, description="share of the batches that decides when to stop")

    @property
    def dense_stream(self) -> bool:
        return True


class LlmBarber(Step):
    """Swaps of kept and pruned weights where the loss of attention or MLP says so."""

    name: Literal["llm-barber"] = "llm-barber"
    share: float = Field(0.01, gt=0, le=1, description="of the groups of a row that would gain, how many swap a pair; "
                         "0.01 after Wanda or SparseGPT, 0.1 after magnitude")


AnyStep = Annotated[Refit | Reconstruct | LlmBarber, Field(discriminator="name")]
