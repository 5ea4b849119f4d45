"""What the hub may answer, as one sentence each; no network is used."""

from __future__ import annotations

from types import SimpleNamespace
from urllib.error import URLError

import pytest
from huggingface_hub import errors as hub

from nmsparse_deploy.models.load_errors import explain


def response(code: int) -> SimpleNamespace:
    return SimpleNamespace(status_code=code, headers={}, request=None)


class ConnectError(Exception):
    """As the HTTP library calls it."""


def wrapped(cause: Exception) -> OSError:
    """As transformers raises it: its own OSError around the hub's error."""
    try:
        try:
            raise cause
        except Exception as inner:
            raise OSError("You are trying to access...\nmany lines") from inner
    except OSError as outer:
        return outer


@pytest.mark.parametrize(
    "cause,sentence,code",
    [
        (hub.GatedRepoError("gated", response=response(403)), "is gated", 1),
        (
            hub.RepositoryNotFoundError("no such", response=response(404)),
            "There is no model 'a/b' on the hub",
            2,
        ),
        (hub.LocalEntryNotFoundError("offline"), "hub cannot be reached", 1),
        (hub.OfflineModeIsEnabled("offline"), "hub cannot be reached", 1),
        (ConnectError("Name or service not known"), "hub cannot be reached", 1),
        (URLError("Name or service not known"), "hub cannot be reached", 1),
        (ValueError("bad config\nmore"), "cannot be loaded as a model: ", 2),
    ],
)
def test_hub_answers_become_sentences(cause, sentence, code):
    error = explain(wrapped(cause), "a/b")
    assert sentence in error.message and "\n" not in error.message and error.exit_code == code
