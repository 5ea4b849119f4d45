"""What modules of a block put out in one run, so that the next run need not compute it again.

A block is run once for each group of its layers, and once more to move on. Up to the inputs of a
group nothing changes after its turn: the weights before them are final, and so are the hidden
states at the entrance. The modules there answer with what they have put out before. Which ones may
is found by comparison: those that were done before any module was entered whose parameters differ
by now. A module that ends with a layer of the group (attention with its output projection) is
answered by that layer alone, on the input that it had.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from nmsparse_deploy.models.capture import capture
from nmsparse_deploy.models.forwards import Forward, replaced

Shape = tuple[bool, ...] | None
"""Which items of an output are tensors; None for an output that is one."""


@dataclass
class _Record:
    """What is kept of one run: outputs of modules by path, and the input of the layer where it
    ended."""

    outputs: dict[str, Any] = field(default_factory=dict)
    end: str = ""
    read: torch.Tensor | None = None

    @property
    def size(self) -> int:
        tensors = [t for output in self.outputs.values() for t in _tensors(output)]
        tensors += [] if self.read is None else [self.read]
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


class BlockMemo:
    """The outputs of modules of one block, for each batch of a stream.

    Kept are those of the outermost modules that hold a matrix, within `budget` bytes; what is not
    kept is computed again.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._ends: dict[str, tuple[str, Shape]] = {}
        """Modules that put out what a layer in them does, with that layer and their form."""
        self.forget()

    def forget(self) -> None:
        """Start anew: at another block, or with other hidden states."""
        self._block: nn.Module | None = None
        self._events: list[tuple[str, bool]] = []
        """Of a run of `_block`, in order: a module is entered (True), or done (False)."""
        self._records: dict[int, _Record] = {}
        self._held = 0
        """Bytes of the records."""
        self._known: frozenset[str] = frozenset()
        self._resumed = ""

    @property
    def answers(self) -> bool:
        """Whether anything is answered in the runs of the present block."""
        return bool(self._known or self._resumed)

    def start(self, block: nn.Module) -> None:
        """Find out what can be answered in runs of `block`: the same block, perhaps with other
        weights."""
        if not self.budget:
            return
        self._known, self._resumed = self._unchanged(block)
        self._block, self._events = block, []

    def _unchanged(self, block: nn.Module) -> tuple[frozenset[str], str]:
        """Return the modules that answer, and the one that is answered by its last layer."""
        if self._block is None or not self._records or not _equal(self._block, block, whole=False):
            return frozenset(), ""
        opaque, done, reached = {*self._known, self._resumed}, set(), True
        for path, enters in self._events:
            before, now = self._block.get_submodule(path), block.get_submodule(path)
            if enters and not _equal(before, now, whole=path in opaque):
                reached = False
                break
            if not enters:
                done.add(path)
        records = self._records.values()
        known = done.intersection(*(record.outputs for record in records))
        ends = {record.end for record in records if record.read is not None}
        resumed = ""
        if reached and len(ends) == 1 and all(record.read is not None for record in records):
            entered = {path for path, enters in self._events if enters} - done
            resumed = min(
                (path for path in entered if self._ends.get(path, ("",))[0] in ends),
                key=len,
                default="",
            )
        if resumed:
            known = {path for path in known if not path.startswith(resumed + ".")}
        return frozenset(known), resumed

    @contextmanager
    def running(
        self, block: nn.Module, number: int, until: Collection[str] | None
    ) -> Iterator[None]:
        """Run a block on batch `number`, where known modules answer.

        What it puts out before a module of `until` is entered is kept for the next run; None keeps
        nothing.
        """
        last = self._records.get(number, _Record())
        paths = [*sorted(self._known), *([self._resumed] if self._resumed else [])]

        def make(index: int, forward: Forward) -> Forward:
            path = paths[index]
            if path != self._resumed:
                return _answer(last.outputs[path], forward)
            layer, shape = self._ends[path]
            return _resume(block.get_submodule(layer), shape, last, forward)

        answers = replaced([block.get_submodule(path) for path in paths], make)
        if until is None or not self.budget:
            with answers:
                yield
            return
        recorder = _Recorder(block, {path: last.outputs[path] for path in self._known}, until)
        with answers, recorder.watching(paths):
            yield
        self._ends |= recorder.ends
        self._events = self._events or recorder.events
        record = recorder.finish({layer for layer, _ in self._ends.values()})
        others = self._held - last.size
        if others + record.size > self.budget:
            record = _Record(recorder.given)
        self._records[number], self._held = record, others + record.size


