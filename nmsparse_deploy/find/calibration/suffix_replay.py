"""Whole forward passes that start at a block: what the dense model computes before it is remembered, not repeated.

While the blocks before number `b` keep their weights, their outputs are known. They are replaced by stubs: block
`b - 1` returns its recorded output, the earlier ones hollow tensors of the right shape that nobody reads. Only one
block boundary is kept. A model that does read them (a skip connection over several blocks) is found out by a trial, and
then every pass is a whole one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from nmsparse_deploy.find.calibration.block_runner import Batch, Captured, Output, answering
from nmsparse_deploy.find.calibration.expert_statistics import Routed
from nmsparse_deploy.find.calibration.layer_stats import LayerStats, Need, StatsAccumulator
from nmsparse_deploy.models.base import Target
from nmsparse_deploy.models.matmul_observer import Product, Watch

Seen = Callable[[int, Output], torch.Tensor]
"""Turns the output of batch `number` into what is wanted of it, so that outputs need not be kept."""


class Tail:
    """Passes over `batches` that start at block `start`, with everything before it dense."""

    def __init__(self, module: nn.Module, blocks: Sequence[str], batches: Sequence[Batch], see: Seen) -> None:
        self.module = module.eval()
        self.layers = [module.get_submodule(path) for path in blocks]
        self.batches = batches
        self.see = see
        self.start = 0
        self._hollow: list[list[Output]] = []
        self._boundary: list[Output] = []
        self.dense = self._first_pass()
        """What `see` made of the dense model's outputs."""
        self.resumes = self._trial()

    @torch.no_grad()
    def run(self) -> list[torch.Tensor]:
        """`see` of every batch under the present weights of block `start` and those after it."""
        return [self._pass(number) for number in range(len(self.batches))]

    @torch.no_grad()
    def advance(self) -> None:
        """Move the start past the (dense) block `start`."""
        if self.resumes:
            self._boundary = [self._output_of(number, self.start) for number in range(len(self.batches))]
        self.start += 1

    def start_over(self) -> None:
        """Passes are whole again."""
        self.start, self._boundary = 0, []

    @torch.no_grad()
    def statistics(self, targets: Sequence[Target], need: Need) -> dict[str, LayerStats]:
        """What the targets of block `start` read in the dense model, one entry a fusion group."""
        readers = {target.fusion: target for target in reversed(targets)}
        device = next(self.module.parameters()).device
        sums: dict[str, StatsAccumulator | Routed] = {
            fusion: Routed(need, t, device) if t.routed else StatsAccumulator(need) for fusion, t in readers.items()}
        handles = [self.module.get_submodule(target.module).register_forward_pre_hook(
            lambda layer, args, total=sums[fusion]: total.update(layer, args[0]))
            for fusion, target in readers.items() if not target.watched]
        watched = {target.name: target for target in readers.values() if target.watched}

        def multiplied(product: Product) -> None:
            target = watched[product.weight]
            sums[target.fusion].update(self.module.get_submodule(target.module), product.rows, expert=product.expert)

        weights = {name: self.module.get_parameter(name) for name in watched}
        try:
            with Watch(weights, multiplied) if watched else nullcontext():
                for number in range(len(self.batches)):
                    self._output_of(number, self.start)
        finally:
            for handle in handles:
                handle.remove()
        return {fusion: total.finish() for fusion, total in sums.items()}

    @torch.no_grad()
    def _first_pass(self) -> list[torch.Tensor]:
        found = []
        for number, batch in enumerate(self.batches):
            outputs: list[Output] = []
            handles = [layer.register_forward_hook(lambda _m, _i, output, into=outputs: into.append(_hollow(output)))
                       for layer in self.layers]
            try:
                found.append(self.see(number, self.module(**batch)))
            finally:
                for handle in handles:
                    handle.remove()
            self._hollow.append(outputs)
        return found

    @torch.no_grad()
    def _trial(self) -> bool:
        """Does a pass over the first batch that starts at the last block see the same as a whole one?"""
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
            return self.see(number, self.module(**self.batches[number]))

    def _output_of(self, number: int, block: int) -> Output:
        """What block `block` returns for a batch; the pass is left there."""
        kept: list[Output] = []

        def leave(_module: nn.Module, _inputs: Any, output: Output) -> None:
            kept.append(output)
            raise Captured

        handle = self.layers[block].register_forward_hook(leave)
        try:
            with self._stubs(number):
                self.module(**self.batches[number])
        except Captured:
            pass
        finally:
            handle.remove()
        return kept[0]

    def _stubs(self, number: int) -> AbstractContextManager[None]:
        """The blocks before `start` answer what they are known to answer for a batch."""
        def answer(index: int) -> Output:
            return self._boundary[number] if index == self.start - 1 else self._hollow[number][index]

        return answering(self.layers[: self.start] if self._boundary else [], answer)


def _hollow(value: Any) -> Any:
    """The same structure and shapes without the memory."""
    if isinstance(value, torch.Tensor):
        return value.new_zeros(()).expand(value.shape)
    if isinstance(value, tuple):
        return tuple(_hollow(item) for item in value)
    return None
