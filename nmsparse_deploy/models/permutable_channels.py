"""Channels of a block that may be renumbered without changing what it computes, found by asking the
block.

They are entries of the reduction axis of the layers that read one tensor (the consumers), together
with the rows, and biases, of the layers that write it (the producers). Three questions find it,
without names and without head counts:

1. *Which row writes channel j?* In a copy of the block every matrix product answers a constant: ones, but one layer
   answers `1 + bit b of the row's number`. A channel written by a single row repeats, bit by bit, what it gave for all
   ones or for all twos, and so spells the row. Constants see through attention: its weights sum to one. A norm mixes.
2. *Which channels are treated alike?* The producers answer one series of values over the tokens in every row, all other
   layers noise. Channels with the same answer may trade places: a whole MLP, one head of attention. A row that several
   heads read (grouped queries) binds their channels together; they are copies, and move as one.
3. *Is it true?* The real block is shuffled at random. Every other layer and the block itself must answer as before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nmsparse_deploy.models.input_trace import group_axis

Run = Callable[[nn.Module, torch.Tensor], torch.Tensor]
"""`run(block, x)`: call a block on hidden states as its model would."""
Answer = Callable[[str, torch.Size], torch.Tensor]
"""`answer(layer, shape)`: what the layer is made to put out."""

UNWRITTEN, MIXED = -1, -2
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Side:
    """Entries of one axis of a parameter: `places[c, s, i]` belongs to channel `i` of segment `s`,
    copy `c`."""

    parameter: str
    axis: int
    size: int
    places: torch.Tensor


@dataclass(frozen=True)
class PermutableChannels:
    """Channels in `segments` runs of `length`; each has a permutation of its own, which its
    `copies` share.

    Parameter names are those inside the block.
    """

    consumers: tuple[Side, ...]
    producers: tuple[Side, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(copies, segments, length)`"""
        copies, segments, length = self.consumers[0].places.shape
        return copies, segments, length

    def orders(self, local: torch.Tensor) -> dict[tuple[str, int], torch.Tensor]:
        """Where every entry of the axes comes from when channel `local[s, i]` takes the place of
        channel `i`."""
        orders: dict[tuple[str, int], torch.Tensor] = {}
        for side in (*self.consumers, *self.producers):
            order = orders.setdefault((side.parameter, side.axis), torch.arange(side.size))
            order[side.places] = side.places.gather(-1, local.expand_as(side.places))
        return orders


def reorder(module: nn.Module, orders: Mapping[tuple[str, int], torch.Tensor]) -> None:
    """Move entries of parameters in place: `new[i] = old[order[i]]` along the axis."""
    with torch.no_grad():
        for (name, axis), order in orders.items():
            parameter = module.get_parameter(name)
            parameter.copy_(parameter.index_select(axis, order.to(parameter.device)))


def find_permutable_channels(
    block: nn.Module, run: Run, x: torch.Tensor, readers: Sequence[Sequence[str]]
) -> tuple[list[PermutableChannels], dict[str, str]]:
    """Find what may be permuted in `block`, and for every other reader the reason why its channels
    are not free.

    `readers` are layers by path, those that read the same tensor together; `x`
    `[batch, tokens, hidden]` is one input.
    """
    block = copy.deepcopy(block).float().eval()
    stubs = _Stubs(block, run, x)
    groups = {group[0]: group for group in readers}
    written = _writers(stubs, [first for first in groups if first in stubs.width])
    sets, reasons = [], {}
    for first, group in groups.items():
        answer = (
            _channels_of(stubs, group, written[first])
            if first in written
            else "it was not reached by the probe"
        )
        if not isinstance(answer, str) and not all(
            _holds(block, run, x, channels) for channels in answer
        ):
            answer = "shuffling its channels changes what the block computes"
        if isinstance(answer, str):
            reasons[first] = answer
        else:
            sets += answer
    return sets, reasons


