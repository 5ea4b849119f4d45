"""Find out, once, what lies between the blocks of a model: nothing, or something that has to be
computed again.

A block is entered *straight* when the very tensor that left the block before comes in, and no other
argument depends on it. In a first pass the dense model shows how it calls its blocks; in a second
every block answers noise, and whatever then changes depends on the blocks. Runs of straight blocks
are tried out before they are believed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.find.calibration.block_runner import (
    BlockRunner,
    Call,
    Output,
    cast,
    hidden_states_of,
)
from nmsparse_deploy.models.loaded import Batch


@dataclass(frozen=True)
class BlockWiring:
    """`starts`: blocks whose entrance the model has to be asked for; `follows`: those called as the
    block before; `place`: which item of what a block returns enters the next one as hidden
    states."""

    starts: frozenset[int]
    follows: frozenset[int]
    place: int = 0


def find_wiring(runner: BlockRunner, batch: Batch) -> BlockWiring:
    """Find the blocks that are entered by what left the block before and nothing else."""
    last = len(runner.blocks) - 1
    templates: list[Output] = []
    calls: list[Call] = []
    places: list[int] = []
    before: Output = None

    def entered(index: int, x: torch.Tensor, call: Call) -> None:
        calls.append(call)
        items = before if isinstance(before, (tuple, list)) else ()
        places.extend(place for place, item in enumerate(items) if item is x)

    def left(index: int, output: Output) -> None:
        nonlocal before
        before = output
        templates.append(_template(output, calls[index]))

    runner.forward(batch, entered, last, left=left)
    place = places[0] if places else 0
    follows = frozenset(i for i in range(1, last + 1) if calls[i].same(calls[i - 1]))
    wiring = BlockWiring(_starts(runner, batch, templates, calls, follows, place), follows, place)
    if len(wiring.starts) == 1 or _holds(runner, batch, wiring):
        return wiring
    every_block = BlockWiring(frozenset(range(last + 1)), frozenset(), place)
    if not _holds(runner, batch, every_block):
        raise NmsparseError(
            "The hidden states cannot be followed through this model block by block."
        )
    return every_block


def _starts(
    runner: BlockRunner,
    batch: Batch,
    templates: Sequence[Output],
    calls: Sequence[Call],
    follows: frozenset[int],
    place: int,
) -> frozenset[int]:
    """Find blocks that are not entered by the very tensor that left the one before, or whose
    arguments depend on it."""
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
        if index and (
            x is not hidden_states_of(answered, place) or not (alike or call.same(calls[index]))
        ):
            starts.add(index)
        before = call

    try:
        runner.forward(batch, entered, len(runner.blocks) - 1, answer, len(templates))
    except (RuntimeError, ValueError, TypeError, IndexError):  # the model minds the noise
        return frozenset(range(len(runner.blocks)))
    return frozenset(starts)


def _holds(runner: BlockRunner, batch: Batch, wiring: BlockWiring) -> bool:
    """Tell whether the dense outputs at the ends of the runs lead to the entrances that a dense
    pass has."""
    ends = ends_of(wiring, len(runner.blocks))
    outputs: dict[int, Output] = {}
    entrances: dict[int, tuple[torch.Tensor, Call]] = {}

    def entered(index: int, x: torch.Tensor, call: Call) -> None:
        if index in wiring.starts:
            entrances[index] = cast(x, runner.compute), call.cast(runner.compute)

    def left(index: int, output: Output) -> None:
        if index in ends:
            outputs[index] = output

    runner.forward(batch, entered, max(wiring.starts), left=left)
    for index in sorted(wiring.starts - {0}):
        x, call = runner.entrance(batch, index, lambda number: outputs[ends[number]])
        if not torch.equal(x, entrances[index][0]) or not _alike(call, entrances[index][1]):
            return False
    return True


def ends_of(wiring: BlockWiring, count: int) -> list[int]:
    """Return, for each of `count` blocks, the last one of its run of straight blocks."""
    starts = [*sorted(wiring.starts), count]
    return [next(start for start in starts if start > index) - 1 for index in range(count)]


def _alike(call: Call, other: Call) -> bool:
    """Compare tensors and plain values; other objects are new in every pass and say nothing."""

    def plain(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(plain(item) for item in value)
        return value if isinstance(value, (torch.Tensor, bool, int, float, str)) else None

    def plain_call(call: Call) -> Call:
        return Call(plain(call.rest), {name: plain(value) for name, value in call.named.items()})

    return plain_call(call).same(plain_call(other))


@dataclass(frozen=True)
class _HandedOn:
    """A placeholder in a template for an argument that a block hands on as it got it."""

    place: int


def _template(output: Output, call: Call) -> Output:
    """Keep the structure of what a block returned, without the memory and without what it only
    handed on."""
    given = [
        id(leaf) if isinstance(leaf, torch.Tensor) else None
        for leaf in tree_leaves((call.rest, call.named))
    ]

    def emptied(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return (
            _HandedOn(given.index(id(leaf)))
            if id(leaf) in given
            else leaf.new_zeros(()).expand(leaf.shape)
        )

    return tree_map(emptied, output)


def _noise(leaf: Any, call: Call | None, generator: torch.Generator) -> Any:
    if isinstance(leaf, _HandedOn) and call is not None:
        return tree_leaves((call.rest, call.named))[leaf.place]
    if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
        return leaf
    return torch.randn(leaf.shape, generator=generator).to(leaf.device, leaf.dtype)
