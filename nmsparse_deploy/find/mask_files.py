"""Read masks that other tools wrote, or another run.

* `.npz`: one array per weight, the bits of the row-major mask packed eight to a byte, highest
  first, under the weight's name with `.mask` (MaskLLM, Fang et al., 2024, as released).
* `.pt` or `.safetensors`: a table of masks by name; or a folder with one file per weight, named
  after it (ProxSparse and MaskPro as released). Pickles are read with `weights_only=True`; code in
  a file is never run.
* `masks.safetensors` of a run.
* a checkpoint of NVIDIA ModelOpt that was saved before its export: dense weights, each with its
  `_weight_mask`.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nmsparse_deploy.errors import UsageError, first_line
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.models.base import Target
from nmsparse_deploy.models.state_dict import read_state_dict

FILES = (".npz", ".pt", ".pth", ".bin", ".safetensors")


MODELOPT = "._weight_mask"
"""Ends the name of a mask beside the weights of a checkpoint of NVIDIA ModelOpt."""


MAX_BYTES = 1 << 34
"""Bytes of masks that a file may unpack to; a small archive can claim any size."""


def read_masks(
    path: Path, targets: Mapping[str, Target], weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Read masks by parameter name, in the weights' shapes. Raises `UsageError`."""
    if path.is_dir():
        return _folder(path, targets, weights)
    if not path.is_file():
        raise UsageError(f"There is no mask file '{path}'.")
    if path.suffix not in FILES:
        raise UsageError(
            f"'{path}' is no kind of mask file that is known here.", f"one of: {', '.join(FILES)}"
        )
    table: Mapping[str, Any]
    if path.suffix == ".npz":
        table = _npz(path)
    elif MaskSet.wrote(path):
        table = {name: mask.unpack() for name, mask in MaskSet.load(path).masks.items()}
    else:
        table = read_state_dict(path)
    table = {key: value for key, value in table.items() if key.endswith(MODELOPT)} or table
    if not table:
        raise UsageError(f"'{path}' holds no masks.")
    named = {key: _parameter(key, path, targets) for key in table}
    return {name: _mask(table[key], key, weights[name], path) for key, name in named.items()}


def _npz(path: Path) -> dict[str, np.ndarray]:
    """Read arrays by name; sizes are checked before anything is unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(entry.file_size for entry in archive.infolist())
        if claimed > MAX_BYTES:
            raise UsageError(
                f"'{path}' claims to unpack to {claimed:,} bytes, more than any model's masks take."
            )
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, KeyError, OSError) as error:
        raise UsageError(
            f"The mask file '{path}' is damaged or truncated: {first_line(error)}."
        ) from error


def _folder(
    path: Path, targets: Mapping[str, Target], weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Read one file per weight, named after it."""
    files = sorted(file for file in path.iterdir() if file.suffix in FILES)
    if not files:
        raise UsageError(f"'{path}' holds no mask files ({', '.join(FILES)}).")
    masks = {}
    for file in files:
        name = _parameter(file.stem, path, targets)
        masks[name] = _mask(_single(file), file.name, weights[name], file)
    return masks


def _single(path: Path) -> Any:
    """Read the one tensor of a file, bare or in a table."""
    import pickle

    if path.suffix in (".npz", ".safetensors"):
        table: Any = _npz(path) if path.suffix == ".npz" else read_state_dict(path)
    else:
        try:
            table = torch.load(path, "cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise UsageError(
                f"'{path}' holds more than tensors, and code from a file is never run.",
                "save the mask alone",
            ) from error
        except (RuntimeError, EOFError, ValueError, KeyError) as error:
            raise UsageError(f"The mask file '{path}' is damaged or truncated.") from error
    values = list(table.values()) if isinstance(table, dict) else [table]
    if len(values) != 1 or not isinstance(values[0], (torch.Tensor, np.ndarray)):
        raise UsageError(f"'{path}' should hold one mask and holds {len(values)} values.")
    return values[0]


def _parameter(key: str, path: Path, targets: Mapping[str, Target]) -> str:
    """Find the parameter that a foreign key means: `X.weight`, `X.weight.mask`, `X._weight_mask`,
    `X.mask` or `X`."""
    bare = ".".join(part for part in key.split(".") if part not in ("mask", MODELOPT.strip(".")))
    for name in (bare, f"{bare}.weight"):
        if name in targets:
            return name
    raise UsageError(
        f"'{path}' has a mask for '{key[:120]}', which is no prunable parameter of this model.",
        "nmsparse-deploy inspect lists them",
    )


def _mask(value: Any, key: str, weight: torch.Tensor, path: Path) -> torch.Tensor:
    """Make a mask in the weight's shape, from booleans, from numbers that are 0 and 1, or from
    packed bits."""
    shape, size = tuple(weight.shape), weight.numel()
    if (
        isinstance(value, np.ndarray)
        and value.dtype == np.uint8
        and value.ndim == 1
        and value.size == -(-size // 8)
    ):
        return torch.from_numpy(np.unpackbits(value, count=size).astype(bool)).view(shape)
    tensor = torch.as_tensor(value)
    if tuple(tensor.shape) != shape:
        raise UsageError(
            f"The mask '{key}' of '{path}' has shape {list(tensor.shape)}; its weight has {list(shape)}."
        )
    if tensor.dtype != torch.bool and not bool(((tensor == 0) | (tensor == 1)).all()):
        raise UsageError(f"The mask '{key}' of '{path}' holds other values than 0 and 1.")
    return tensor.bool()
