"""Permute: before a mask is chosen, bring channels into an order in which the groups lose less.

With scores `S_ij = |W_ij| ‖X_j‖` and a permutation `π` of the channels that may be permuted
(`models/permutable_channels.py`), the search raises what the shared projection will keep,

    Σ_rows Σ_groups  sum of the `keep` largest of S[row, π(group)]

Groups are paired at random, and in every pair all swaps of one channel for another are priced at
once: with `θ_i` the `keep`-th largest value of a row of the group without its channel `i`, the
group with `x` in its place keeps `kept(group \\ i) + max(0, x - θ_i)`. The best swap of each pair
is made when it gains. The block computes the same before and after, so the statistics are moved,
not collected again, and the rows that write the channels move along.

Pool & Yu, Channel Permutations for N:M Sparsity, 2021 (swaps, free sites of a network); scores as
in Zhang et al., Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models,
2024, section 4.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn

from nmsparse_deploy.find.calibration.layer_stats import LayerStats
from nmsparse_deploy.find.facts import Json
from nmsparse_deploy.find.plan.make_plan import PlanRow, by_fusion
from nmsparse_deploy.masks import project
from nmsparse_deploy.models.base import to_rows
from nmsparse_deploy.models.permutable_channels import (
    PermutableChannels,
    Run,
    find_permutable_channels,
    reorder,
)
from nmsparse_deploy.pattern import NMPattern

ROUNDS = 100
MIN_GAIN = 1e-6
"""A swap has to gain this share of what two groups keep; less is rounding."""

Orders = dict[tuple[str, int], torch.Tensor]


@dataclass(frozen=True)
class ChannelOrder:
    """Place `i` of segment `s` gets channel `order[s, i]` of that segment; what is kept before and
    after."""

    order: torch.Tensor
    before: float
    after: float


def search(
    scores: torch.Tensor, segments: int, pattern: NMPattern, rounds: int = ROUNDS, seed: int = 0
) -> ChannelOrder:
    """Find an order of the channels inside each segment that is never worse than none.

    `scores` are `[segments * length, rows]`.
    """
    length = len(scores) // segments
    count = length // pattern.group
    price = _Prices(scores, pattern)
    generator = torch.Generator().manual_seed(seed)
    first = torch.arange(segments).unsqueeze(1) * count
    idle = 0
    for _ in range(rounds if count > 1 else 0):
        mixed = torch.rand(segments, count, generator=generator).argsort(1) + first
        pairs = mixed[:, : count // 2 * 2].reshape(-1, 2).to(scores.device)
        idle = 0 if price.swap(pairs[:, 0], pairs[:, 1]) else idle + 1
        if idle == count:
            break
    before = retained(scores, pattern)
    after = retained(scores[price.slots.flatten()], pattern)
    if after <= before:
        return ChannelOrder(torch.arange(length).repeat(segments, 1), before, before)
    return ChannelOrder(
        price.slots.view(segments, length).cpu() - first * pattern.group, before, after
    )


def retained(scores: torch.Tensor, pattern: NMPattern) -> float:
    """Return what the shared projection keeps of `scores` `[channels, rows]`."""
    return float(scores[project(scores, pattern, axis=0)].sum(dtype=torch.float64))


class _Prices:
    """The sums that every group `slots` `[groups, group]` keeps, and would keep without each of its
    channels."""

    def __init__(self, scores: torch.Tensor, pattern: NMPattern) -> None:
        slots = torch.arange(len(scores), device=scores.device).view(-1, pattern.group)
        self.scores, self.slots, self.keep = scores, slots, pattern.keep
        self.kept = torch.empty(len(slots), device=scores.device)
        self.base = torch.empty(slots.shape, device=scores.device)
        self.threshold = torch.empty((*slots.shape, scores.shape[1]), device=scores.device)
        self._price(torch.arange(len(slots), device=scores.device))

    def _channels(self, groups: torch.Tensor) -> torch.Tensor:
        """Return scores `[groups, group, rows]`; whole rows are copied, which plain indexing does
        value by value."""
        chosen = self.slots.index_select(0, groups)
        return self.scores.index_select(0, chosen.flatten()).unflatten(0, chosen.shape)

    def _price(self, groups: torch.Tensor) -> None:
        x = self._channels(groups)
        ranked = _ranked(x)
        last, following = ranked[:, self.keep - 1 : self.keep], ranked[:, self.keep : self.keep + 1]
        kept = ranked[:, : self.keep].sum(1, keepdim=True)
        inside = x >= last
        threshold = torch.where(inside, following, last)
        self.kept[groups] = kept.sum((1, 2))
        # A new value x adds max(0, x - θ) = max(x, θ) - θ; the part without x is summed here.
        self.base[groups] = (torch.where(inside, kept - x + following, kept) - threshold).sum(2)
        self.threshold[groups] = threshold

    def swap(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        """Make the best swap of every pair of groups `(a, b)` that gains; no group may be in two
        pairs."""
        size = self.slots.shape[1]
        x, y = self._channels(a), self._channels(b)
        without_x, without_y = self.threshold.index_select(0, a), self.threshold.index_select(0, b)
        price = self.base[a].unsqueeze(2) + self.base[b].unsqueeze(
            1
        )  # [pairs, channel of a, channel of b]
        for i in range(size):
            price[:, i] += torch.maximum(y, without_x[:, i : i + 1]).sum(2)
            price[:, :, i] += torch.maximum(x, without_y[:, i : i + 1]).sum(2)
        now = self.kept[a] + self.kept[b]
        best, swap = price.flatten(1).max(1)
        better = (best > now * (1 + MIN_GAIN)).nonzero().flatten()
        a, b, out, into = a[better], b[better], swap[better] // size, swap[better] % size
        self.slots[a, out], self.slots[b, into] = self.slots[b, into], self.slots[a, out]
        self._price(torch.cat([a, b]))
        return len(better) > 0


def _ranked(x: torch.Tensor) -> torch.Tensor:
    """Sort `x` `[groups, group, rows]` downwards inside its groups, by exchanging whole slices: 15
    times faster."""
    slices = list(x.unbind(1))
    for turn in range(len(slices)):
        for i in range(turn % 2, len(slices) - 1, 2):
            slices[i], slices[i + 1] = (
                torch.maximum(*slices[i : i + 2]),
                torch.minimum(*slices[i : i + 2]),
            )
    return torch.stack(slices, 1)


@dataclass(frozen=True)
class PermutedSpace:
    """A space whose channels were reordered, and what the pattern keeps of it before and after."""

    consumers: list[str]
    producers: list[str]
    segments: int
    length: int
    copies: int
    before: float
    after: float


@dataclass(frozen=True)
class PermuteFacts:
    """The report of a permutation. `not_free` says of the other layers why their channels stay in
    place."""

    spaces: tuple[PermutedSpace, ...]
    not_free: dict[str, str]

    def to_json(self) -> Json:
        return {"spaces": [asdict(space) for space in self.spaces], "not_free": self.not_free}


@dataclass(frozen=True)
class Permuted:
    """The outcome of a permutation: where the entries of every moved axis come from, statistics by
    fusion group in the new order, and the facts."""

    orders: Orders
    stats: dict[str, LayerStats]
    facts: PermuteFacts


def permute(
    module: nn.Module,
    block: str,
    rows: Sequence[PlanRow],
    stats: Mapping[str, LayerStats],
    run: Run,
    x: torch.Tensor,
) -> Permuted:
    """Reorder the free channels of the dense block at path `block` of `module`, in place.

    `rows` are its targets that get a pattern, `stats` the statistics of their inputs; `run` and `x`
    are one call of the block in fp32 (see `find_permutable_channels`).
    """
    prefix = block + "."
    readers = [
        [row.target.module.removeprefix(prefix) for row in group]
        for group in by_fusion(rows).values()
    ]
    spaces, reasons = find_permutable_channels(module.get_submodule(block), run, x, readers)
    shared = _shared(module)
    orders: Orders = {}
    permuted, moved = [], dict(stats)
    by_name = {row.target.name: row for row in rows}
    for space in spaces:
        consumers = [by_name[prefix + side.parameter] for side in space.consumers]
        first = space.consumers[0].parameter.removesuffix(".weight")
        reason = _not_free(
            space, consumers, {prefix + s.parameter for s in space.producers} & shared
        )
        if reason is not None:
            reasons[first] = reason
            continue
        target, pattern = consumers[0].target, consumers[0].pattern
        assert isinstance(pattern, NMPattern)
        channels = search(
            _scores(module, consumers, space, moved[target.fusion]), space.shape[1], pattern
        )
        here = {
            (prefix + name, axis): order
            for (name, axis), order in space.orders(channels.order).items()
        }
        reorder(module, here)
        moved[target.fusion] = moved[target.fusion].reordered(here[target.name, target.axis])
        orders |= {
            key: orders[key][order] if key in orders else order for key, order in here.items()
        }
        copies, segments, length = space.shape
        consumer_names, producer_names = (
            sorted({prefix + side.parameter for side in sides})
            for sides in (space.consumers, space.producers)
        )
        permuted.append(
            PermutedSpace(
                consumer_names,
                producer_names,
                segments,
                length,
                copies,
                channels.before,
                channels.after,
            )
        )
    not_free = {prefix + name: reason for name, reason in reasons.items()}
    return Permuted(orders, moved, PermuteFacts(tuple(permuted), not_free))


def _shared(module: nn.Module) -> set[str]:
    """Return the names of parameters that other modules hold too."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for group in names.values() if len(group) > 1 for name in group}


