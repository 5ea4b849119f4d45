"""Tensors by name from files of any library, without running what a pickle may hold."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from nmsparse_deploy.errors import UsageError, first_line

_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict")


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Read tensors by name from safetensors, or from a file of torch.save that holds nothing but
    tensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UsageError(f"There is no checkpoint '{path}'.")
    try:
        state: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, "cpu", weights_only=True)
        )
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"'{path}' holds more than tensors, and code from a file is never run.",
            "save its state_dict as safetensors",
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UsageError(
            f"The checkpoint '{path}' is damaged or truncated: {first_line(error)}."
        ) from error
    state = next(
        (
            state[key]
            for key in _NESTED
            if isinstance(state, dict) and isinstance(state.get(key), dict)
        ),
        state,
    )
    if not isinstance(state, dict) or not all(
        isinstance(value, torch.Tensor) for value in state.values()
    ):
        raise UsageError(f"'{path}' is not a checkpoint: it holds no table of tensors.")
    return {str(key).removeprefix("module."): value for key, value in state.items()}
