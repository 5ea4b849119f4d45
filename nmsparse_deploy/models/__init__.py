"""Model libraries and families. What the user typed goes to the library that claims it (`ADAPTERS`
of the registry)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.models.loaded import LoadedModel, ModelAdapter
from nmsparse_deploy.models.packaged import location, packaged_model
from nmsparse_deploy.registry import ADAPTERS
from nmsparse_deploy.system.assets import assets

FALLBACK = "transformers"
"""The library that is asked last: it has no way to tell a name of the hub from another
library's."""


def libraries() -> Iterator[ModelAdapter]:
    """Yield every model library in the order in which they are asked."""
    for name in sorted(ADAPTERS.names(), key=FALLBACK.__eq__):
        yield ADAPTERS.load(name)


def adapter_for(source: str) -> ModelAdapter:
    """Return the library that loads MODEL, a folder or a name."""
    return next(adapter for adapter in libraries() if adapter.claims(source))


def load(source: str, dtype: torch.dtype | None = None, stream: bool = False) -> LoadedModel:
    """Load MODEL: a packaged model (`demo`, `vit`, `minilm`), a folder, a GGUF file, a hub name,
    `timm:NAME`, or `diffusers:NAME`.

    A bare name that is neither here nor on the hub is tried as the name of an architecture;
    `described` says what it was. With `stream` the weights stay in their files until they are
    needed; only for what `checkpoint` finds.
    """
    asset = packaged_model(source)
    if asset is not None:
        place = location(asset)
        loaded = adapter_for(place).load(place, dtype, stream)
        loaded.source, loaded.name = asset.key, asset.name or loaded.name
        return loaded
    adapter = adapter_for(source)
    try:
        return adapter.load(source, dtype, stream)
    except NmsparseError:
        other = _named_architecture(source, adapter)
        if other is None:
            raise
        return other.load(f"{other.prefix}{source}", dtype)


def _named_architecture(source: str, asked: ModelAdapter) -> ModelAdapter | None:
    """Return the library that knows a bare name as one of its own, when `asked` does not have
    it."""
    bare = "/" not in source and not Path(source).exists()
    others = (other for other in libraries() if bare and other is not asked)
    return next((other for other in others if other.knows(source)), None)


def absolute(model: str) -> str:
    """Return MODEL as a run records it: a path from the root, whatever folder it was typed in."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def _place(source: str) -> str:
    """Return what an adapter is asked for: of a packaged model the place of its files."""
    asset = packaged_model(source)
    return source if asset is None else location(asset)


def files(source: str) -> dict[str, Path]:
    """List the files on this machine that MODEL is loaded from, by name; none for a hub model that
    is not here yet."""
    place = _place(source)
    adapter = adapter_for(place)
    read = adapter.files(place)
    other = None if read else _named_architecture(place, adapter)
    return other.files(f"{other.prefix}{place}") if other else read


def carried(loaded: LoadedModel) -> dict[str, Path]:
    """List what a pruned copy of a model takes over from where it was loaded, by name."""
    return loaded.adapter.carried(_place(loaded.source), loaded.provenance.get("revision"))


def checkpoint(source: str) -> Path | None:
    """Return the folder of safetensors files that MODEL stands for, if it can be streamed and is on
    this machine."""
    place = _place(source)
    return adapter_for(place).checkpoint(place)


def download(source: str) -> Path | None:
    """Bring the safetensors files of a hub model that can be streamed here, and return their
    folder; else None."""
    return None if source in assets() else adapter_for(source).download(source)


def shapes(source: str, config: Mapping[str, Any] | None = None) -> LoadedModel:
    """Build MODEL with every parameter on the meta device; no weight is read and nothing is
    downloaded.

    What it looks like is told by `config` (entries of a config.json; the library fills in the
    rest), by a packaged model, by the config of a local folder, or by an architecture's name.
    Raises `UsageError` when it is not told, `MissingExtra` for the name of a library that is not
    here.
    """
    asset = packaged_model(source)
    return adapter_for(source).shapes(source, asset.config if config is None and asset else config)


def short_name(source: str) -> str:
    """Name MODEL for folders and headings, without loading it."""
    asset = assets().get(source)
    return asset.name or source if asset else adapter_for(source).short_name(source)


def hub_name(source: str) -> str | None:
    """Return OWNER/NAME of a model on the hub; None for what is a file, a folder, or in no hub."""
    asset = assets().get(source)
    return asset.hub if asset else adapter_for(source).hub_name(source)


def described(typed: str, model: LoadedModel) -> str:
    """Put into words what MODEL turned out to be."""
    kind = model.provenance.get("class", type(model.module).__name__)
    if typed in assets():
        return f"'{typed}' is {assets()[typed].title} ({kind})"
    adapter, name = model.adapter, model.adapter.reference(typed)
    where = Path(name)
    place = (
        "a local folder" if where.is_dir() else "a local file" if where.is_file() else "a hub model"
    )
    if adapter.knows(name) and (place == "a hub model" or typed.startswith(adapter.prefix)):
        place = f"the {adapter.library} model {model.name}"
    return f"'{typed}' is {place} ({adapter.library} {kind}, {model.family})"
