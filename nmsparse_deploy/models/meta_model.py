"""A model of a folder that holds a configuration but no weights: the right modules, nothing in their parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.models.adapters import diffusers as diffusion
from nmsparse_deploy.models.adapters import huggingface as hf
from nmsparse_deploy.models.adapters import timm as vision
from nmsparse_deploy.models.loaded import LoadedModel


def skeleton(folder: Path, dtype: torch.dtype) -> LoadedModel:
    """The model that the configuration in `folder` describes, its parameters on the meta device; buffers are real, and
    have the dtypes that they have when the library loads the model in `dtype`.

    Raises `UsageError` for a folder that describes no model.
    """
    if not (folder / "config.json").is_file():
        raise UsageError(f"'{folder}' does not describe a model: it has no config.json.")
    library = diffusion if diffusion.is_diffusers(str(folder)) else vision if vision.is_timm(str(folder)) else hf
    return library.empty(folder, dtype)


WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def description(folder: Path) -> list[Path]:
    """What describes a saved model beside its weights: configuration, tokenizer, preprocessing."""
    return [file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.endswith(WEIGHTS)]


def settle(module: Any, tensors: dict[str, Any]) -> None:
    """Put `tensors` by name into a skeleton; the same tensor under two names stays one parameter.

    Raises `AttributeError` for a name that it does not have, `ValueError` for a tensor of another shape.
    """
    made: dict[int, nn.Parameter] = {}
    for name, value in tensors.items():
        owner_path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_path)
        if leaf in owner._parameters:
            fits(module, name, tuple(value.shape))
            owner._parameters[leaf] = made.setdefault(id(value), nn.Parameter(value, requires_grad=False))
        else:
            owner._buffers[leaf] = value
    for child in module.modules():  # timm derives some buffers from where a parameter is
        if any(value is not None and value.is_meta for value in child._buffers.values()) \
                and hasattr(child, "init_non_persistent_buffers"):
            child.init_non_persistent_buffers()


def fits(module: Any, name: str, shape: tuple[int, ...]) -> None:
    """Raises `ValueError` when the parameter `name` has another shape."""
    wanted = tuple(module.get_parameter(name).shape)
    if wanted != shape:
        raise ValueError(f"'{name}' has the shape {shape}, not {wanted}")
