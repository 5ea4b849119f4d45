"""Ask a model, once, what lies between its blocks: nothing, or something that has to be computed again.

A block is entered *straight* when the very tensor that left the block before comes in, and no other argument depends on
it. In a first pass the dense model shows how it calls its blocks; in a second every block answers noise, and whatever
then changes depends on the blocks. Stretches of straight blocks are tried out before they are believed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.find.calibration.block_runner import Batch, Call, Captured, Model, Output, cast, main


@dataclass(frozen=True)
class Route:
    """`starts`: blocks whose entrance the model has to be asked for; `follows`: those called as the block before;
    `place`: which item of what a block returns enters the next one as hidden states."""

    starts: frozenset[int]
    follows: frozenset[int]
    place: int = 0


def survey(model: Model, batch: Batch) -> Route:
    """Ask which blocks are entered by what left the block before and nothing else."""
    last = len(model.blocks) - 1
    templates: list[Output] = []
    calls: list[Call] = []
    places: list[int] = []
    handed: Output = None

    def entered(index: int, x: torch.Tensor, call: Call) -> None:
        calls.append(call)
        items = handed if isinstance(handed, (tuple, list)) else ()
        places.extend(place for place, item in enumerate(items) if item is x)
        if index == last:
            raise Captured

    def left(index: int, output: Output) -> None:
        nonlocal handed
        handed = output
        templates.append(_template(output, calls[index]))

    model.forward(batch, entered, left=left)
    place = places[0] if places else 0
    follows = frozenset(i for i in range(1, last + 1) if calls[i].same(calls[i - 1]))
    route = Route(_starts(model, batch, templates, calls, follows, place), follows, place)
    if len(route.starts) == 1 or _leads(model, batch, route):
        return route
    every = Route(frozenset(range(last + 1)), frozenset(), place)
    if not _leads(model, batch, every):
        raise NmsparseError("The hidden states cannot be followed through this model block by block.")
    return every


def _starts(model: Model, batch: Batch, templates: Sequence[Output], calls: Sequence[Call],
            follows: frozenset[int], place: int) -> frozenset[int]:
    """Blocks that are not entered by the very tensor which left the one before, or whose arguments depend on it."""
    generator = torch.Generator().manual_seed(0)
    starts = {0}
    before: Call | None = None
    answered: Output = None

    def answer(index: int) -> Output:
        nonlocal answered
        answered = tree_map(lambda leaf: _noise(leaf, before, generator), templates[index])
        return answered

    def entered(index: int, x: torch.Tensor, call: Call) -> None:
        nonlocal before
        alike = before is not None and index in follows and call.same(before)
        if index and (x is not main(answered, place) or not (alike or call.same(calls[index]))):
            starts.add(index)
        before = call
        if index == len(model.blocks) - 1:
            raise Captured

    try:
        model.forward(batch, entered, answer, len(templates))
    except (RuntimeError, ValueError, TypeError, IndexError):  # the model minds the noise
        return frozenset(range(len(model.blocks)))
    return frozenset(starts)


def _leads(model: Model, batch: Batch, route: Route) -> bool:
    """Do the dense outputs at the ends of the stretches lead to the entrances that a dense pass has?"""
    ends = ends_of(route, len(model.blocks))
    outputs: dict[int, Output] = {}
    entrances: dict[int, tuple[torch.Tensor, Call]] = {}

    def entered(index: int, x: torch.Tensor, call: Call) -> None:
        if index in route.starts:
            entrances[index] = cast(x, model.compute), call.cast(model.compute)
        if index == max(route.starts):
            raise Captured

    def left(index: int, output: Output) -> None:
        if index in ends:
            outputs[index] = output

    model.forward(batch, entered, left=left)
    for index in sorted(route.starts - {0}):
        x, call = model.entrance(batch, index, lambda number: outputs[ends[number]])
        if not torch.equal(x, entrances[index][0]) or not _alike(call, entrances[index][1]):
            return False
    return True


def ends_of(route: Route, count: int) -> list[int]:
    """For every block, the last one of its stretch."""
    starts = [*sorted(route.starts), count]
    return [next(start for start in starts if start > index) - 1 for index in range(count)]


def _alike(one: Call, other: Call) -> bool:
    """Equal tensors and plain values; other objects are new in every pass and say nothing."""
    def plain(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(plain(item) for item in value)
        return value if isinstance(value, (torch.Tensor, bool, int, float, str)) else None

    return Call(plain(one.rest), {name: plain(value) for name, value in one.named.items()}).same(
        Call(plain(other.rest), {name: plain(value) for name, value in other.named.items()}))


@dataclass(frozen=True)
class _Passed:
    """Stands in a template for an argument that a block hands on as it got it."""

    place: int


def _template(output: Output, call: Call) -> Output:
    """What a block returned, without the memory and without what it only handed on."""
    given = [id(leaf) if isinstance(leaf, torch.Tensor) else None for leaf in tree_leaves((call.rest, call.named))]

    def emptied(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return _Passed(given.index(id(leaf))) if id(leaf) in given else leaf.new_zeros(()).expand(leaf.shape)

    return tree_map(emptied, output)


def _noise(leaf: Any, call: Call | None, generator: torch.Generator) -> Any:
    if isinstance(leaf, _Passed) and call is not None:
        return tree_leaves((call.rest, call.named))[leaf.place]
    if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
        return leaf
    return torch.randn(leaf.shape, generator=generator).to(leaf.device, leaf.dtype)
