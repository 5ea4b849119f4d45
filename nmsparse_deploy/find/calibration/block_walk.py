"""Walk a model block by block: capture what enters the first block, then replay one block at a
time.

Only the hidden states of one block boundary are kept. Every keyword argument a block was called
with is replayed as it was, whatever its name, so nothing here depends on a model family or a
library version.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.find.calibration.block_runner import BlockRunner, Output, hidden_states_of
from nmsparse_deploy.find.calibration.block_trace import BlockTrace, Wanted, trace_block
from nmsparse_deploy.find.calibration.block_wiring import find_wiring
from nmsparse_deploy.find.calibration.buffers import Buffer, MakeBuffer
from nmsparse_deploy.find.calibration.expert_statistics import ExpertAccumulator, accumulator
from nmsparse_deploy.find.calibration.hidden_states import CalibrationStream
from nmsparse_deploy.find.calibration.layer_stats import LayerStats, Need, StatsAccumulator
from nmsparse_deploy.find.calibration.shared import share
from nmsparse_deploy.models.base import Target
from nmsparse_deploy.models.loaded import Batch
from nmsparse_deploy.models.residual_stream import residual_writers
from nmsparse_deploy.models.weight_store import IN_MEMORY, WeightStore
from nmsparse_deploy.system.distributed import ALONE, Processes

Accumulator = StatsAccumulator | ExpertAccumulator


class BlockWalk:
    """The calibration stream at the entrance of one block, with the way to move it past the block.

    `hidden` is what the pruned model computes there; with `both`, `dense` is what the dense model
    computes. Collecting statistics moves `dense` to the exit of the block and leaves what it was at
    the entrance in `entered`. With a `team` the batches are this process's share, and statistics
    are those of all processes. With `spare` bytes a stream remembers what parts of a block have put
    out, and does not compute it again; the results are the same.
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
        spare: int = 0,
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
        self._stream = CalibrationStream(
            runner, wiring, batches, hidden, calls, buffer, spare // (1 + both)
        )
        self._dense = self._stream.twin() if both else None
        self.entered: Buffer | None = None
        self._items: int | None = None
        """How many items the last whole run of a block returned; None: just the hidden states."""
        self._layouts: dict[tuple[str, ...], dict[str, str]] = {}
        self._tried: set[tuple[object, ...]] = set()
        """Runs whose memory was compared with a run that computes everything."""

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
        wanted = self._wanted(index, readers.values(), self._writers(dense, index) if twin else {})
        changing = [self._inside(index, target.module) for target in targets]
        device = self.hidden[0].device
        sums = {
            fusion: accumulator(need, target, device, twin) for fusion, target in readers.items()
        }

        self._stream.memo.start(pruned)
        if self._dense is not None:
            self._dense.memo.start(dense)

        def passes() -> Iterator[Output]:
            """Add batch by batch to the sums; yield what leaves the block in the dense stream,
            where it moves."""
            for number in range(len(self.hidden)):
                dense_trace = None
                if self._dense is not None and (twin or last):
                    dense_trace = self._trace(
                        dense, index, number, self._dense, wanted, last, None if last else changing
                    )
                trace = self._trace(pruned, index, number, self._stream, wanted, False, changing)
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
        trace: BlockTrace,
        dense_trace: BlockTrace | None,
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
            wanted = None
            if dense_trace and drift is not None and path in dense_trace.written:
                bias = getattr(layer, "bias", None)
                wanted = dense_trace.written[path]
                wanted = wanted if bias is None else wanted - bias
            total.update(layer, trace.reads[fusion], dense_input, drift, wanted)

    def _wanted(
        self, index: int, readers: Collection[Target], writers: Mapping[str, str]
    ) -> Wanted:
        """Return what a run of the block records: what each fusion group's reader reads."""
        layers = {self._inside(index, t.module): t.fusion for t in readers if not t.watched}
        return Wanted(
            layers,
            {self._inside(index, t.name): t.fusion for t in readers if t.watched},
            {layer: writers[layer] for layer in layers if layer in writers},
        )

    def _inside(self, index: int, name: str) -> str:
        path = self.blocks[index]
        return "" if name == path else name.removeprefix(path + ".")

    def _writers(self, block: nn.Module, index: int) -> dict[str, str]:
        """Find what writes to the residual stream, once for each make of block."""
        layout = _layout(block)
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
        wanted: Wanted,
        whole: bool,
        until: Sequence[str] | None,
    ) -> BlockTrace:
        """Run a block on a batch and record. What it puts out before the layers `until` is
        remembered for the next run; None remembers nothing.

        The first run in which anything answers from memory is compared with one that computes
        everything.
        """

        def trace() -> BlockTrace:
            return trace_block(
                block,
                lambda: self._call(block, index, number, stream.hidden[number], stream),
                lambda output: hidden_states_of(output, self._stream.wiring.place),
                wanted,
                whole,
                silent=stream is self._stream,
            )

        with stream.memo.running(block, number, until):
            done = trace()
        if self._untried(block, stream, [*wanted.layers]) and not done.same(plain := trace()):
            self._distrust()
            return plain
        if done.output is not None:
            self._items = len(done.output) if isinstance(done.output, (tuple, list)) else None
        return done

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
        stream.memo.start(block)

        def passes() -> Iterator[Output]:
            for number, x in enumerate(stream.hidden):
                with stream.memo.running(block, number, None):
                    output = self._call(block, index, number, x, stream)
                if self._untried(block, stream, []):
                    plain = self._call(block, index, number, x, stream)
                    place = stream.wiring.place
                    if not torch.equal(
                        hidden_states_of(plain, place), hidden_states_of(output, place)
                    ):
                        self._distrust()
                        output = plain
                yield output

        stream.move(index, passes())

    def _untried(self, block: nn.Module, stream: CalibrationStream, read: list[str]) -> bool:
        """Tell whether this is the first run of its kind in which modules answer from memory."""
        kind = (_layout(block), stream is self._dense, *read)
        if not stream.memo.answers or kind in self._tried:
            return False
        self._tried.add(kind)
        return True

    def _distrust(self) -> None:
        """Compute everything from now on: a block does more than its modules' outputs tell."""
        for stream in (self._stream, self._dense):
            if stream is not None:
                stream.memo.budget = 0
                stream.memo.forget()

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


def _layout(block: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, _ in block.named_parameters())
