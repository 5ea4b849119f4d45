"""The calibration stream: hidden states at the entrance of one block, and how the model calls that block.

Mostly what leaves a block enters the next as it is, and the other arguments do not depend on it. Where something lies
between two blocks (a change of resolution, a norm, the way from an encoder into its decoder), or a block hands more
than hidden states on, the model itself is run again with every block behind the stream answering what it is known to
have answered. Which of the two it is, the model is asked once, by answering noise in the place of every block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..errors import NmsparseError

Batch = Mapping[str, Any]
Output = Any
"""Whatever a block returns; the hidden states are it, or its first item."""


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


def main(output: Output) -> torch.Tensor:
    """The hidden states in what a block returns."""
    return output if isinstance(output, torch.Tensor) else output[0]


@dataclass(frozen=True)
class Route:
    """`starts`: blocks whose entrance the model has to be asked for; `follows`: those called as the block before."""

    starts: frozenset[int]
    follows: frozenset[int]


class Model:
    """A model and the paths of its blocks, in the order in which they run; `compute` is the stream's dtype."""

    def __init__(self, module: nn.Module, blocks: Sequence[str], compute: torch.dtype) -> None:
        self.module = module
        self.blocks = list(blocks)
        self.compute = compute
        self._templates: list[Output] = []

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
            handles += [layer.register_forward_hook(partial(_leaves, left, index)) for index, layer in enumerate(layers)]
        try:
            with _answering(layers[:answered], answer or (lambda index: None)):
                self._run(batch)
        except Captured:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def finish(self, batch: Batch, index: int, x: torch.Tensor) -> Any:
        """The model's output for a batch when block `index` puts out the hidden states `x`, with its gradient.

        The blocks after it run as they are. Other items that a block returns beside its hidden states are hollow.
        """
        layers = [self.module.get_submodule(path) for path in self.blocks[: index + 1]]
        known = self._templates[: index + 1]  # the last block's is not: it returns what the others do
        output = type(known[-1])((x, *known[-1][1:])) if known and isinstance(known[-1], (tuple, list)) else x
        with _answering(layers, lambda number: output):
            return self._run(batch)

    def _run(self, batch: Batch) -> Any:
        with torch.autocast(self._device(), self.compute, enabled=self.compute != torch.float32):
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

    def calls(self, batch: Batch, stop: int) -> tuple[torch.Tensor, list[Call]]:
        """The hidden states at the first block and the calls of blocks 0 to `stop` in a dense pass."""
        hidden: list[torch.Tensor] = []
        calls: list[Call] = []

        def entered(index: int, x: torch.Tensor, call: Call) -> None:
            if not hidden:
                hidden.append(cast(x, self.compute))
            calls.append(call.cast(self.compute))
            if index == stop:
                raise Captured

        self.forward(batch, entered)
        return hidden[0], calls

    def survey(self, batch: Batch) -> Route:
        """Ask which blocks are entered by what left the block before and nothing else."""
        last = len(self.blocks) - 1
        outputs: list[Output] = []
        entrances: list[tuple[torch.Tensor, Call]] = []

        def entered(index: int, x: torch.Tensor, call: Call) -> None:
            entrances.append((x, call))
            if index == last:
                raise Captured

        self.forward(batch, entered, left=lambda _index, output: outputs.append(output))
        follows = frozenset(i for i in range(1, last + 1) if entrances[i][1].same(entrances[i - 1][1]))
        route = Route(self._starts(batch, [hollow(output) for output in outputs], entrances, follows), follows)
        if len(route.starts) == 1 or self._leads(batch, route, outputs, entrances):
            return route
        every = Route(frozenset(range(last + 1)), frozenset())
        if not self._leads(batch, every, outputs, entrances):
            raise NmsparseError("The hidden states cannot be followed through this model block by block.")
        return every

    def _starts(self, batch: Batch, templates: Sequence[Output], entrances: Sequence[tuple[torch.Tensor, Call]],
                follows: frozenset[int]) -> frozenset[int]:
        """Blocks that are not entered by the very tensor which left the one before, or whose arguments depend on it."""
        generator = torch.Generator().manual_seed(0)
        answers = [tree_map(lambda leaf: _noise(leaf, generator), template) for template in templates]
        starts = {0}
        seen: list[Call] = []

        def entered(index: int, x: torch.Tensor, call: Call) -> None:
            alike = bool(seen) and index in follows and call.same(seen[-1])
            if index and (x is not main(answers[index - 1]) or not (alike or call.same(entrances[index][1]))):
                starts.add(index)
            seen.append(call)
            if index == len(self.blocks) - 1:
                raise Captured

        try:
            self.forward(batch, entered, lambda index: answers[index], len(answers))
        except (RuntimeError, ValueError, TypeError, IndexError):  # the model minds the noise
            return frozenset(range(len(self.blocks)))
        return frozenset(starts)

    def _leads(self, batch: Batch, route: Route, outputs: Sequence[Output],
               entrances: Sequence[tuple[torch.Tensor, Call]]) -> bool:
        """Do the dense outputs at the ends of the stretches lead to the entrances that were seen?"""
        ends = ends_of(route, len(self.blocks))
        for index in sorted(route.starts - {0}):
            x, call = self.entrance(batch, index, lambda number: outputs[ends[number]])
            wanted = entrances[index][1].cast(self.compute)
            if not torch.equal(x, cast(entrances[index][0], self.compute)) or not _alike(call, wanted):
                return False
        return True

    def _device(self) -> str:
        return next(self.module.parameters()).device.type


