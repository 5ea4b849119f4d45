"""One pass of a model, told at the entrance of each of its blocks; blocks behind the stream need not run again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.models.forwards import replaced
from nmsparse_deploy.models.weights import WHOLE, Weights

Batch = Mapping[str, Any]
Output = Any
"""Whatever a block returns; the hidden states are it, or one of its items (the first in most families)."""


class Captured(Exception):
    """Raised to leave a forward pass once everything wanted has been seen."""


@dataclass(frozen=True)
class Call:
    """The arguments of a block beside its hidden states, which come first unless `keyword` names them."""

    rest: tuple[Any, ...]
    named: dict[str, Any]
    keyword: str | None = None

    def __call__(self, block: nn.Module, x: torch.Tensor) -> Output:
        if self.keyword is not None:
            return block(*self.rest, **{self.keyword: x}, **self.named)
        return block(x, *self.rest, **self.named)

    def same(self, other: Call) -> bool:
        """Identical objects, or equal plain values and tensors?"""
        return (len(self.rest) == len(other.rest) and self.named.keys() == other.named.keys()
                and _equal(self.rest, other.rest)
                and all(_equal(self.named[name], other.named[name]) for name in self.named))

    def cast(self, dtype: torch.dtype) -> Call:
        return Call(cast(self.rest, dtype), cast(self.named, dtype), self.keyword)


def main(output: Output, place: int = 0) -> torch.Tensor:
    """The hidden states in what a block returns: all of it, or the item at `place`."""
    return output if isinstance(output, torch.Tensor) else output[place]


class Model:
    """A model and the paths of its blocks, in the order in which they run; `compute` is the stream's dtype."""

    def __init__(self, module: nn.Module, blocks: Sequence[str], compute: torch.dtype,
                 weights: Weights = WHOLE) -> None:
        self.module, self.weights = module, weights
        self.blocks = list(blocks)
        self.compute = compute

    @torch.no_grad()
    def forward(self, batch: Batch, entered: Callable[[int, torch.Tensor, Call], None],
                answer: Callable[[int], Output] | None = None, answered: int = 0,
                left: Callable[[int, Output], None] | None = None) -> None:
        """One pass that tells how the blocks are entered (and what leaves them); the first `answered` do not run."""
        layers = [self.module.get_submodule(path) for path in self.blocks]
        handles = [layer.register_forward_pre_hook(
            lambda _m, args, named, index=index: entered(index, *_split(args, named)), with_kwargs=True)
            for index, layer in enumerate(layers)]
        if left is not None:
            handles += [layer.register_forward_hook(partial(_leaves, left, index))
                        for index, layer in enumerate(layers)]
        try:
            with self.weights.flowing(), answering(layers[:answered], answer or (lambda _index: None)):
                self._run(batch)
        except Captured:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def finish(self, batch: Batch, index: int, output: Output) -> Any:
        """What the model makes of a batch when block `index` returns `output`, with its gradient."""
        layers = [self.module.get_submodule(path) for path in self.blocks[: index + 1]]
        with answering(layers, lambda _index: output):
            return self._run(batch)

    def _run(self, batch: Batch) -> Any:
        device = next(value.device.type for value in batch.values() if isinstance(value, torch.Tensor))
        with torch.autocast(device, self.compute, enabled=self.compute != torch.float32):
            return self.module(**batch)

    def entrance(self, batch: Batch, index: int, answer: Callable[[int], Output]) -> tuple[torch.Tensor, Call]:
        """How block `index` is entered when the blocks before it answer so."""
        found: list[tuple[torch.Tensor, Call]] = []
        dtype = next(self.module.parameters()).dtype

        def entered(number: int, hidden: torch.Tensor, call: Call) -> None:
            if number == index:
                found.append((cast(hidden, self.compute), call.cast(self.compute)))
                raise Captured

        self.forward(batch, entered, lambda number: cast(answer(number), dtype), index)
        if not found:
            raise NmsparseError(f"The model did not come to its block '{self.blocks[index]}'.")
        return found[0]

    def calls(self, batch: Batch, stop: int) -> tuple[torch.Tensor, list[Call], list[torch.Size]]:
        """The hidden states at the first block, the calls of blocks 0 to `stop` in a dense pass, and what shape the
        hidden states have there."""
        hidden: list[torch.Tensor] = []
        calls: list[Call] = []
        shapes: list[torch.Size] = []

        def entered(index: int, x: torch.Tensor, call: Call) -> None:
            if not hidden:
                hidden.append(cast(x, self.compute))
            shapes.append(x.shape)
            calls.append(call.cast(self.compute))
            if index == stop:
                raise Captured

        self.forward(batch, entered)
        return hidden[0], calls, shapes


def answering(layers: Sequence[nn.Module], answer: Callable[[int], Output]) -> AbstractContextManager[None]:
    """Layers that return what they are told instead of computing."""
    return replaced(layers, lambda index, _forward: partial(_instead, answer, index))


def _instead(answer: Callable[[int], Output], index: int, /, *_args: Any, **_named: Any) -> Output:
    return answer(index)


def _leaves(left: Callable[[int, Output], None], index: int, _module: nn.Module, _args: tuple, output: Output) -> None:
    left(index, output)


def _split(args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor, Call]:
    """Separate the hidden states (the first argument, or the first tensor among the named ones) from the rest."""
    if args:
        return args[0], Call(args[1:], kwargs)
    first = next(name for name, value in kwargs.items() if isinstance(value, torch.Tensor))
    return kwargs[first], Call((), {name: value for name, value in kwargs.items() if name != first}, first)


def _equal(x: Any, y: Any) -> bool:
    if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
        return x is y or (x.shape == y.shape and x.dtype == y.dtype and bool(torch.equal(x, y)))
    if isinstance(x, (tuple, list)) and isinstance(y, (tuple, list)):
        return len(x) == len(y) and all(_equal(a, b) for a, b in zip(x, y))
    if x is None or isinstance(x, (bool, int, float, str)):
        return type(x) is type(y) and x == y
    return x is y


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in `dtype`, wherever they are in tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(cast(item, dtype) for item in value)
    if isinstance(value, dict):
        return {name: cast(item, dtype) for name, item in value.items()}
    return value
