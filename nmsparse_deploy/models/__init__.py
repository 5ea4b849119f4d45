"""Model families. `load` resolves what the user typed; the rest dispatches to the library that loaded the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..assets import assets, fetch
from ..errors import NmsparseError
from . import hf
from .base import LoadedModel


def short_name(source: str) -> str:
    """A model's name for folders and headings, known without loading it."""
    if source in assets():
        return assets()[source].name or source
    path = Path(source)
    return path.stem if path.suffix == ".gguf" else path.name


def load(source: str, dtype: torch.dtype | None = None) -> LoadedModel:
    """Load MODEL: `demo`, a hub name, a folder, or a GGUF file."""
    if source == "demo":
        asset = assets()["demo"]
        try:
            folder = fetch("demo")
        except NmsparseError:
            assert asset.hub is not None
            return hf.load(asset.hub, dtype, source, asset.name)
        return hf.load(str(folder / asset.files[0]), dtype, source, asset.name)
    return hf.load(source, dtype)


def sample_inputs(model: LoadedModel, batch: int = 2, length: int = 16) -> dict[str, torch.Tensor]:
    """Keyword arguments for one forward pass of the right shapes; `length` is in tokens (text only)."""
    return hf.sample_inputs(model, batch, length)


def save(model: LoadedModel, folder: Path) -> None:
    """Write a folder that the stock library loads."""
    hf.save(model, folder)


def batches(model: LoadedModel, inputs: Mapping[str, torch.Tensor], size: int) -> list[dict[str, Any]]:
    """Inputs `[samples, ...]` as keyword arguments of forward passes on the model's device, `size` samples each."""
    device = next(model.module.parameters()).device
    extra: dict[str, Any] = {"use_cache": False} if model.family == "llm" else {}  # a cache would only cost memory
    parts = {name: value.to(device).split(size) for name, value in inputs.items()}
    return [{**dict(zip(parts, row)), **extra} for row in zip(*parts.values())]