def _matrices(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, layer in block.named_modules():
        if group_axis(layer) is not None and layer.get_parameter("weight").ndim == 2:
            yield path, layer


class _Stubs:
    """A copy of a block whose matrix products answer what they are told, and remember what they
    read."""

    def __init__(self, block: nn.Module, run: Run, x: torch.Tensor) -> None:
        self.block = copy.deepcopy(block)
        self.layers = dict(_matrices(self.block))
        self.width = {
            path: layer.get_parameter("weight").numel()
            // layer.get_parameter("weight").shape[group_axis(layer) or 0]
            for path, layer in self.layers.items()
        }
        self._run, self._x = run, x
        self._answer: Answer = lambda path, shape: torch.ones(shape)
        self._seen: dict[str, torch.Tensor] = {}
        for path, layer in self.layers.items():
            layer.forward = lambda x, *_, path=path, **__: self._call(path, x)

    def _call(self, path: str, x: torch.Tensor) -> torch.Tensor:
        self._seen[path] = x.reshape(-1, x.shape[-1]).T
        return self._answer(path, torch.Size((*x.shape[:-1], self.width[path]))).to(x)

    @torch.no_grad()
    def ask(self, answer: Answer) -> dict[str, torch.Tensor]:
        """Return what every layer then reads, `[channels, tokens]`."""
        self._answer, self._seen = answer, {}
        self._run(self.block, self._x)
        return self._seen

    def constant(self, path: str, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Ask with `rows` as the outputs of one layer and ones from all others."""
        return self.ask(
            lambda layer, shape: rows.expand(shape).clone() if layer == path else torch.ones(shape)
        )


Writers = dict[tuple[str, int], torch.Tensor]
"""By layer and first of the rows that were probed: the row that writes each channel, `UNWRITTEN` or
`MIXED`."""


def _writers(stubs: _Stubs, consumers: Sequence[str]) -> dict[str, Writers]:
    """Find what writes each consumer. A layer that mixes is asked again in pieces: gate and up may
    be one matrix."""
    low = stubs.ask(lambda path, shape: torch.ones(shape))
    written: dict[str, Writers] = {name: {} for name in consumers if name in low}
    for path, width in stubs.width.items():
        for name, rows in _rows(stubs, low, path, 0, width).items():
            if name not in written:
                continue
            pieces = width // len(rows)
            if pieces < 2 or width % len(rows) or not (rows == MIXED).any():
                written[name][path, 0] = rows
                continue
            for first in range(0, width, len(rows)):
                probed = _rows(stubs, low, path, first, first + len(rows))
                if name in probed:
                    written[name][path, first] = probed[name]
    return written


def _rows(
    stubs: _Stubs, low: Mapping[str, torch.Tensor], path: str, start: int, stop: int
) -> dict[str, torch.Tensor]:
    """Find which of the rows `start` to `stop` of a layer writes each channel of everything that
    they reach."""

    def ask(values: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = torch.ones(stubs.width[path])
        rows[start:stop] += values
        return stubs.constant(path, rows)

    numbers = torch.arange(stop - start)
    high = ask(torch.ones(stop - start))
    reached = [name for name in low if name in high and _moved(low[name], high[name]).any()]
    answers = [
        ask((numbers >> bit & 1).float())
        for bit in range((stop - start - 1).bit_length())
        if reached
    ]
    spelled = {
        name: _spell(low[name], high[name], [answer[name] for answer in answers])
        for name in reached
    }
    return {
        name: torch.where(rows >= stop - start, MIXED, torch.where(rows >= 0, rows + start, rows))
        for name, rows in spelled.items()
    }


def _moved(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    if low.shape != high.shape:  # other tokens came this way
        return torch.ones(len(low), dtype=torch.bool, device=low.device)
    return ((high - low).abs() > TOLERANCE * torch.maximum(high.abs(), low.abs())).any(1)


def _spell(low: torch.Tensor, high: torch.Tensor, answers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Read the row's number from answers `[channels, tokens]` that must equal `low` (0) or `high`
    (1)."""
    if any(answer.shape != low.shape for answer in (high, *answers)):
        return torch.full((len(low),), MIXED)
    step = high - low
    size = step.square().sum(1)
    rows = torch.zeros(len(low), dtype=torch.int64, device=low.device)
    for bit, answer in enumerate(answers):
        is_one = ((answer - low) * step).sum(1) > size / 2
        off = (answer - torch.where(is_one.unsqueeze(1), high, low)).square().sum(1)
        rows = torch.where(
            (rows >= 0) & (off <= TOLERANCE * size), rows | is_one.long() << bit, MIXED
        )
    return torch.where(_moved(low, high), rows, UNWRITTEN).cpu()


def _channels_of(
    stubs: _Stubs, group: Sequence[str], written: Writers
) -> list[PermutableChannels] | str:
    """Find what may be permuted of the consumers `group`, or why there is nothing."""
    if not written:
        return "no layer of the block writes its channels one by one"
    mixed = [path for (path, _), rows in written.items() if (rows == MIXED).any()]
    if mixed:
        return f"its channels mix the outputs of '{mixed[0]}'"
    keys = torch.stack(list(written.values()))
    columns = (keys != UNWRITTEN).any(0).nonzero().flatten()
    _, unit, copies = keys[:, columns].unique(dim=1, return_inverse=True, return_counts=True)
    profiles = _profiles(stubs, written)[group[0]].cpu()
    by_unit = columns[unit.argsort(stable=True)].split(
        copies.tolist()
    )  # the channels of each unit, ascending
    sets: list[PermutableChannels] = []
    for count in copies.unique().tolist():
        places = torch.stack([channels for channels in by_unit if len(channels) == count])
        places = places[places[:, 0].argsort()]
        segments = _alike(profiles[places].flatten(1), keys[:, places[:, 0]].T == UNWRITTEN)
        if segments is None:
            return "its channels are not interchangeable"
        for length in sorted({len(segment) for segment in segments}):
            members = torch.stack([segment for segment in segments if len(segment) == length])
            sets.append(_with_writers(stubs, group, written, places[members].permute(2, 0, 1)))
    if any(
        side.places.unique().numel() < side.places.numel()
        for channels in sets
        for side in channels.producers
    ):
        return "one row writes channels that other rows tell apart"
    return sets


def _profiles(stubs: _Stubs, written: Writers) -> dict[str, torch.Tensor]:
    """Return what is read when the writing rows all put out the same series over tokens, and
    everything else noise."""
    seeds = {path: number for number, path in enumerate(stubs.width, 1)}

    def answer(path: str, shape: torch.Size) -> torch.Tensor:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seeds[path]))
        series = torch.randn(shape[:-1], generator=torch.Generator().manual_seed(0))
        for (writer, _), rows in written.items():
            if writer == path:
                values[..., rows[rows != UNWRITTEN]] = series.unsqueeze(-1)
        return values

    return stubs.ask(answer)


