"""A record of one run of a block: what its layers read, and what they add to the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from nmsparse_deploy.find.calibration.block_runner import Output
from nmsparse_deploy.models.capture import OnInput, capture
from nmsparse_deploy.models.forwards import Forward, replaced
from nmsparse_deploy.models.matmul_observer import MatmulObserver, Product
from nmsparse_deploy.models.residual_stream import EXIT


@dataclass(frozen=True)
class Wanted:
    """What to record of a block, by paths inside it: the layers whose inputs are read and the
    parameters whose products are observed, each with its fusion group; and for every layer that
    writes to the residual stream the place where the sum then stands."""

    layers: Mapping[str, str]
    observed: Mapping[str, str]
    places: Mapping[str, str]

    @property
    def sums(self) -> list[str]:
        """Return the writers behind which nothing is read."""
        return list(self.places) if len(self.layers) == 1 and not self.observed else []


@dataclass
class BlockTrace:
    """The input of each fusion group, the output of each residual writer and what it was added to,
    and the block's output. Where products are observed, `products` has the input of each matrix."""

    reads: dict[str, torch.Tensor] = field(default_factory=dict)
    products: dict[str, list[tuple[int, torch.Tensor]]] = field(default_factory=dict)
    written: dict[str, torch.Tensor] = field(default_factory=dict)
    rests: dict[str, torch.Tensor] = field(default_factory=dict)
    output: Output = None

    def same(self, other: BlockTrace) -> bool:
        """Tell whether both runs saw the same bits."""
        return all(
            mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
            for mine, theirs in ((self.reads, other.reads), (self.rests, other.rests))
        ) and all(
            one[0] == two[0] and torch.equal(one[1], two[1])
            for fusion, products in self.products.items()
            for one, two in zip(products, other.products.get(fusion, []), strict=True)
        )


@torch.no_grad()
def trace_block(
    block: nn.Module,
    run: Callable[[], Output],
    exit_of: Callable[[Output], torch.Tensor],
    wanted: Wanted,
    whole: bool,
    silent: bool,
) -> BlockTrace:
    """Run a block and record; the run ends when everything wanted was seen, unless `whole`.

    With `silent`, what a residual writer puts out does not matter; it need not compute, if it is
    the only layer that is read.
    """
    trace, places = BlockTrace(), wanted.places
    waiting = {*wanted.layers, *places.values(), *wanted.observed}

    def reads(layer: str, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        trace.reads[wanted.layers[layer]] = args[0] if args else next(iter(named.values()))
        waiting.discard(layer)

    def multiplied(product: Product) -> None:
        trace.products.setdefault(wanted.observed[product.weight], []).append(
            (product.expert, product.rows)
        )

    def writes(layer: str, _args: tuple[Any, ...], output: torch.Tensor) -> None:
        trace.written[layer] = output

    def arrives(place: str, args: tuple[Any, ...], _named: Mapping[str, Any]) -> None:
        for layer in (layer for layer in places if places[layer] == place):
            written = trace.written[layer]
            trace.rests[layer] = args[0].reshape(written.shape).float() - written.float()
        waiting.discard(place)

    inputs: dict[str, OnInput] = {layer: partial(reads, layer) for layer in wanted.layers}
    inputs |= {place: partial(arrives, place) for place in {*places.values()} - {EXIT}}
    observer: AbstractContextManager = nullcontext()
    if wanted.observed:
        weights = {name: block.get_parameter(name) for name in wanted.observed}
        observer = MatmulObserver(weights, multiplied)
    with (
        observer,
        _silenced(block, wanted.sums if silent else []),
        capture(
            block,
            inputs,
            {layer: partial(writes, layer) for layer in places},
            stop=lambda: not whole and not waiting,
        ),
    ):
        trace.output = run()
        arrives(EXIT, (exit_of(trace.output),), {})
    return trace


def _silenced(block: nn.Module, paths: list[str]) -> AbstractContextManager[None]:
    """Let linear layers put out zeros."""
    layers = [layer for path in paths if isinstance(layer := block.get_submodule(path), nn.Linear)]

    def make(index: int, _forward: Forward) -> Forward:
        return lambda x: x.new_zeros(*x.shape[:-1], layers[index].out_features)

    return replaced(layers, make)
