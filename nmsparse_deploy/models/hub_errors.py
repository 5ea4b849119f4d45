"""Why the hub did not give a model, as one sentence, whichever library asked it."""

from __future__ import annotations

from urllib.error import URLError

from nmsparse_deploy.errors import NmsparseError, UsageError


def hub_error(error: BaseException, source: str, instead: str) -> NmsparseError | None:
    """Return the hub's refusal behind `error` as a sentence, or None when it failed for another
    reason.

    `source` is what the user typed, `instead` what to do while the hub cannot be reached.
    """
    from huggingface_hub import errors as hub

    links = causes(error)
    if any(isinstance(e, hub.GatedRepoError) for e in links):
        return NmsparseError(
            f"The model '{source}' is gated: its owner has to grant you access.", "hf auth login"
        )
    if any(isinstance(e, hub.RepositoryNotFoundError) for e in links):
        return UsageError(
            f"There is no model '{source}' on the hub, and no local folder of that name."
        )
    offline = (hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError)
    if any(isinstance(e, offline) or unreachable(e) for e in links):
        return NmsparseError(
            f"The model '{source}' is not on this machine and the hub cannot be reached.", instead
        )
    return None


def unreachable(error: BaseException) -> bool:
    """Did nobody answer? The hub's client has changed the library that it asks with, so it is told
    by the name."""
    named = any(word in type(error).__name__ for word in ("Connect", "Timeout"))
    return named or isinstance(error, ConnectionError) or type(error) is URLError


def causes(error: BaseException) -> list[BaseException]:
    """List an error and what caused it, down to the first."""
    links: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in links:
        links.append(link)
        link = link.__cause__ or link.__context__
    return links
