"""The calibration stream: hidden states at the entrance of one block, and how the model calls that
block.

Mostly what leaves a block enters the next as it is, and the other arguments do not depend on it.
Where something lies between two blocks (a change of resolution, a norm, the way from an encoder
into its decoder), or a block hands more than hidden states on, the model itself is run again with
every block that the stream has passed answering what it is known to have answered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from nmsparse_deploy.find.calibration.block_memo import BlockMemo
from nmsparse_deploy.find.calibration.block_runner import (
    BlockRunner,
    Call,
    Output,
    hidden_states_of,
)
from nmsparse_deploy.find.calibration.block_wiring import BlockWiring, ends_of
from nmsparse_deploy.find.calibration.buffers import Buffer, MakeBuffer
from nmsparse_deploy.models.loaded import Batch


class CalibrationStream:
    """Hidden states at the entrance of a block for every batch, and the calls that go with them."""

    def __init__(
        self,
        runner: BlockRunner,
        wiring: BlockWiring,
        batches: Sequence[Batch],
        hidden: Buffer,
        calls: Sequence[Sequence[Call]],
        buffer: MakeBuffer = list,
        spare: int = 0,
    ) -> None:
        self.runner, self.wiring, self.batches = runner, wiring, batches
        self.hidden = hidden
        self.memo = BlockMemo(spare)
        self.calls = [list(row) for row in calls]
        self._buffer = buffer
        self._ends = ends_of(wiring, len(runner.blocks))
        self._passed: dict[int, list[Output]] = {}

    def twin(self) -> CalibrationStream:
        """Make another stream that starts at the same place."""
        return CalibrationStream(
            self.runner,
            self.wiring,
            self.batches,
            self.hidden,
            self.calls,
            self._buffer,
            self.memo.budget,
        )

    def call(self, index: int, number: int) -> Call:
        """Return how block `index` is called for batch `number`."""
        while index in self.wiring.follows and index not in self.wiring.starts:
            index -= 1
        return self.calls[number][index]

    def move(self, index: int, outputs: Iterable[Output]) -> None:
        """Move from the entrance of block `index`, which returns `outputs`, to the entrance of the
        next."""
        after = self._buffer()
        if index + 1 not in self.wiring.starts or index + 1 == len(self.runner.blocks):
            for output in outputs:
                after.append(hidden_states_of(output, self.wiring.place))
            self.hidden = after
            self.memo.forget()
            return
        self._passed[index] = list(outputs)
        self.memo.forget()
        for number, batch in enumerate(self.batches):
            x, self.calls[number][index + 1] = self.runner.entrance(
                batch, index + 1, partial(self._answer, number)
            )
            after.append(x)
        self.hidden = after

    def _answer(self, number: int, block: int) -> Output:
        """Return what the run of blocks with `block` in it, which the stream has passed, came
        to."""
        return self._passed[self._ends[block]][number]
