"""Walk a model block by block: capture what enters the first block, then replay one block at a time.

Only the hidden states of one block boundary are kept. Every keyword argument a block was called with is replayed as it
was, whatever its name, so nothing here depends on a model family or a library version.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..models.base import Target
from .stats import LayerStats, Need, StatsAccumulator

Batch = Mapping[str, Any]


class _Captured(Exception):
    """Raised to leave the forward pass once everything wanted has been seen."""


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
        self._seeing_dense = False
        for batch in batches:
            self._capture(batch)
        self.dense: list[torch.Tensor] | None = list(self.hidden) if both else None
        self.entered: list[torch.Tensor] | None = None

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

    def statistics(self, index: int, targets: Sequence[Target], need: Need) -> dict[str, LayerStats]:
        """Run the still dense block over the stream; the statistics of every fusion group, accumulated once each.

        Moves the dense stream past the block.
        """
        block = self._working_copy(index)
        sums = {target.fusion: StatsAccumulator(need) for target in targets}
        readers = {target.fusion: target for target in reversed(targets)}
        prefix = self.blocks[index] + "."
        fed: dict[str, torch.Tensor] = {}
        handles = []
        for fusion, target in readers.items():
            layer = block.get_submodule(target.module.removeprefix(prefix))
            handles.append(layer.register_forward_pre_hook(
                lambda layer, args, name=fusion: self._see(layer, args[0], name, sums[name], fed)))
        self.entered = None if self.dense is None else list(self.dense)
        try:
            for number in range(len(self.hidden)):
                if self.dense is not None:
                    self._seeing_dense = True
                    self.dense[number] = self._run(block, index, number, self.dense[number])
                    self._seeing_dense = False
                self._run(block, index, number, self.hidden[number])
        finally:
            for handle in handles:
                handle.remove()
        return {fusion: total.finish() for fusion, total in sums.items()}

    def _see(self, layer: nn.Module, x: torch.Tensor, name: str, total: StatsAccumulator,
             fed: dict[str, torch.Tensor]) -> None:
        if self._seeing_dense:
            fed[name] = x
        else:
            total.update(layer, x, fed.pop(name, None))

    def pass_dense(self, index: int) -> None:
        """Move the dense stream past a still dense block whose statistics nobody needs."""
        if self.dense is not None:
            block = self._working_copy(index)
            self.dense = [self._run(block, index, number, x) for number, x in enumerate(self.dense)]

    def advance(self, index: int) -> None:
        """Replace the stream by the block's outputs under its present weights."""
        block = self._working_copy(index)
        self.hidden = [self._run(block, index, number, x) for number, x in enumerate(self.hidden)]

    def _working_copy(self, index: int) -> nn.Module:
        return copy.deepcopy(self.module.get_submodule(self.blocks[index])).to(self.compute)

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
