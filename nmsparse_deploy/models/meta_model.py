"""A model whose parameters have no values yet: what describes it in a folder, and how tensors are
put into it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nmsparse_deploy.models.model_folder import is_weight


def description(folder: Path) -> list[Path]:
    """List what describes a saved model beside its weights: configuration, tokenizer,
    preprocessing."""
    return [file for file in sorted(folder.iterdir()) if file.is_file() and not is_weight(file)]


def settle(module: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put `tensors` by name into a model without weights; the same tensor under two names stays one
    parameter.

    Raises `AttributeError` for a name that it does not have, `ValueError` for a tensor of another
    shape.
    """
    made: dict[int, nn.Parameter] = {}
    for name, value in tensors.items():
        owner_path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_path)
        if leaf in owner._parameters:
            fits(module, name, tuple(value.shape))
            owner._parameters[leaf] = made.setdefault(
                id(value), nn.Parameter(value, requires_grad=False)
            )
        else:
            owner._buffers[leaf] = value
    for child in module.modules():  # timm derives some buffers from where a parameter is
        if any(
            value is not None and value.is_meta for value in child._buffers.values()
        ) and hasattr(child, "init_non_persistent_buffers"):
            child.init_non_persistent_buffers()


def fits(module: Any, name: str, shape: tuple[int, ...]) -> None:
    """Raise `ValueError` when the parameter `name` has another shape."""
    wanted = tuple(module.get_parameter(name).shape)
    if wanted != shape:
        raise ValueError(f"'{name}' has the shape {shape}, not {wanted}")