def _not_free(
    space: PermutableChannels, consumers: Sequence[PlanRow], tied: set[str]
) -> str | None:
    """Say why the channels of a space stay in place; None when they may move."""
    if tied:
        return f"'{min(tied)}' is shared with another layer"
    if len({row.pattern for row in consumers}) > 1:
        return "the layers that read it have different patterns"
    pattern = consumers[0].pattern
    assert isinstance(pattern, NMPattern)
    places, length = space.consumers[0].places, space.shape[2]
    run = places[..., :1] + torch.arange(length)
    if (
        length % pattern.group
        or (places[..., 0] % pattern.group).any()
        or not torch.equal(run, places)
    ):
        return f"its runs of {length} channels do not hold whole groups"
    return None


def _scores(
    module: nn.Module, consumers: Sequence[PlanRow], space: PermutableChannels, stats: LayerStats
) -> torch.Tensor:
    """Return Wanda's scores `[segments * length, rows]`; a row is an output of one consumer, once
    per copy."""
    parts = []
    for row, side in zip(consumers, space.consumers):
        weight = to_rows(module.get_parameter(row.target.name).detach(), row.target.axis).float()
        columns = (weight.abs() * stats.rms).T[side.places]  # [copies, segments, length, outputs]
        parts.append(columns.permute(1, 2, 0, 3).flatten(2).flatten(0, 1))
    return torch.cat(parts, 1).contiguous()
