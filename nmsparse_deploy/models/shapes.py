"""A model of the right shapes without weights: what a recipe would cost is known before the model is here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nmsparse_deploy.errors import NmsparseError, UsageError, first_line
from nmsparse_deploy.models.adapters import huggingface as hf
from nmsparse_deploy.models.adapters import timm as vision
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.models.preprocess import from_config
from nmsparse_deploy.system.assets import assets


def shapes(source: str, config: Mapping[str, Any] | None = None) -> LoadedModel:
    """The model with every parameter on the meta device; no weight is read and nothing is downloaded.

    What it looks like is told by `config` (entries of a config.json; Transformers fills in the rest), by a packaged
    model, by the config of a local folder, or by timm. Raises `UsageError` when it is not told, `MissingExtra` for a
    timm name without timm.
    """
    if source.startswith(vision.PREFIX):
        return vision.shapes(source)
    config = assets()[source].config if config is None and source in assets() else config
    if config is None and (Path(source) / "config.json").is_file() and not vision.is_timm(source):
        return _transformers(source, source)
    if config is None:
        raise UsageError(f"What '{source}' looks like is not known on this machine, so its cost cannot be predicted.",
                         "put its config.json under 'config:' of the recipe")
    if "model_type" not in config:
        raise UsageError("The section config of the recipe names no model_type.")
    return _transformers(source, dict(config))


def _transformers(source: str, told: str | dict[str, Any]) -> LoadedModel:
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        if isinstance(told, str):
            config = transformers.AutoConfig.from_pretrained(told, local_files_only=True)
        else:
            kind = told.pop("model_type")
            config = transformers.AutoConfig.for_model(kind, **told)
        auto = hf.auto_class(config)
        dtype = getattr(config, "dtype", None) or torch.float32
        with torch.device("meta"):
            # Other attention implementations look into the mask, and there is nothing to see.
            module: Any = getattr(transformers, auto).from_config(config, attn_implementation="eager", dtype=dtype)
    except NmsparseError:
        raise
    except Exception as error:
        raise UsageError(f"The config of '{source}' makes no model: {first_line(error)}.") from error
    family = hf.family(module, auto)
    processor = from_config(config) if family == "vision" else None
    return LoadedModel(module.eval(), source, source.rpartition("/")[2], family, processor=processor)
