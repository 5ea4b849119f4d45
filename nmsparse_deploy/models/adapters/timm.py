"""timm models: `timm:NAME` with the weights of the hub, `timm:NAME?checkpoint=FILE`, or a folder that timm wrote."""

from __future__ import annotations

import json
import os
import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nmsparse_deploy.errors import MissingExtra, NmsparseError, UsageError, first_line
from nmsparse_deploy.models.adapters.huggingface import snapshot
from nmsparse_deploy.models.hub_errors import refusal
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.models.preprocess import BICUBIC, Preprocess

PREFIX = "timm:"
INPUT = "x"
"""timm's forward takes its pictures under this name."""
_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict")
_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": BICUBIC, "box": 4, "hamming": 5}


def is_timm(source: str) -> bool:
    """A timm name, or a folder that timm wrote?"""
    return source.startswith(PREFIX) or _is_folder(Path(source))


def is_name(name: str) -> bool:
    """An architecture timm knows, where timm is installed?"""
    return find_spec("timm") is not None and bool(_timm().is_model(name.partition(".")[0]))


def _is_folder(path: Path) -> bool:
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "architecture" in config and "model_type" not in config


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise MissingExtra("timm", "vision", "A timm model") from error
    except RuntimeError as error:
        raise NmsparseError(f"timm cannot be imported: {first_line(error)}.",
                            "install the torchvision build that belongs to this build of torch") from error
    return timm


def load(source: str, dtype: torch.dtype | None = None) -> LoadedModel:
    """Load a timm model on the CPU.

    Raises `UsageError` for an unknown name or a checkpoint that does not fit, `MissingExtra` without timm,
    `NmsparseError` when the weights cannot be reached.
    """
    from huggingface_hub.utils import logging

    timm = _timm()
    logging.set_verbosity_error()  # a hub that does not answer is reported once, below
    name, _, query = source.removeprefix(PREFIX).partition("?")
    option, _, checkpoint = query.partition("=")
    if query and (option != "checkpoint" or not checkpoint):
        raise UsageError(f"'{source}' is not understood.", "write timm:NAME?checkpoint=FILE")
    try:
        if not source.startswith(PREFIX):
            module = timm.create_model(f"local-dir:{Path(source).resolve()}", pretrained=True)
            name = Path(source).name
        elif checkpoint:
            module = _from_checkpoint(timm, name, Path(checkpoint).expanduser())
        else:
            module = timm.create_model(name, pretrained=True)
    except NmsparseError:
        raise
    except Exception as error:
        raise _explain(error, source, name, timm) from error
    module = module.eval().to(dtype) if dtype else module.eval()
    commit = None if checkpoint or not source.startswith(PREFIX) else _commit(module.pretrained_cfg)
    facts = {**({"revision": commit} if commit else {}), "class": type(module).__name__,
             "architecture": str(module.pretrained_cfg.get("architecture", name)),
             "dtype": str(next(module.parameters()).dtype).removeprefix("torch.")}
    return LoadedModel(module, source, name.rpartition("/")[2], "vision", "timm", _preprocess(timm, module), facts)


def _commit(about: dict[str, Any]) -> str | None:
    """Which commit of the hub the weights came from; timm does not say, so the cache is asked."""
    name, _, revision = str(about.get("hf_hub_id") or "").partition("@")
    files = filter(None, (about.get("hf_hub_filename"), "model.safetensors", "pytorch_model.bin"))
    found = next(filter(None, (snapshot(name, file, revision or None) for file in files)), None) if name else None
    return found.name if found else None


def empty(folder: Path, dtype: torch.dtype) -> LoadedModel:
    """The model of a folder as its configuration describes it, without its weights. Raises `UsageError`."""
    from accelerate import init_empty_weights

    timm = _timm()
    try:
        with init_empty_weights(include_buffers=False):
            module = timm.create_model(f"local-dir:{folder.resolve()}", pretrained=False).eval().to(dtype)
    except Exception as error:
        raise _explain(error, str(folder), folder.name, timm) from error
    return LoadedModel(module, str(folder), folder.name, "vision", "timm", _preprocess(timm, module),
                       {"class": type(module).__name__})


def shapes(source: str) -> LoadedModel:
    """An architecture of timm with every parameter on the meta device. Raises like `load`."""
    timm = _timm()
    name = source.removeprefix(PREFIX).partition("?")[0]
    try:
        with torch.device("meta"):
            module = timm.create_model(name, pretrained=False)
    except Exception as error:
        raise _explain(error, source, name, timm) from error
    return LoadedModel(module.eval(), source, name, "vision", "timm", _preprocess(timm, module))


def _from_checkpoint(timm: Any, name: str, path: Path) -> nn.Module:
    state = read_state(path)
    head = timm.create_model(name, pretrained=False).pretrained_cfg.get("classifier") or "head"
    weight = state.get(f"{head if isinstance(head, str) else head[0]}.weight")
    module = timm.create_model(name, pretrained=False, num_classes=0 if weight is None else weight.shape[0])
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UsageError(f"'{path}' does not fit timm:{name}: {lines[min(1, len(lines) - 1)][:200]}") from error
    return module


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name from safetensors, or from a file of torch.save that holds nothing but tensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UsageError(f"There is no checkpoint '{path}'.")
    try:
        state: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UsageError(f"'{path}' holds more than tensors, and code from a file is never run.",
                         "save its state_dict as safetensors") from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UsageError(f"The checkpoint '{path}' is damaged or truncated: {first_line(error)}.") from error
    state = next((state[key] for key in _NESTED if isinstance(state, dict) and isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UsageError(f"'{path}' is not a checkpoint: it holds no table of tensors.")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def _explain(error: Exception, source: str, name: str, timm: Any) -> NmsparseError:
    near = ", ".join(timm.list_models(f"*{name.partition('.')[0]}*")[:3])
    if source.startswith(PREFIX) and not name.startswith("hf") and not timm.is_model(name.partition(".")[0]):
        return UsageError(f"timm has no model '{name}'.", f"did you mean {near}?" if near else None)
    if "No pretrained weights" in str(error):
        return UsageError(f"timm has no pretrained weights for '{name}'.", f"{PREFIX}{name}?checkpoint=FILE")
    if refused := refusal(error, source, f"{PREFIX}{name}?checkpoint=FILE"):
        return refused
    return UsageError(f"'{source}' cannot be loaded: {first_line(error)}.")


def _preprocess(timm: Any, module: nn.Module) -> Preprocess:
    data = timm.data.resolve_model_data_config(module)
    _, height, width = data["input_size"]
    shorter = None if data.get("crop_mode") == "squash" else int(min(height, width) / data.get("crop_pct", 1.0))
    return Preprocess((height, width), shorter, tuple(data["mean"]), tuple(data["std"]),
                      _RESAMPLE.get(data["interpolation"], BICUBIC))


def sample_inputs(model: LoadedModel, batch: int) -> dict[str, torch.Tensor]:
    """Seeded noise in the shape of one batch of pictures."""
    parameter = next(model.module.parameters())
    shape = (batch, len(model.processor.mean), *model.processor.size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return {INPUT: noise.to(parameter.device, parameter.dtype)}


def save(model: LoadedModel, folder: Path) -> None:
    """Write config and weights so that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads them."""
    from timm.models import save_for_hf

    _timm()
    save_for_hf(model.module, str(folder), safe_serialization=True)
    for file in folder.iterdir():
        os.chmod(file, 0o644)
