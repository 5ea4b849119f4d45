"""Publish a run: weights, card and masks as one commit to a model hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nmsparse_deploy.errors import NmsparseError, UsageError, first_line
from nmsparse_deploy.measure.report.card import write_card
from nmsparse_deploy.models.hub_errors import unreachable
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.system.progress import Progress, silent

BESIDE = ("masks.safetensors", "stored.json", "permutations.safetensors", "scales.safetensors")
"""Published under `nmsparse/`: loaders that read every safetensors file at the top take masks for
weights."""


def push(run: RunDir, repo: str, private: bool = False, progress: Progress = silent) -> str:
    """Write the card and publish to `repo` (OWNER/NAME, made if need be), all files in one commit;
    returns its address.

    Raises `UsageError` for a name that a hub does not take, `NmsparseError` without a token, a
    connection, or the right to write there.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    require_token(repo)
    write_card(run)
    files = published(run)
    size = sum(file.stat().st_size for file in files.values())
    progress(f"publishing {len(files)} files ({size / 1e6:,.0f} MB) to {repo}", 0, 0)
    api = HfApi()
    try:
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        commit = api.create_commit(
            name,
            [CommitOperationAdd(where, file) for where, file in files.items()],
            commit_message=f"{run.manifest().recipe.method} with nmsparse-deploy",
        )
    except Exception as error:
        raise _explain(error, repo) from error
    return str(commit.commit_url)


def require_token(repo: str) -> None:
    """Raise `NmsparseError` where nobody has logged in."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise NmsparseError(
            f"There is no Hugging Face token on this machine, so '{repo}' was not published.",
            "hf auth login",
        )


def published(run: RunDir) -> dict[str, Path]:
    """Return what is published, by its path there."""
    model = {
        str(file.relative_to(run / "model").as_posix()): file
        for file in sorted((run / "model").rglob("*"))
        if file.is_file()
    }
    return model | {f"nmsparse/{name}": run / name for name in BESIDE if (run / name).is_file()}


def _explain(error: Exception, repo: str) -> NmsparseError:
    from huggingface_hub import errors as hub

    status: Any = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, hub.HFValidationError):
        return UsageError(f"'{repo}' is not a name that the hub takes.", "--push-to-hub OWNER/NAME")
    if status in (401, 403, 404):
        return NmsparseError(
            f"The hub does not let this token write to '{repo}'.",
            "hf auth login, with a token that may write",
        )
    if unreachable(error):
        return NmsparseError(
            f"The hub cannot be reached, so '{repo}' was not published.",
            "the same command publishes it later",
        )
    return NmsparseError(f"'{repo}' was not published: {first_line(error)}.")
