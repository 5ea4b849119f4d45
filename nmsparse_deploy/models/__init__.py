"""Model families. `load` resolves what the user typed; the rest dispatches to the library that loaded the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.models.adapters import diffusers as diffusion
from nmsparse_deploy.models.adapters import huggingface as hf
from nmsparse_deploy.models.adapters import timm as vision
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.models.packaged import visual_saliency as saliency
from nmsparse_deploy.system.assets import Asset, assets, fetch


def short_name(source: str) -> str:
    """A model's name for folders and headings, known without loading it."""
    if source in assets():
        return assets()[source].name or source
    path = Path(source.removeprefix(vision.PREFIX).removeprefix(diffusion.PREFIX).partition("?")[0])
    return path.stem if path.suffix == ".gguf" else path.name


def hub_name(source: str) -> str | None:
    """OWNER/NAME of a model on the hub; None for what is a file, a folder, or in no hub."""
    if source in assets():
        return assets()[source].hub
    local = source.removeprefix(diffusion.PREFIX).partition("?")[0] if diffusion.is_diffusers(source) else source
    name = local.removeprefix(vision.PREFIX)
    if source.startswith(vision.PREFIX):
        name = f"timm/{name}" if "/" not in name else name.removeprefix("hf-hub:").removeprefix("hf_hub:")
    known = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name) and not name.endswith(".gguf")
    return name if known and not Path(local).exists() else None


def load(source: str, dtype: torch.dtype | None = None, stream: bool = False) -> LoadedModel:
    """Load MODEL: a packaged model (`demo`, `vit`, `minilm`), a folder, a GGUF file, a hub name, `timm:NAME`, or
    `diffusers:NAME`.

    A bare name that is neither here nor on the hub is tried as a timm model; `described` says what it was. With
    `stream` the weights stay in their files until they are needed; only for what `checkpoint` finds.
    """
    if source in assets() and assets()[source].kind == "model":
        return _packaged(assets()[source], dtype, stream)
    if vision.is_timm(source):
        return vision.load(source, dtype)
    if diffusion.is_diffusers(source):
        return diffusion.load(source, dtype)
    try:
        return hf.load(source, dtype, stream=stream)
    except NmsparseError:
        if "/" in source or Path(source).exists() or not vision.is_name(source):
            raise
        return vision.load(f"{vision.PREFIX}{source}", dtype)


def checkpoint(source: str) -> Path | None:
    """The folder of safetensors files that MODEL stands for, if it can be streamed and is on this machine."""
    if source in assets() and assets()[source].kind == "model":
        return hf.checkpoint(_where(assets()[source]))
    return None if vision.is_timm(source) else hf.checkpoint(source)


def download(source: str) -> Path | None:
    """The folder of safetensors files of a hub model that can be streamed, brought here if it is not yet; else None."""
    elsewhere = source in assets() or vision.is_timm(source) or diffusion.is_diffusers(source)
    name = None if elsewhere else hub_name(source)
    return hf.download(name) if name else None


def _packaged(asset: Asset, dtype: torch.dtype | None, stream: bool) -> LoadedModel:
    return hf.load(_where(asset), dtype, asset.key, asset.name, stream)


def _where(asset: Asset) -> str:
    """The folder or file of a packaged model, or its name on the hub."""
    try:
        folder = fetch(asset.key)
    except NmsparseError:
        if asset.hub is None:
            raise
        return asset.hub
    if asset.key == saliency.KEY:
        return str(saliency.model_folder())
    return str(next((file.parent for file in folder.rglob("config.json")), folder / asset.files[0]))


def described(typed: str, model: LoadedModel) -> str:
    """What MODEL turned out to be, in words."""
    kind = model.provenance.get("class", type(model.module).__name__)
    where = Path(typed.removeprefix(diffusion.PREFIX).partition("?")[0])
    if typed in assets():
        return f"'{typed}' is {assets()[typed].title} ({kind})"
    place = "a local folder" if where.is_dir() else "a local file" if where.is_file() else "a hub model"
    found = f"the timm model {model.name}" if model.library == "timm" and place == "a hub model" else place
    return f"'{typed}' is {found} ({model.library} {kind}, {model.family})"


def sample_inputs(model: LoadedModel, batch: int = 2, length: int = 16) -> dict[str, torch.Tensor]:
    """Keyword arguments for one forward pass of the right shapes; `length` is in tokens (text only)."""
    if model.library == diffusion.LIBRARY:
        return diffusion.sample_inputs(model, batch, length)
    return vision.sample_inputs(model, batch) if model.library == "timm" else hf.sample_inputs(model, batch, length)


def input_name(model: LoadedModel) -> str:
    """Under which name the model's forward takes its pictures, latents or token ids."""
    if model.library == diffusion.LIBRARY:
        return diffusion.INPUT
    return vision.INPUT if model.library == "timm" else str(getattr(model.module, "main_input_name", "input_ids"))


def longest(model: LoadedModel) -> int | None:
    """Tokens that the model reads at once, as its config says."""
    config: Any = getattr(model.module, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "max_position_embeddings", None)


def check_length(model: LoadedModel, length: int, option: str) -> None:
    """Raise `UsageError` for windows of more tokens than the model has positions for."""
    most = longest(model)
    if most is not None and length > most:
        raise UsageError(f"Windows of {length} tokens are longer than the {most} that '{model.name}' takes.",
                         f"{option} {most}")


def save(model: LoadedModel, folder: Path, changed: Mapping[str, Callable[[], torch.Tensor]] | None = None) -> None:
    """Write a folder that the stock library loads; of a streamed model `changed` gives what is not the checkpoint's."""
    if model.library == "timm":
        vision.save(model, folder)
    elif model.library == diffusion.LIBRARY:
        diffusion.save(model, folder)
    else:
        hf.save(model, folder, changed)


def batches(model: LoadedModel, inputs: Mapping[str, torch.Tensor], size: int) -> list[dict[str, Any]]:
    """Inputs `[samples, ...]` as keyword arguments of forward passes on the model's device, `size` samples each."""
    device = model.device
    # A cache would only cost memory.
    extra: dict[str, Any] = {"use_cache": False} if model.family in ("llm", "seq2seq") else {}
    parts = {name: value.to(device).split(size) for name, value in inputs.items()}
    return [{**dict(zip(parts, row)), **extra} for row in zip(*parts.values())]
