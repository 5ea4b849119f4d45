"""Where the weights of a model are while it is worked on: all in memory, or in their files until
they are needed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch


class WeightStore(Protocol):
    """The weights of one module. A part that is not materialised may have none (parameters on the
    meta device)."""

    device: torch.device | None
    """Where a part gets its weights; None: where its parameters are."""

    def materialise(self, path: str) -> AbstractContextManager[None]:
        """Give the submodule at `path` its weights while this is entered; changes are forgotten
        then."""
        ...

    def on_demand(self) -> AbstractContextManager[None]:
        """Give each part its weights when it is called, while this is entered: the whole module can
        run."""
        ...

    def to(self, device: torch.device) -> None:
        """Give parts their weights on `device` from now on."""
        ...


class WeightsInMemory:
    """Everything is in memory all the time, and changes stay."""

    device: torch.device | None = None

    def materialise(self, path: str) -> AbstractContextManager[None]:
        return nullcontext()

    def on_demand(self) -> AbstractContextManager[None]:
        return nullcontext()

    def to(self, device: torch.device) -> None:
        raise AssertionError("the module itself is moved")


IN_MEMORY = WeightsInMemory()