class _Recorder:
    """One run that is being recorded. `given` are the outputs that are known already."""

    def __init__(self, block: nn.Module, given: dict[str, Any], until: Collection[str]) -> None:
        self.block, self.given, self.until = block, given, until
        self.events: list[tuple[str, bool]] = []
        self.ends: dict[str, tuple[str, Shape]] = {}
        self._record = _Record(dict(given))
        self._versions: list[tuple[str, torch.Tensor, int]] = []
        self._layers: list[tuple[str, torch.Tensor, int]] = []

    def watching(self, answered: list[str]) -> Any:
        """Hand what the modules do to this record, but for those inside of answered ones."""
        paths = [
            path
            for path, _ in self.block.named_modules()
            if path and not any(path.startswith(outer + ".") for outer in answered)
        ]
        return capture(
            self.block,
            {path: partial(self._enters, path) for path in paths},
            {path: partial(self._leaves, path) for path in paths},
        )

    def _enters(self, path: str, args: tuple[Any, ...], _named: object) -> None:
        if self._record.end:
            return
        if path in self.until:
            self._record.end = path
            if args and isinstance(args[0], torch.Tensor):
                self._record.read = args[0]
                self._versions.append(("", args[0], args[0]._version))
            return
        self.events.append((path, True))

    def _leaves(self, path: str, _args: tuple[Any, ...], output: Any) -> None:
        module, tensors = self.block.get_submodule(path), _tensors(output)
        matrix = any(parameter.dim() > 1 for parameter in module.parameters())
        if matrix and len(tensors) == 1:
            self._find_end(path, output, tensors[0], leaf=not list(module.children()))
        if self._record.end:
            return
        self.events.append((path, False))
        if path in self.given or not tensors or not matrix:
            return
        outputs = self._record.outputs
        for inner in [name for name in outputs if name.startswith(path + ".")]:
            del outputs[inner]
        if self.events.count((path, False)) > 1:  # of two outputs, none is kept
            outputs.pop(path, None)
            return
        outputs[path] = output
        self._versions += [(path, tensor, tensor._version) for tensor in tensors]

    def _find_end(self, path: str, output: Any, tensor: torch.Tensor, leaf: bool) -> None:
        if leaf:
            self._layers.append((path, tensor, tensor._version))
            return
        for layer, inner, version in reversed(self._layers):
            same = tensor.data_ptr() == inner.data_ptr() and tensor.shape == inner.shape
            if same and tensor._version == version and layer.startswith(path + "."):
                self.ends[path] = (layer, _items(output))
                return

    def finish(self, ends: set[str]) -> _Record:
        """Return what was recorded, without what somebody has changed in place since."""
        for path, tensor, version in self._versions:
            if tensor._version != version:
                self._record.outputs.pop(path, None)
                self._record.read = self._record.read if path else None
        if self._record.end not in ends:
            self._record.read = None
        return self._record


def _answer(output: Any, forward: Forward) -> Forward:
    """Return `output` at the first call; the caller may change its copy. Another call is
    computed."""
    answers = [output]

    def instead(*args: Any, **named: Any) -> Any:
        return _copy(answers.pop()) if answers else forward(*args, **named)

    return instead


def _resume(layer: nn.Module, shape: Shape, record: _Record, forward: Forward) -> Forward:
    """Return what `layer` makes of the input it had, as the module around it would."""
    inputs = [record.read]

    def instead(*args: Any, **named: Any) -> Any:
        if not inputs:
            return forward(*args, **named)
        output = layer(inputs.pop())
        return output if shape is None else tuple(output if here else None for here in shape)

    return instead


def _equal(one: nn.Module, other: nn.Module, whole: bool) -> bool:
    """Compare the parameters of two copies of a module, with those of its submodules if `whole`."""
    pairs = zip(one.parameters(recurse=whole), other.parameters(recurse=whole))
    return all(torch.equal(a, b) for a, b in pairs)


def _tensors(output: Any) -> list[torch.Tensor]:
    """Return the tensors of an output; none when it is more than a tensor or a tuple of them."""
    if isinstance(output, torch.Tensor):
        return [output]
    if type(output) is tuple and all(
        item is None or isinstance(item, torch.Tensor) for item in output
    ):
        return [item for item in output if item is not None]
    return []


def _items(output: Any) -> Shape:
    return tuple(item is not None for item in output) if isinstance(output, tuple) else None


def _copy(output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(None if item is None else item.clone() for item in output)
    return output.clone()
