"""Run forward passes that start at a block: what the dense model computes before it is remembered,
not repeated.

While the blocks before number `b` keep their weights, their outputs are known. They are replaced by
stubs: block `b - 1` returns its recorded output, the earlier ones hollow tensors of the right shape
that nothing reads. Only one block boundary is kept. A model that does read them (a skip connection
over several blocks) is found out by a trial, and then every pass is a whole one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from nmsparse_deploy.find.calibration.block_runner import Output, answering
from nmsparse_deploy.find.calibration.expert_statistics import accumulator
from nmsparse_deploy.find.calibration.layer_stats import LayerStats, Need
from nmsparse_deploy.models.base import Target
from nmsparse_deploy.models.capture import OnInput, capture
from nmsparse_deploy.models.loaded import Batch
from nmsparse_deploy.models.matmul_observer import MatmulObserver, Product

Reduce = Callable[[int, Output], torch.Tensor]
"""Turns the output of batch `number` into what is wanted of it, so that outputs need not be
kept."""


class SuffixReplay:
    """Passes over `batches` that start at block `start`, with everything before it dense."""

    def __init__(
        self, module: nn.Module, blocks: Sequence[str], batches: Sequence[Batch], reduce: Reduce
    ) -> None:
        self.module = module.eval()
        self.blocks = list(blocks)
        self.layers = [module.get_submodule(path) for path in blocks]
        self.batches = batches
        self.reduce = reduce
        self.start = 0
        self._hollow: list[list[Output]] = []
        self._boundary: list[Output] = []
        self.dense = self._first_pass()
        """What `reduce` made of the dense model's outputs."""
        self.resumes = self._trial()

    @torch.no_grad()
    def run(self) -> list[torch.Tensor]:
        """Return `reduce` of every batch under the present weights of block `start` and those after
        it."""
        return [self._pass(number) for number in range(len(self.batches))]

    @torch.no_grad()
    def advance(self) -> None:
        """Move the start past the (dense) block `start`."""
        if self.resumes:
            self._boundary = [
                self._output_of(number, self.start) for number in range(len(self.batches))
            ]
        self.start += 1

    def start_over(self) -> None:
        """Make passes whole again."""
        self.start, self._boundary = 0, []

    @torch.no_grad()
    def statistics(self, targets: Sequence[Target], need: Need) -> dict[str, LayerStats]:
        """Return what the targets of block `start` read in the dense model, one entry a fusion
        group."""
        readers = {target.fusion: target for target in reversed(targets)}
        device = next(self.module.parameters()).device
        sums = {fusion: accumulator(need, target, device) for fusion, target in readers.items()}
        observed = {target.name: target for target in readers.values() if target.watched}

        def reads(target: Target, args: tuple[Any, ...], _named: dict[str, Any]) -> None:
            sums[target.fusion].update(self.module.get_submodule(target.module), args[0])

        def multiplied(product: Product) -> None:
            target = observed[product.weight]
            sums[target.fusion].update(
                self.module.get_submodule(target.module), product.rows, expert=product.expert
            )

        inputs: dict[str, OnInput] = {
            target.module: partial(reads, target)
            for target in readers.values()
            if not target.watched
        }
        weights = {name: self.module.get_parameter(name) for name in observed}
        with (
            capture(self.module, inputs),
            MatmulObserver(weights, multiplied) if observed else nullcontext(),
        ):
            for number in range(len(self.batches)):
                self._output_of(number, self.start)
        return {fusion: total.finish() for fusion, total in sums.items()}

    @torch.no_grad()
    def _first_pass(self) -> list[torch.Tensor]:
        reduced = []
        for number, batch in enumerate(self.batches):
            outputs: list[Output] = []

            def leaves(
                _args: tuple[Any, ...], output: Output, into: list[Output] = outputs
            ) -> None:
                into.append(_hollow(output))

            with capture(self.module, outputs=dict.fromkeys(self.blocks, leaves)):
                reduced.append(self.reduce(number, self.module(**batch)))
            self._hollow.append(outputs)
        return reduced

    @torch.no_grad()
    def _trial(self) -> bool:
        """Tell whether a pass over the first batch that starts at the last block gives the same as
        a whole one."""
        last = len(self.layers) - 1
        if any(len(outputs) != len(self.layers) for outputs in self._hollow) or last == 0:
            return False
        self._boundary = [self._output_of(0, last - 1)]
        self.start = last
        try:
            return torch.equal(self._pass(0), self.dense[0])
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False
        finally:
            self.start_over()

    def _pass(self, number: int) -> torch.Tensor:
        with self._stubs(number):
            return self.reduce(number, self.module(**self.batches[number]))

    def _output_of(self, number: int, block: int) -> Output:
        """Return what block `block` makes of a batch; the pass is left there."""
        outputs: list[Output] = []
        leaves = {self.blocks[block]: lambda _args, output: outputs.append(output)}
        with self._stubs(number), capture(self.module, outputs=leaves, stop=lambda: bool(outputs)):
            self.module(**self.batches[number])
        return outputs[0]

    def _stubs(self, number: int) -> AbstractContextManager[None]:
        """Let the blocks before `start` answer what they are known to answer for a batch."""

        def answer(index: int) -> Output:
            return (
                self._boundary[number] if index == self.start - 1 else self._hollow[number][index]
            )

        return answering(self.layers[: self.start] if self._boundary else [], answer)


def _hollow(value: Any) -> Any:
    """Keep the structure and the shapes without the memory."""
    if isinstance(value, torch.Tensor):
        return value.new_zeros(()).expand(value.shape)
    if isinstance(value, tuple):
        return tuple(_hollow(item) for item in value)
    return None
