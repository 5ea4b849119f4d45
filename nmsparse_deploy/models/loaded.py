"""A pretrained model with what the later stages need to know about it, and what a model library has to answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from nmsparse_deploy.models.weights import WHOLE, Weights


@dataclass
class LoadedModel:
    """A pretrained model in memory with what the later stages need to know about it."""

    module: nn.Module
    source: str
    """What the user can type to load the same model again."""
    name: str
    """A short name for folders and headings."""
    family: str
    """`llm`, `encoder`, `seq2seq` or `vision`: which data it eats and which metric it is judged by."""
    library: str = "transformers"
    """Which adapter loads and saves it: `transformers` or `timm`."""
    processor: Any = None
    """Tokenizer (text) or preprocessing settings (images)."""
    provenance: dict[str, str] = field(default_factory=dict)
    """Revision, file hashes, dtype, library versions."""
    weights: Weights = WHOLE

    @property
    def streamed(self) -> bool:
        """Do the weights stay in their files?"""
        return self.weights.device is not None

    def to(self, device: torch.device) -> None:
        """Compute on `device` from now on."""
        if self.streamed:
            self.weights.to(device)
        else:
            self.module.to(device)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.weights.device or next(self.module.parameters()).device


class ModelAdapter(Protocol):
    """A module of this folder, one per library. Discovery and the block walk need nothing that is specific to one."""

    def load(self, source: str, dtype: torch.dtype | None = None) -> LoadedModel: ...

    def sample_inputs(self, model: LoadedModel, batch: int = 2, length: int = 16) -> dict[str, torch.Tensor]:
        """Keyword arguments for one forward pass, for tracing and for export; `length` is in tokens (text only)."""
        ...

    def save(self, model: LoadedModel, folder: Path) -> None:
        """Write a folder that the stock library loads."""
        ...
