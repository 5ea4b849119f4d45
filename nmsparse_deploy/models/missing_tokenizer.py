"""A model without a tokenizer: whoever reads text is told so, whoever needs none is not stopped."""

from __future__ import annotations

from typing import Any

from nmsparse_deploy.errors import UsageError


class MissingTokenizer:
    """What stands where a tokenizer should be; every use of it raises `UsageError` with the reason
    why there is none."""

    def __init__(self, place: str, reason: str) -> None:
        self._error = UsageError(
            f"'{place}' has no tokenizer that can be loaded: {reason}.",
            "put its files beside the weights; --method magnitude needs none",
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying and printing ask for these
            raise AttributeError(name)
        raise self._error

    def __call__(self, *_texts: Any, **_options: Any) -> Any:
        raise self._error

    def __len__(self) -> int:
        raise self._error
