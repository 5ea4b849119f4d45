"""Quantised checkpoints: their weights are codes that only make sense with scales, so they are
refused before any work.

Pruned as if they were dense, the codes would be saved without their scales, and nothing would fail.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.prove.tensor_files import StoredTensor, find_tensors

CONFIG = "hf_quant_config.json"
"""Where ModelOpt describes what it did, beside or instead of config.json."""
NAMES = re.compile(
    r"(weight_scale(_inv|_2)?|weight_packed|qweight|qzeros|_blocks|\.SCB|weight\.absmax|\.quant_map)$"
)
"""How tensors of quantised checkpoints end; `position_ids` and other whole numbers of dense ones do
not."""
DTYPES = re.compile(r"F[468]_|F4$")
CODES = {"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"}


def refuse(source: str, folder: Path | None, config: object) -> None:
    """Raise `UsageError` for a checkpoint that is quantised, by its configuration or by what its
    files hold.

    `config` is the `quantization_config` of the model, and `folder` has its files, if they are on
    this machine.
    """
    scheme = _scheme(config) if config else _described(folder) if folder is not None else None
    tensor = _quantised_tensor(folder) if folder is not None else None
    if scheme is None and tensor is None:
        return
    named = f"; '{tensor.name}' is stored as {tensor.dtype}" if tensor is not None else ""
    raise UsageError(
        f"'{source}' is quantised ({scheme or 'by no scheme that its config.json names'}{named}), "
        "and only dense weights can be pruned.",
        "dequantise it first with the tool that made it, or start from the checkpoint it was made from",
    )


def _scheme(config: object) -> str:
    settings: Mapping[str, Any] = (
        config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    )
    inner = settings.get("quantization")
    settings = inner if isinstance(inner, Mapping) else settings
    words = (settings.get(key) for key in ("quant_method", "quant_algo", "format"))
    # Settings read by the library hold the member of an enumeration.
    texts = [str(getattr(word, "value", word)) for word in words if word]
    return " ".join(dict.fromkeys(texts)) or "quantization_config"


def _described(folder: Path) -> str | None:
    try:
        return _scheme(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return CONFIG


def _quantised_tensor(folder: Path) -> StoredTensor | None:
    try:
        tensors = find_tensors(folder)
    except UsageError:  # whoever reads the weights says what is wrong with the files
        return None
    return next(
        (
            tensor
            for tensor in tensors
            if NAMES.search(tensor.name)
            or DTYPES.match(tensor.dtype)
            or (tensor.dtype in CODES and tensor.name.endswith(".weight") and len(tensor.shape) > 1)
        ),
        None,
    )