def _alike(profiles: torch.Tensor, unwritten: torch.Tensor) -> list[torch.Tensor] | None:
    """List units with equal profiles and writers by their numbers; None as soon as one is unlike
    all others."""
    limit = TOLERANCE * profiles.abs().max()
    left, segments = torch.arange(len(profiles)), []
    while len(left):
        like = (profiles[left] - profiles[left[0]]).abs().amax(1) <= limit
        like &= (unwritten[left] == unwritten[left[0]]).all(1)
        if like.sum() == 1:
            return None
        segments.append(left[like])
        left = left[~like]
    return segments


def _with_writers(
    stubs: _Stubs, group: Sequence[str], written: Writers, columns: torch.Tensor
) -> PermutableChannels:
    """Join `columns` `[copies, segments, length]` of the consumers, with the rows that write
    them."""
    consumers, producers = [], []
    for path in group:
        axis = group_axis(stubs.layers[path]) or 0
        consumers.append(
            Side(
                f"{path}.weight",
                axis,
                stubs.layers[path].get_parameter("weight").shape[axis],
                columns,
            )
        )
    for (path, _), rows in written.items():
        places = rows[columns[:1]]
        if (places == UNWRITTEN).all():
            continue
        axis = 1 - (group_axis(stubs.layers[path]) or 0)
        producers.append(Side(f"{path}.weight", axis, stubs.width[path], places))
        if getattr(stubs.layers[path], "bias", None) is not None:
            producers.append(Side(f"{path}.bias", 0, stubs.width[path], places))
    return PermutableChannels(tuple(consumers), tuple(producers))


def _holds(block: nn.Module, run: Run, x: torch.Tensor, channels: PermutableChannels) -> bool:
    """Check that a random shuffle leaves the block and its other layers as they were, and a wrong
    one is noticed."""
    generator = torch.Generator().manual_seed(0)
    _, segments, length = channels.shape
    orders = channels.orders(torch.rand(segments, length, generator=generator).argsort(1))
    half = {
        (side.parameter, side.axis): orders[side.parameter, side.axis]
        for side in channels.consumers
    }
    noise = torch.randn(x.shape, generator=generator).to(x)
    before, after, wrong = (_outputs(block, run, noise, moved) for moved in ({}, orders, half))
    writers = {side.parameter.rpartition(".")[0] for side in channels.producers}
    same = all(_close(after[path], before[path]) for path in before if path not in writers)
    reader = channels.consumers[0].parameter.rpartition(".")[0]
    return same and reader in before and not _close(wrong[reader], before[reader])


def _outputs(
    block: nn.Module, run: Run, x: torch.Tensor, orders: Mapping[tuple[str, int], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the outputs of the layers by path, and of the block under the empty path, after
    `orders`."""
    block = copy.deepcopy(block)
    reorder(block, orders)
    outputs: dict[str, torch.Tensor] = {}
    for path, layer in _matrices(block):
        layer.register_forward_hook(
            lambda _m, _args, output, path=path: outputs.__setitem__(path, output)
        )
    with torch.no_grad():
        outputs[""] = run(block, x)
    return outputs


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= TOLERANCE * b.norm())
