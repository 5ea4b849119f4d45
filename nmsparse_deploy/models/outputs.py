"""What a forward pass returns: a tensor, or one of the structures that the libraries put around
it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch

from nmsparse_deploy.errors import NmsparseError

FIELDS = ("logits", "last_hidden_state", "sample")
"""Which field is the output itself, in this order."""
UNNAMED = "output"


class PrimaryOutput(NamedTuple):
    """The tensor that a model is judged by, and its field; `output` where the model returns it
    without a name."""

    name: str
    value: torch.Tensor

    @property
    def kind(self) -> Literal["logits", "features"]:
        return "logits" if self.name == "logits" else "features"


def primary_output(outputs: Any, field: str | None = None) -> PrimaryOutput:
    """Return the logits, final hidden states or prediction of a forward pass, or its `field`.

    Raises `NmsparseError` where there is none.
    """
    if isinstance(outputs, torch.Tensor):
        return PrimaryOutput(field or UNNAMED, outputs)
    if isinstance(outputs, (tuple, list)) and outputs and isinstance(outputs[0], torch.Tensor):
        return PrimaryOutput(field or UNNAMED, outputs[0])
    for name in (field,) if field else FIELDS:
        value = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
        if isinstance(value, torch.Tensor):
            return PrimaryOutput(name, value)
    wanted = f"'{field}'" if field else " or ".join(f"'{name}'" for name in FIELDS)
    raise NmsparseError(f"The model returns no {wanted}, but a {type(outputs).__name__}.")


class Features(NamedTuple):
    """The answer of a model to a batch, one row a sample; None for what the model or the graph does
    not return.

    `pooled` [samples, width] is the class token of a vision model that has one, the mean of its
    tokens otherwise, and the mean over a sequence's own tokens for text.
    """

    pooled: torch.Tensor | None
    tokens: torch.Tensor | None
    logits: torch.Tensor | None
