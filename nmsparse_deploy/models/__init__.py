"""Model families. `load` resolves what the user typed."""

from __future__ import annotations

from pathlib import Path

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
