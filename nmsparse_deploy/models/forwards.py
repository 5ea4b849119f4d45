"""Modules that run something else in the place of their own `forward`, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any

from torch import nn

Forward = Callable[..., Any]


@contextmanager
def replaced(
    layers: Sequence[nn.Module], make: Callable[[int, Forward], Forward]
) -> Iterator[None]:
    """While entered, layer number i runs `make(i, its forward)`. What is entered last is asked
    first."""
    before = [(layer, vars(layer).get("forward")) for layer in layers]
    for index, layer in enumerate(layers):
        vars(layer)["forward"] = make(index, layer.forward)
    try:
        yield
    finally:
        for layer, own in reversed(before):
            vars(layer).pop("forward", None)  # the class's own shows again
            if own is not None:
                vars(layer)["forward"] = own


def within(
    layers: Sequence[nn.Module], context: Callable[[int], AbstractContextManager[Any]]
) -> AbstractContextManager[None]:
    """While entered, layer number i runs inside `context(i)`."""

    def make(index: int, forward: Forward) -> Forward:
        @wraps(forward)
        def inside(*args: Any, **named: Any) -> Any:
            with context(index):
                return forward(*args, **named)

        return inside

    return replaced(layers, make)
