"""Walk a model block by block: capture what enters the first block, then replay one block at a time.

Only the hidden states of one block boundary are kept. Every keyword argument a block was called with is replayed as it
was, whatever its name, so nothing here depends on a model family or a library version.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..models.base import Target
from ..models.halves import EXIT, residual_writers
from .stats import LayerStats, Need, StatsAccumulator

Batch = Mapping[str, Any]


class _Captured(Exception):
    """Raised to leave the forward pass once everything wanted has been seen."""


@dataclass
class _Trace:
    """One run of a block: what each fusion group read, what each residual writer wrote and what it was added to, and
    what left the block."""

    reads: dict[str, torch.Tensor] = field(default_factory=dict)
    written: dict[str, torch.Tensor] = field(default_factory=dict)
    rests: dict[str, torch.Tensor] = field(default_factory=dict)
    output: torch.Tensor = field(default_factory=lambda: torch.empty(0))


class BlockWalk:
    """The calibration stream at the entrance of one block, with the way to move it past the block.

    `hidden` is what the pruned model computes there; with `both`, `dense` is what the dense model computes. Collecting
    statistics moves `dense` to the exit of the block and leaves what it was at the entrance in `entered`.
    """

    def __init__(self, module: nn.Module, blocks: Sequence[str], batches: Sequence[Batch],
                 compute: torch.dtype = torch.float32, both: bool = False) -> None:
        self.module = module.eval()
        self.blocks = list(blocks)
        self.compute = compute
        self.hidden: list[torch.Tensor] = []
        self._calls: list[list[tuple[tuple, dict[str, Any]]]] = []
        for batch in batches:
            self._capture(batch)
        self.dense: list[torch.Tensor] | None = list(self.hidden) if both else None
        self.entered: list[torch.Tensor] | None = None
        self._layouts: dict[tuple[str, ...], dict[str, str]] = {}

    @torch.no_grad()
    def _capture(self, batch: Batch) -> None:
        """Record the first block's input and how every block is called. Stops before the last block computes."""
        calls: dict[int, tuple[tuple, dict[str, Any]]] = {}

        def record(index: int, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden, rest, named = _split(args, kwargs)
            if index == 0:
                self.hidden.append(_cast(hidden, self.compute))
            calls[index] = (_cast(rest, self.compute), _cast(named, self.compute))
            if index == len(self.blocks) - 1 or (index == 0 and self._uniform()):
                raise _Captured

        handles = [self.module.get_submodule(path).register_forward_pre_hook(
            lambda _m, args, kwargs, index=index: record(index, args, kwargs), with_kwargs=True)
            for index, path in enumerate(self.blocks)]
        try:
            with torch.autocast(_device(self.module).type, self.compute, enabled=self.compute != torch.float32):
                self.module(**batch)
        except _Captured:
            pass
        finally:
            for handle in handles:
                handle.remove()
        self._calls.append([calls.get(index, calls[0]) for index in range(len(self.blocks))])

    def _uniform(self) -> bool:
        """Is every block called with the very same arguments as the first? Then later batches need only that one."""
        return bool(self._calls) and all(_same(call, self._calls[0][0]) for call in self._calls[0])

    def statistics(self, index: int, targets: Sequence[Target], need: Need,
                   weights: Mapping[str, torch.Tensor] | None = None, last: bool = True) -> dict[str, LayerStats]:
        """Run the block over the stream; the statistics of every fusion group of `targets`, accumulated once each.

        `weights` stand in for parameters of the block in the pruned stream (those that are pruned already); nothing
        else of the model changes. With `last` the dense stream moves past the block.
        """
        dense = self._working_copy(index)
        pruned = self._working_copy(index, weights) if weights else dense
        prefix = self.blocks[index] + "."
        readers = {t.fusion: t.module.removeprefix(prefix) for t in reversed(targets)}
        twin = self.dense is not None and need == "gram"
        writers = self._writers(dense, index) if twin else {}
        sums = {fusion: StatsAccumulator(need) for fusion in readers}
        if self.dense is not None and last:
            self.entered = list(self.dense)
        for number, x in enumerate(self.hidden):
            beside = None
            if self.dense is not None and (twin or last):
                beside = self._trace(dense, index, number, self.dense[number], readers, writers, whole=last)
                if last:
                    self.dense[number] = beside.output
            here = self._trace(pruned, index, number, x, readers, writers, whole=False)
            for fusion, layer in readers.items():
                fed = beside.reads[fusion] if beside and twin else None
                drift = beside.rests[layer] - here.rests[layer] if beside and layer in here.rests else None
                sums[fusion].update(pruned.get_submodule(layer), here.reads[fusion], fed, drift)
        return {fusion: total.finish() for fusion, total in sums.items()}

    def _writers(self, block: nn.Module, index: int) -> dict[str, str]:
        """Who writes to the residual stream, found once for each make of block."""
        layout = tuple(name for name, _ in block.named_parameters())
        if layout not in self._layouts:
            entrance = self.hidden[0]
            self._layouts[layout] = residual_writers(block, lambda m: self._run(m, index, 0, entrance), entrance)
        return self._layouts[layout]

    def _trace(self, block: nn.Module, index: int, number: int, x: torch.Tensor, readers: Mapping[str, str],
               writers: Mapping[str, str], whole: bool) -> _Trace:
        """Run a block and record; stops when everything wanted was seen, unless `whole`."""
        trace, layers = _Trace(), {layer: fusion for fusion, layer in readers.items()}
        places = {layer: writers[layer] for layer in layers if layer in writers}
        waiting = {*layers, *places.values()}

        def at(name: str) -> None:
            waiting.discard(name)
            if not waiting and not whole:
                raise _Captured

        def reads(layer: str, args: tuple) -> None:
            trace.reads[layers[layer]] = args[0]
            at(layer)

        def writes(layer: str, output: torch.Tensor) -> None:
            trace.written[layer] = output

        def passes(place: str, state: torch.Tensor) -> None:
            for layer in (layer for layer in places if places[layer] == place):
                trace.rests[layer] = state.reshape(trace.written[layer].shape).float() - trace.written[layer].float()
            at(place)

        handles = [block.get_submodule(layer).register_forward_pre_hook(
            lambda _m, args, layer=layer: reads(layer, args)) for layer in layers]
        handles += [block.get_submodule(layer).register_forward_hook(
            lambda _m, _args, out, layer=layer: writes(layer, out)) for layer in places]
        handles += [block.get_submodule(place).register_forward_pre_hook(
            lambda _m, args, place=place: passes(place, args[0])) for place in {*places.values()} - {EXIT}]
        try:
            trace.output = self._run(block, index, number, x)
            passes(EXIT, trace.output)
        except _Captured:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return trace

    def pass_dense(self, index: int) -> None:
        """Move the dense stream past a still dense block whose statistics nobody needs."""
        if self.dense is not None:
            block = self._working_copy(index)
            self.dense = [self._run(block, index, number, x) for number, x in enumerate(self.dense)]

    def advance(self, index: int, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        """Replace the stream by the block's outputs under its present weights, or under `weights` in their place."""
        block = self._working_copy(index, weights)
        self.hidden = [self._run(block, index, number, x) for number, x in enumerate(self.hidden)]

    def _working_copy(self, index: int, weights: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
        block = copy.deepcopy(self.module.get_submodule(self.blocks[index]))
        with torch.no_grad():
            for name, value in (weights or {}).items():
                block.get_parameter(name.removeprefix(self.blocks[index] + ".")).copy_(value)
        return block.to(self.compute)

    @torch.no_grad()
    def _run(self, block: nn.Module, index: int, number: int, x: torch.Tensor) -> torch.Tensor:
        return self.run(block, index, number, x)

    def run(self, block: nn.Module, index: int, number: int, x: torch.Tensor) -> torch.Tensor:
        """Call `block` on hidden states `x` with the other arguments that block `index` gets for batch `number`.

        A block held in another dtype than the stream runs under autocast.
        """
        mixed = next(block.parameters()).dtype != self.compute
        with torch.autocast(x.device.type, self.compute, enabled=mixed):
            return self._call(block, index, number, x)

    def _call(self, block: nn.Module, index: int, number: int, x: torch.Tensor) -> torch.Tensor:
        rest, named = self._calls[number][index]
        output = block(x, *rest, **named)
        return output[0] if isinstance(output, tuple) else output


def _split(args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor, tuple, dict[str, Any]]:
    """Separate the hidden states (the first argument) from the rest of a call."""
    if args:
        return args[0], args[1:], kwargs
    first = next(name for name, value in kwargs.items() if isinstance(value, torch.Tensor))
    raise TypeError(f"the block takes its hidden states as the keyword '{first}'; only the first argument is supported")


def _same(a: tuple[tuple, dict[str, Any]], b: tuple[tuple, dict[str, Any]]) -> bool:
    """Same arguments: identical objects, or equal plain values."""
    if len(a[0]) != len(b[0]) or a[1].keys() != b[1].keys():
        return False
    pairs = [*zip(a[0], b[0]), *((a[1][name], b[1][name]) for name in a[1])]
    return all(_equal(x, y) for x, y in pairs)


def _equal(x: Any, y: Any) -> bool:
    if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
        return x is y or (x.shape == y.shape and x.dtype == y.dtype and bool(torch.equal(x, y)))
    if isinstance(x, (tuple, list)) and isinstance(y, (tuple, list)):
        return len(x) == len(y) and all(_equal(a, b) for a, b in zip(x, y))
    if x is None or isinstance(x, (bool, int, float, str)):
        return type(x) is type(y) and x == y
    return x is y


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    if isinstance(value, dict):
        return {name: _cast(item, dtype) for name, item in value.items()}
    return value


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
