"""Where the weights of a model are while it is worked on: all in memory, or in their files until they are needed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch


class Weights(Protocol):
    """Of one module. A part that is not held may have parameters without values (on the meta device)."""

    device: torch.device | None
    """Where a part gets its weights; None: where its parameters are."""

    def hold(self, path: str) -> AbstractContextManager[None]:
        """The submodule at `path` has its weights while this is entered; changes are forgotten then."""
        ...

    def flowing(self) -> AbstractContextManager[None]:
        """The whole module can be called while this is entered."""
        ...

    def to(self, device: torch.device) -> None:
        """Give parts their weights on `device` from now on."""
        ...


class Whole:
    """Everything is in memory all the time, and changes stay."""

    device: torch.device | None = None

    def hold(self, path: str) -> AbstractContextManager[None]:
        return nullcontext()

    def flowing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def to(self, device: torch.device) -> None:
        raise AssertionError("the module itself is moved")


WHOLE = Whole()
