"""Run a model with a report at the entrance of each block; blocks that were passed already need not
run again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.models.capture import capture
from nmsparse_deploy.models.forwards import replaced
from nmsparse_deploy.models.loaded import Batch
from nmsparse_deploy.models.weight_store import IN_MEMORY, WeightStore
from nmsparse_deploy.system.hardware import autocast_for

Output = Any
"""Whatever a block returns; the hidden states are it, or one of its items (the first in most
families)."""


@dataclass(frozen=True)
class Call:
    """The arguments of a block beside its hidden states, which come first unless `keyword` names
    them."""

    rest: tuple[Any, ...]
    named: dict[str, Any]
    keyword: str | None = None

    def __call__(self, block: nn.Module, x: torch.Tensor) -> Output:
        if self.keyword is not None:
            return block(*self.rest, **{self.keyword: x}, **self.named)
        return block(x, *self.rest, **self.named)

    def same(self, other: Call) -> bool:
        """Tell whether the arguments are identical objects, or equal plain values and tensors."""
        return (
            len(self.rest) == len(other.rest)
            and self.named.keys() == other.named.keys()
            and _equal(self.rest, other.rest)
            and all(_equal(self.named[name], other.named[name]) for name in self.named)
        )

    def cast(self, dtype: torch.dtype) -> Call:
        return Call(cast(self.rest, dtype), cast(self.named, dtype), self.keyword)


def hidden_states_of(output: Output, place: int = 0) -> torch.Tensor:
    """Return the hidden states in what a block returns: all of it, or the item at `place`."""
    return output if isinstance(output, torch.Tensor) else output[place]


OnEntrance = Callable[[int, torch.Tensor, Call], None]
"""`(index, hidden states, call)`: a block is entered."""


class BlockRunner:
    """A model and the paths of its blocks, in the order in which they run; `compute` is the
    stream's dtype."""

    def __init__(
        self,
        module: nn.Module,
        blocks: Sequence[str],
        compute: torch.dtype,
        weights: WeightStore = IN_MEMORY,
    ) -> None:
        self.module, self.weights = module, weights
        self.blocks = list(blocks)
        self.compute = compute

    @torch.no_grad()
    def forward(
        self,
        batch: Batch,
        entered: OnEntrance,
        last: int,
        answer: Callable[[int], Output] | None = None,
        answered: int = 0,
        left: Callable[[int, Output], None] | None = None,
    ) -> None:
        """Run one pass up to the entrance of block `last`, and report how each block is entered and
        what leaves it.

        The first `answered` blocks do not run; `answer(index)` stands for what they return.
        """
        layers = [self.module.get_submodule(path) for path in self.blocks]
        reached = -1

        def enters(index: int, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            nonlocal reached
            entered(index, *_split(args, named))
            reached = index

        inputs = {path: partial(enters, index) for index, path in enumerate(self.blocks)}
        outputs = (
            {path: partial(_leaves, left, index) for index, path in enumerate(self.blocks)}
            if left
            else {}
        )
        with (
            self.weights.on_demand(),
            answering(layers[:answered], answer or (lambda _index: None)),
            capture(self.module, inputs, outputs, stop=lambda: reached == last),
        ):
            self._run(batch)

    def finish(self, batch: Batch, index: int, output: Output) -> Any:
        """Return what the model makes of a batch when block `index` returns `output`, with its
        gradient."""
        layers = [self.module.get_submodule(path) for path in self.blocks[: index + 1]]
        with answering(layers, lambda _index: output):
            return self._run(batch)

    def _run(self, batch: Batch) -> Any:
        device = next(value.device for value in batch.values() if isinstance(value, torch.Tensor))
        with autocast_for(self.compute, device):
            return self.module(**batch)

    def entrance(
        self, batch: Batch, index: int, answer: Callable[[int], Output]
    ) -> tuple[torch.Tensor, Call]:
        """Return how block `index` is entered when `answer` stands for the blocks before it."""
        entrances: list[tuple[torch.Tensor, Call]] = []
        dtype = next(self.module.parameters()).dtype

        def entered(number: int, hidden: torch.Tensor, call: Call) -> None:
            if number == index:
                entrances.append((cast(hidden, self.compute), call.cast(self.compute)))

        self.forward(batch, entered, index, lambda number: cast(answer(number), dtype), index)
        if not entrances:
            raise NmsparseError(f"The model did not come to its block '{self.blocks[index]}'.")
        return entrances[0]

    def calls(self, batch: Batch, last: int) -> tuple[torch.Tensor, list[Call], list[torch.Size]]:
        """Return the hidden states at the first block, and for blocks 0 to `last` of a dense pass
        the calls and the shapes of the hidden states."""
        hidden: list[torch.Tensor] = []
        calls: list[Call] = []
        shapes: list[torch.Size] = []

        def entered(index: int, x: torch.Tensor, call: Call) -> None:
            if not hidden:
                hidden.append(cast(x, self.compute))
            shapes.append(x.shape)
            calls.append(call.cast(self.compute))

        self.forward(batch, entered, last)
        return hidden[0], calls, shapes


def answering(
    layers: Sequence[nn.Module], answer: Callable[[int], Output]
) -> AbstractContextManager[None]:
    """Let layers return `answer(index)` instead of computing."""
    return replaced(layers, lambda index, _forward: partial(_instead, answer, index))


def _instead(answer: Callable[[int], Output], index: int, /, *_args: Any, **_named: Any) -> Output:
    return answer(index)


def _leaves(
    left: Callable[[int, Output], None], index: int, _args: tuple[Any, ...], output: Output
) -> None:
    left(index, output)


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, Call]:
    """Separate the hidden states (the first argument, or the first tensor among the named ones)
    from the rest."""
    if args:
        return args[0], Call(args[1:], kwargs)
    first = next(name for name, value in kwargs.items() if isinstance(value, torch.Tensor))
    return kwargs[first], Call(
        (), {name: value for name, value in kwargs.items() if name != first}, first
    )


def _equal(x: Any, y: Any) -> bool:
    if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
        return x is y or (x.shape == y.shape and x.dtype == y.dtype and bool(torch.equal(x, y)))
    if isinstance(x, (tuple, list)) and isinstance(y, (tuple, list)):
        return len(x) == len(y) and all(_equal(a, b) for a, b in zip(x, y))
    if x is None or isinstance(x, (bool, int, float, str)):
        return type(x) is type(y) and x == y
    return x is y


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Convert floating-point tensors to `dtype`, wherever they are in tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(cast(item, dtype) for item in value)
    if isinstance(value, dict):
        return {name: cast(item, dtype) for name, item in value.items()}
    return value
