"""The cache of the model hub on this machine."""

from __future__ import annotations

from pathlib import Path

from nmsparse_deploy.models.model_folder import WEIGHTS


def cached_folder(name: str, file: str = "config.json", revision: str | None = None) -> Path | None:
    """Return the folder of a hub model in the cache, if `file` is there; its name is the commit."""
    from huggingface_hub import try_to_load_from_cache

    try:
        path = try_to_load_from_cache(name, file, revision=revision)
    except ValueError:  # not the name of a model
        path = None
    return Path(path).parent if isinstance(path, str) else None


def fetch_description(name: str, revision: str) -> None:
    """Bring what a hub model has beside its weights into the cache, if the hub answers."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(name, revision=revision, ignore_patterns=[f"*{end}" for end in WEIGHTS])
    except Exception:  # the hub's clients fail in many ways; what is here has to do
        return
