"""A model of a folder that holds a configuration but no weights: the right modules, nothing in their parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UsageError
from . import hf, vision
from .base import LoadedModel


def skeleton(folder: Path) -> LoadedModel:
    """The model that the configuration in `folder` describes, its parameters on the meta device; buffers are real.

    Raises `UsageError` for a folder that describes no model.
    """
    from accelerate import init_empty_weights

    if not (folder / "config.json").is_file():
        raise UsageError(f"'{folder}' does not describe a model: it has no config.json.")
    with init_empty_weights(include_buffers=False):
        return vision.empty(folder) if vision.is_timm(str(folder)) else hf.empty(folder)


WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def description(folder: Path) -> list[Path]:
    """What describes a saved model beside its weights: configuration, tokenizer, preprocessing."""
    return [file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.endswith(WEIGHTS)]


def settle(module: Any, tensors: dict[str, Any]) -> None:
    """Put `tensors` by name into a skeleton; the same tensor under two names stays one parameter."""
    from torch import nn

    made: dict[int, nn.Parameter] = {}
    for name, value in tensors.items():
        owner_path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_path)
        if leaf in owner._parameters:
            owner._parameters[leaf] = made.setdefault(id(value), nn.Parameter(value, requires_grad=False))
        else:
            owner._buffers[leaf] = value