def ends_of(route: Route, count: int) -> list[int]:
    """For every block, the last one of its stretch."""
    starts = [*sorted(route.starts), count]
    return [next(start for start in starts if start > index) - 1 for index in range(count)]


class Stream:
    """Hidden states at the entrance of a block for every batch, and the calls that go with them."""

    def __init__(self, model: Model, route: Route, batches: Sequence[Batch], hidden: list[torch.Tensor],
                 calls: Sequence[Sequence[Call]]) -> None:
        self.model, self.route, self.batches = model, route, batches
        self.hidden = hidden
        self.calls = [list(row) for row in calls]
        self._ends = ends_of(route, len(model.blocks))
        self._kept: dict[int, list[Output]] = {}

    def twin(self) -> Stream:
        """Another stream that starts at the same place."""
        return Stream(self.model, self.route, self.batches, list(self.hidden), self.calls)

    def call(self, index: int, number: int) -> Call:
        """How block `index` is called for batch `number`."""
        while index in self.route.follows and index not in self.route.starts:
            index -= 1
        return self.calls[number][index]

    def move(self, index: int, outputs: list[Output]) -> None:
        """From the entrance of block `index`, which returned `outputs`, to the entrance of the next."""
        if index + 1 not in self.route.starts or index + 1 == len(self.model.blocks):
            self.hidden = [main(output) for output in outputs]
            return
        self._kept[index] = outputs
        for number, batch in enumerate(self.batches):
            self.hidden[number], self.calls[number][index + 1] = self.model.entrance(
                batch, index + 1, lambda earlier, number=number: self._kept[self._ends[earlier]][number])


@contextmanager
def _answering(layers: Sequence[nn.Module], answer: Callable[[int], Output]) -> Iterator[None]:
    """Layers that return what they are told instead of computing."""
    stubs = [(layer, vars(layer).get("forward")) for layer in layers]
    for index, layer in enumerate(layers):
        vars(layer)["forward"] = partial(_instead, answer, index)
    try:
        yield
    finally:
        for layer, own in stubs:
            vars(layer).pop("forward", None)  # the class's own shows again
            if own is not None:
                vars(layer)["forward"] = own


def _instead(answer: Callable[[int], Output], index: int, *_args: Any, **_named: Any) -> Output:
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


def _alike(one: Call, other: Call) -> bool:
    """Equal tensors and plain values; other objects are new in every pass and say nothing."""
    def plain(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(plain(item) for item in value)
        return value if isinstance(value, (torch.Tensor, bool, int, float, str)) else None

    return Call(plain(one.rest), {name: plain(value) for name, value in one.named.items()}).same(
        Call(plain(other.rest), {name: plain(value) for name, value in other.named.items()}))


def hollow(output: Output) -> Output:
    """The same structure and shapes without the memory."""
    def empty(leaf: Any) -> Any:
        return leaf.new_zeros(()).expand(leaf.shape) if isinstance(leaf, torch.Tensor) else leaf

    return tree_map(empty, output)


def _noise(leaf: Any, generator: torch.Generator) -> Any:
    if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
        return leaf
    return torch.randn(leaf.shape, generator=generator).to(leaf.device, leaf.dtype)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in `dtype`, wherever they are in tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(cast(item, dtype) for item in value)
    if isinstance(value, dict):
        return {name: cast(item, dtype) for name, item in value.items()}
    return value
