"""What the cache of the model hub holds on this machine. Nothing here downloads."""

from __future__ import annotations

from pathlib import Path


def cached_folder(name: str, file: str = "config.json", revision: str | None = None) -> Path | None:
    """Return the folder of a hub model in the cache, if `file` is there; its name is the commit."""
    from huggingface_hub import try_to_load_from_cache

    try:
        path = try_to_load_from_cache(name, file, revision=revision)
    except ValueError:  # not the name of a model
        path = None
    return Path(path).parent if isinstance(path, str) else None
