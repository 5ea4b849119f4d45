"""Walk a model block by block: capture what enters the first block, then replay one block at a
time.

Only the hidden states of one block boundary are kept. Every keyword argument a block was called
with is replayed as it was, whatever its name, so nothing here depends on a model family or a
library version.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.find.calibration.block_runner import BlockRunner, Output, hidden_states_of
from nmsparse_deploy.find.calibration.block_wiring import find_wiring
from nmsparse_deploy.find.calibration.buffers import Buffer, MakeBuffer
from nmsparse_deploy.find.calibration.expert_statistics import ExpertAccumulator, accumulator
from nmsparse_deploy.find.calibration.hidden_states import CalibrationStream
from nmsparse_deploy.find.calibration.layer_stats import LayerStats, Need, StatsAccumulator
from nmsparse_deploy.find.calibration.shared import share
from nmsparse_deploy.models.base import Target
from nmsparse_deploy.models.capture import OnInput, capture
from nmsparse_deploy.models.loaded import Batch
from nmsparse_deploy.models.matmul_observer import MatmulObserver, Product
from nmsparse_deploy.models.residual_stream import EXIT, residual_writers
from nmsparse_deploy.models.weight_store import IN_MEMORY, WeightStore
from nmsparse_deploy.system.distributed import ALONE, Processes

Accumulator = StatsAccumulator | ExpertAccumulator


@dataclass
class _BlockTrace:
    """A record of one run of a block: the input of each fusion group, the output of each residual
    writer and what it was added to, and the block's output. Where products are observed, `products`
    has the input of each matrix."""

    reads: dict[str, torch.Tensor] = field(default_factory=dict)
    products: dict[str, list[tuple[int, torch.Tensor]]] = field(default_factory=dict)
    written: dict[str, torch.Tensor] = field(default_factory=dict)
    rests: dict[str, torch.Tensor] = field(default_factory=dict)
    output: Output = None


class BlockWalk:
    """The calibration stream at the entrance of one block, with the way to move it past the block.

    `hidden` is what the pruned model computes there; with `both`, `dense` is what the dense model
    computes. Collecting statistics moves `dense` to the exit of the block and leaves what it was at
    the entrance in `entered`. With a `team` the batches are this process's share, and statistics
    are those of all processes.
    """

    def __init__(
        self,
        module: nn.Module,
        blocks: Sequence[str],
        batches: Sequence[Batch],
        compute: torch.dtype = torch.float32,
        both: bool = False,
        weights: WeightStore = IN_MEMORY,
        buffer: MakeBuffer = list,
        team: Processes = ALONE,
    ) -> None:
        self.module = module.eval()
        self._team = team
        self.blocks = list(blocks)
        self.compute = compute
        runner = BlockRunner(self.module, blocks, compute, weights)
        wiring = find_wiring(runner, batches[0])
        last = len(self.blocks) - 1
        uniform = len(wiring.starts) == 1 and len(wiring.follows) == last
        self._shapes: list[torch.Size] = []
        """Of the first batch's hidden states, block by block as far as they were seen."""
        hidden, calls = buffer(), []
        for batch in batches:
            x, batch_calls, shapes = runner.calls(batch, 0 if uniform else last)
            hidden.append(x)
            calls.append(batch_calls)
            self._shapes = self._shapes or shapes
        self._stream = CalibrationStream(runner, wiring, batches, hidden, calls, buffer)
        self._dense = self._stream.twin() if both else None
        self.entered: Buffer | None = None
        self._items: int | None = None
        """How many items the last whole run of a block returned; None: just the hidden states."""
        self._layouts: dict[tuple[str, ...], dict[str, str]] = {}

    @property
    def hidden(self) -> Buffer:
        return self._stream.hidden

    @property
    def dense(self) -> Buffer | None:
        return None if self._dense is None else self._dense.hidden

    def example(self, index: int) -> torch.Tensor:
        """Return hidden states of the shape that block `index` takes, to try something out on
        it."""
        x = self.hidden[0]
        shape = self._shapes[index] if index < len(self._shapes) else x.shape
        return (
            x
            if x.shape == shape
            else torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(x)
        )

    def statistics(
        self,
        index: int,
        targets: Sequence[Target],
        need: Need,
        weights: Mapping[str, torch.Tensor] | None = None,
        last: bool = True,
    ) -> dict[str, LayerStats]:
        """Run the block over the stream and return the statistics of every fusion group of
        `targets`.

        `weights` stand in for parameters of the block in the pruned stream (those that are pruned
        already); nothing else of the model changes. With `last` the dense stream moves past the
        block.
        """
        dense = self._working_copy(index)
        pruned = self._working_copy(index, weights) if weights else dense
        readers = {t.fusion: t for t in reversed(targets)}
        twin = self._dense is not None and need == "gram"
        writers = self._writers(dense, index) if twin else {}
        device = self.hidden[0].device
        sums = {
            fusion: accumulator(need, target, device, twin) for fusion, target in readers.items()
        }

        def passes() -> Iterator[Output]:
            """Add batch by batch to the sums; yield what leaves the block in the dense stream,
            where it moves."""
            for number in range(len(self.hidden)):
                dense_trace = None
                if self._dense is not None and (twin or last):
                    dense_trace = self._trace(
                        dense, index, number, self._dense, readers, writers, whole=last
                    )
                trace = self._trace(
                    pruned, index, number, self._stream, readers, writers, whole=False
                )
                self._add(sums, readers, index, pruned, trace, dense_trace if twin else None)
                yield dense_trace.output if dense_trace else None

        if self._dense is not None and last:
            self.entered = self._dense.hidden
            self._dense.move(index, passes())
        else:
            for _ in passes():
                pass
        share([part for total in sums.values() for part in total.parts()], device, self._team)
        return {fusion: total.finish() for fusion, total in sums.items()}

    def _add(
        self,
        sums: Mapping[str, Accumulator],
        readers: Mapping[str, Target],
        index: int,
        pruned: nn.Module,
        trace: _BlockTrace,
        dense_trace: _BlockTrace | None,
    ) -> None:
        """Add one batch to the sums: what was read in the pruned stream, and beside it in the dense
        one."""
        for fusion, target in readers.items():
            path, total = self._inside(index, target.module), sums[fusion]
            layer = pruned.get_submodule(path)
            for expert, rows in trace.products.get(fusion, ()):
                total.update(layer, rows, expert=expert)
            if fusion not in trace.reads:
                continue
            dense_input = dense_trace.reads[fusion] if dense_trace and not target.routed else None
            drift = (
                dense_trace.rests[path] - trace.rests[path]
                if dense_trace and path in trace.rests
                else None
            )
            total.update(layer, trace.reads[fusion], dense_input, drift)

    def _inside(self, index: int, name: str) -> str:
        return name.removeprefix(self.blocks[index] + ".")

    def _writers(self, block: nn.Module, index: int) -> dict[str, str]:
        """Find what writes to the residual stream, once for each make of block."""
        layout = tuple(name for name, _ in block.named_parameters())
        if layout not in self._layouts:
            entrance = self.hidden[0]
            self._layouts[layout] = residual_writers(
                block, lambda m: self._run(m, index, 0, entrance), entrance
            )
        return self._layouts[layout]

    def _trace(
        self,
        block: nn.Module,
        index: int,
        number: int,
        stream: CalibrationStream,
        readers: Mapping[str, Target],
        writers: Mapping[str, str],
        whole: bool,
    ) -> _BlockTrace:
        """Run a block and record; the run ends when everything wanted was seen, unless `whole`."""
        trace = _BlockTrace()
        layers = {
            self._inside(index, t.module): fusion for fusion, t in readers.items() if not t.watched
        }
        observed = {
            self._inside(index, t.name): fusion for fusion, t in readers.items() if t.watched
        }
        places = {layer: writers[layer] for layer in layers if layer in writers}
        waiting = {*layers, *places.values(), *observed}

        def reads(layer: str, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            trace.reads[layers[layer]] = args[0] if args else next(iter(named.values()))
            waiting.discard(layer)

        def multiplied(product: Product) -> None:
            trace.products.setdefault(observed[product.weight], []).append(
                (product.expert, product.rows)
            )

        def writes(layer: str, _args: tuple[Any, ...], output: torch.Tensor) -> None:
            trace.written[layer] = output

        def arrives(place: str, args: tuple[Any, ...], _named: dict[str, Any]) -> None:
            state = args[0]
            for layer in (layer for layer in places if places[layer] == place):
                trace.rests[layer] = (
                    state.reshape(trace.written[layer].shape).float() - trace.written[layer].float()
                )
            waiting.discard(place)

        inputs: dict[str, OnInput] = {layer: partial(reads, layer) for layer in layers}
        inputs |= {place: partial(arrives, place) for place in {*places.values()} - {EXIT}}
        observer: AbstractContextManager = nullcontext()
        if observed:
            observer = MatmulObserver(
                {name: block.get_parameter(name) for name in observed}, multiplied
            )
        with (
            observer,
            torch.no_grad(),
            capture(
                block,
                inputs,
                {layer: partial(writes, layer) for layer in places},
                stop=lambda: not whole and not waiting,
            ),
        ):
            trace.output = self._call(block, index, number, stream.hidden[number], stream)
            self._items = len(trace.output) if isinstance(trace.output, (tuple, list)) else None
            arrives(EXIT, (hidden_states_of(trace.output, self._stream.wiring.place),), {})
        return trace

    def pass_dense(self, index: int) -> None:
        """Move the dense stream past a still dense block whose statistics are not needed."""
        if self._dense is not None:
            self._pass(self._dense, index)

    def advance(self, index: int, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        """Replace the stream by the block's outputs under its present weights, or under `weights`
        in their place."""
        self._pass(self._stream, index, weights)

    @torch.no_grad()
    def _pass(
        self,
        stream: CalibrationStream,
        index: int,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        block = self._working_copy(index, weights)
        stream.move(
            index,
            (self._call(block, index, number, x, stream) for number, x in enumerate(stream.hidden)),
        )

    def _working_copy(
        self, index: int, weights: Mapping[str, torch.Tensor] | None = None
    ) -> nn.Module:
        block = copy.deepcopy(self.module.get_submodule(self.blocks[index]))
        with torch.no_grad():
            for name, value in (weights or {}).items():
                block.get_parameter(name.removeprefix(self.blocks[index] + ".")).copy_(value)
        return block.to(self.compute)

    @torch.no_grad()
    def _run(self, block: nn.Module, index: int, number: int, x: torch.Tensor) -> torch.Tensor:
        return self.run(block, index, number, x)

    def run(self, block: nn.Module, index: int, number: int, x: torch.Tensor) -> torch.Tensor:
        """Call `block` on hidden states `x` with the other arguments that block `index` gets for
        batch `number`.

        A block held in another dtype than the stream runs under autocast.
        """
        return hidden_states_of(
            self._call(block, index, number, x, self._stream), self._stream.wiring.place
        )

    def finish(self, index: int, number: int, x: torch.Tensor) -> Any:
        """Return the model's output for batch `number` when block `index` puts out `x`, with its
        gradient.

        The blocks after it run as they are. What a block returns beside its hidden states is left
        empty, so a block of two streams has to be the last one.
        """
        output: Output = x
        if self._items is not None:
            place = self._stream.wiring.place
            if place and index + 1 < len(self.blocks):
                raise NmsparseError(
                    f"The block '{self.blocks[index]}' hands on two streams; what the model makes "
                    "of one alone cannot be told.",
                    "leave out what looks past the block (through)",
                )
            output = tuple(x if item == place else None for item in range(self._items))
        return self._stream.runner.finish(self._stream.batches[number], index, output)

    def _call(
        self, block: nn.Module, index: int, number: int, x: torch.Tensor, stream: CalibrationStream
    ) -> Output:
        mixed = next(block.parameters()).dtype != self.compute
        with torch.autocast(x.device.type, self.compute, enabled=mixed):
            return stream.call(index, number)(block, x)
