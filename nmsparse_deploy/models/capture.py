"""Record what modules read and return while a model runs, and leave the pass once everything wanted
was seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

OnInput = Callable[[tuple[Any, ...], Mapping[str, Any]], None]
"""`(positional, named)`: the arguments of a module that is about to run."""
OnOutput = Callable[[tuple[Any, ...], Any], Any]
"""`(positional, output)` of a module that has run; what it returns, unless None, takes the place of
the output."""


class _Leave(Exception):
    """The way out of a forward pass."""


@contextmanager
def capture(
    block: nn.Module,
    inputs: Mapping[str, OnInput] | None = None,
    outputs: Mapping[str, OnOutput] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Hand what the submodules of `block` read and return to the callbacks under their paths.

    `stop` is asked after every callback; once it is true, the pass is left and the `with` block
    ends there.
    """
    leave = _Leave()

    def check() -> None:
        if stop():
            raise leave

    def before(
        callback: OnInput, _module: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]
    ) -> None:
        callback(args, named)
        check()

    def after(callback: OnOutput, _module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        replacement = callback(args, output)
        check()
        return replacement

    handles = [
        block.get_submodule(path).register_forward_pre_hook(
            partial(before, callback), with_kwargs=True
        )
        for path, callback in (inputs or {}).items()
    ]
    handles += [
        block.get_submodule(path).register_forward_hook(partial(after, callback))
        for path, callback in (outputs or {}).items()
    ]
    try:
        yield
    except _Leave as left:
        if left is not leave:  # that of another capture around this one
            raise
    finally:
        for handle in handles:
            handle.remove()
