"""A plan under a constraint: which fusion groups get the pattern, and how much of it.

Under hardware N:M a sparse matrix has one density, so MixGPT's allocation (Shao et al. 2024,
arXiv:2310.09499) becomes a choice per fusion group, a knapsack over the increase `s_i` of the loss,
the time `t_i` saved, and the zeros `z_i`:

    --max-ppl-increase r   max Σ t_i   subject to   Σ s_i <= ln(1 + r)
    --min-speedup S        min Σ s_i   subject to   Amdahl's speed-up of Σ t_i >= S
    --budget F             min Σ s_i   subject to   Σ z_i >= F · (zeros with the pattern everywhere)

Increases are added up although they interact; how far off that is, is measured once for the whole
plan. Negative ones (noise) count as zero. Patterns that no kernel runs save no time; then
`--max-ppl-increase` maximises the zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.find.facts import Json
from nmsparse_deploy.find.plan.knapsack import Option, choose
from nmsparse_deploy.find.plan.latency import Latency, LatencySource, saving_for, speedup
from nmsparse_deploy.find.plan.make_plan import PlanRow
from nmsparse_deploy.find.plan.sensitivity import LossIncrease
from nmsparse_deploy.pattern import TWO_FOUR, NMPattern, Pattern
from nmsparse_deploy.recipe import DENSE, Allocate


@dataclass(frozen=True)
class PatternChoice:
    """One way to treat a fusion group: a pattern (None = dense), what it costs, and what it
    wins."""

    pattern: Pattern | None
    increase: LossIncrease
    saving_us: float
    zeros: int

    @property
    def cost(self) -> float:
        return max(0.0, self.increase.mean)


@dataclass(frozen=True)
class FusionGroup:
    """A fusion group and its choices."""

    rows: tuple[PlanRow, ...]
    dense_us: float
    choices: tuple[PatternChoice, ...]

    @property
    def weights(self) -> int:
        return sum(row.target.k * row.target.n for row in self.rows)


def choices(
    rows: Sequence[PlanRow],
    patterns: Sequence[Pattern],
    increases: Sequence[LossIncrease],
    latencies: Sequence[Latency],
    dense: bool,
) -> FusionGroup:
    """Make the group of `rows` with one choice a pattern, and `dense` if it may stay so."""
    weights = sum(row.target.k * row.target.n for row in rows)
    options = [PatternChoice(None, LossIncrease(0.0, 0.0), 0.0, 0)] if dense else []
    options += [
        PatternChoice(pattern, increase, latency.saving_us, round(weights * (1 - pattern.density)))
        for pattern, increase, latency in zip(patterns, increases, latencies)
    ]
    return FusionGroup(tuple(rows), latencies[0].dense_us, tuple(options))


def solve(
    groups: Sequence[FusionGroup], spec: Allocate, share: float, weights: int
) -> list[PatternChoice]:
    """Return the best choice for every group. `share` is that of the targets in the model's FLOPs,
    `weights` all that could be pruned. Raises `NmsparseError` with the best that can be reached
    when the constraint cannot be met."""
    if spec.max_ppl_increase is not None:
        return _within_loss(
            groups, spec.max_ppl_increase, NMPattern.parse(spec.pattern).implies(TWO_FOUR)
        )
    if spec.min_speedup is not None:
        dense = sum(group.dense_us for group in groups)
        best = [max(choice.saving_us for choice in group.choices) for group in groups]
        chosen = _least_increase(groups, "saving_us", saving_for(share, dense, spec.min_speedup))
        if chosen is None:
            reach = speedup(share, dense, sum(best))
            raise NmsparseError(
                f"No plan makes the model {spec.min_speedup:g} times as fast: all groups that gain "
                f"reach {reach:.4f} ({share:.0%} of its FLOPs are theirs).",
                f"--min-speedup {math.floor(reach * 1e4) / 1e4:g}" if reach > 1.0001 else None,
            )
        return chosen
    assert spec.budget is not None
    pattern = NMPattern.parse(spec.pattern)
    everywhere = weights * pattern.zeros / pattern.group
    chosen = _least_increase(groups, "zeros", spec.budget * everywhere)
    if chosen is None:
        reach = sum(max(choice.zeros for choice in group.choices) for group in groups) / everywhere
        raise NmsparseError(
            f"No plan prunes {spec.budget:.1%} of the prunable weights: only {reach:.1%} of them may "
            f"get {pattern}.",
            "nmsparse-deploy inspect says why the others stay dense",
        )
    return chosen


def _within_loss(
    groups: Sequence[FusionGroup], increase: float, has_kernels: bool
) -> list[PatternChoice]:
    by = "saving_us" if has_kernels else "zeros"
    items = [
        [Option(getattr(choice, by), choice.cost) for choice in group.choices] for group in groups
    ]
    indices = choose(items, math.log1p(increase))
    chosen = [group.choices[index] for group, index in zip(groups, indices or [0] * len(groups))]
    if not any(choice.pattern for choice in chosen):
        useful = [
            choice
            for group in groups
            for choice in group.choices
            if choice.pattern and getattr(choice, by) > 0
        ]
        if not useful:
            raise NmsparseError(
                "No group gains anything from the pattern on this GPU, so none is pruned."
            )
        least = math.expm1(min(choice.cost for choice in useful))
        raise NmsparseError(
            f"Nothing can be pruned within {increase:.2%} more perplexity: the least sensitive group "
            f"alone costs {least:.2%}.",
            f"--max-ppl-increase {math.ceil(least * 1e4) / 1e4:g}",
        )
    return chosen


def _least_increase(
    groups: Sequence[FusionGroup], by: str, need: float
) -> list[PatternChoice] | None:
    """Return the choices with the smallest sum of increases whose gains reach `need`: what is lost
    of the largest gains has to fit the rest."""
    best = [max(getattr(choice, by) for choice in group.choices) for group in groups]
    items = [
        [Option(-choice.cost, most - getattr(choice, by)) for choice in group.choices]
        for group, most in zip(groups, best)
    ]
    indices = choose(items, sum(best) - need)
    return (
        None if indices is None else [group.choices[index] for group, index in zip(groups, indices)]
    )


@dataclass(frozen=True)
class GroupDecision:
    """One fusion group in a finished plan."""

    members: tuple[str, ...]
    block: int
    k: int
    n: int
    pattern: str
    sensitivity: float
    """Increase of the loss when only this group is pruned to its pattern (or to the wanted one, if
    it stays dense)."""
    error: float
    dense_us: float
    saving_us: float
    gain: float
    """Share of the model's time that pruning the group saves."""
    reason: str


def decisions(
    groups: Sequence[FusionGroup],
    chosen: Sequence[PatternChoice],
    share: float,
    unit: str,
    asked: Pattern,
) -> tuple[GroupDecision, ...]:
    """Say what was decided about every group, in words too."""
    dense = sum(group.dense_us for group in groups)
    rows = []
    for group, choice in zip(groups, chosen):
        shown = choice if choice.pattern else next(c for c in group.choices if c.pattern == asked)
        gain = share * shown.saving_us / dense
        won = f"{100 * gain:.2g} % predicted gain" if gain > 0 else "no gain"
        why = f"sensitivity {shown.increase.mean:.2g} {unit} for {won}"
        first, outputs = group.rows[0].target, sum(row.target.n for row in group.rows)
        rows.append(
            GroupDecision(
                tuple(row.target.name for row in group.rows),
                first.block,
                first.k,
                outputs,
                str(choice.pattern or DENSE),
                shown.increase.mean,
                shown.increase.error,
                group.dense_us,
                shown.saving_us,
                gain,
                why,
            )
        )
    return tuple(rows)


@dataclass(frozen=True)
class PlanTotals:
    """Sums over a plan, predicted from single groups, and the increase of the loss that was
    measured for all of it."""

    groups: int
    groups_pruned: int
    weights: int
    weights_pruned: int
    share_pruned: float
    zeros: int
    mean_density: float
    loss_rise: float
    ppl_increase: float | None
    """Where increases add up to one of log perplexity."""
    dense_us: float
    saving_us: float
    flop_share: float
    speedup: float
    measured: LossIncrease
    status: str = "predicted"

    def to_json(self) -> Json:
        row = asdict(self)
        measured = row.pop("measured")
        return {
            **row,
            "measured_together": {
                "loss_rise": measured["mean"],
                "standard_error": measured["error"],
            },
        }


def totals(
    groups: Sequence[FusionGroup],
    chosen: Sequence[PatternChoice],
    share: float,
    weights: int,
    llm: bool,
    measured: LossIncrease,
) -> PlanTotals:
    """Sum up a plan. `llm`: increases add up to one of log perplexity."""
    pruned = [(group, choice) for group, choice in zip(groups, chosen) if choice.pattern]
    dense = sum(group.dense_us for group in groups)
    saved = sum(choice.saving_us for _, choice in pruned)
    increase = sum(choice.cost for _, choice in pruned)
    inside = sum(group.weights for group, _ in pruned)
    zeros = sum(choice.zeros for _, choice in pruned)
    return PlanTotals(
        len(groups),
        len(pruned),
        weights,
        inside,
        inside / weights,
        zeros,
        1 - zeros / weights,
        increase,
        math.expm1(increase) if llm and increase < 700 else None,
        dense,
        saved,
        share,
        speedup(share, dense, saved),
        measured,
    )


@dataclass(frozen=True)
class PlanFacts:
    """The circumstances of a plan."""

    constraint: dict[str, float]
    vary_keep: bool
    spread: float | None
    """How far densities may lie apart, for an unstructured pattern."""
    estimator: str
    method: str
    objective: str
    unit: str
    latency: LatencySource
    calibration: Json
    inputs: Json
    """Hashes of what the plan was made from."""
    seconds: float

    def to_json(self) -> Json:
        facts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**facts, "latency": self.latency.to_json()}


@dataclass(frozen=True)
class Allocation:
    """A finished plan with its circumstances and its totals."""

    model: str
    pattern: str
    decisions: tuple[GroupDecision, ...]
    rules: dict[str, str]
    """Targets that a shape or a user's rule keeps dense, and why."""
    totals: PlanTotals
    facts: PlanFacts

    def patterns(self) -> dict[str, str]:
        """Return what `Prune.patterns` takes: every target by name."""
        named = {
            name: f"{DENSE}: {row.reason}" if row.pattern == DENSE else row.pattern
            for row in self.decisions
            for name in row.members
        }
        return named | {name: f"{DENSE}: {reason}" for name, reason in self.rules.items()}

    def short_names(self, row: GroupDecision) -> list[str]:
        """Return the members without the path that they share and without `.weight`."""
        first, *others = [name.removesuffix(".weight") for name in row.members]
        return [first, *(name.rpartition(".")[2] for name in others)]

    def summary(self) -> list[str]:
        """Say in sentences what the plan comes to."""
        total, facts, measured = self.totals, self.facts, self.totals.measured.mean
        what = "matrices" if facts.spread else "fusion groups"
        lines = [
            f"{total.groups_pruned} of {total.groups} {what} pruned: {total.share_pruned:.1%} of the prunable "
            f"weights, mean density {total.mean_density:.1%}."
        ]
        if total.ppl_increase is not None:
            lines.append(
                f"Perplexity, on the calibration sample: {total.ppl_increase:+.1%} if rises add up; "
                f"{_percent(measured)} measured for the plan as a whole (trial method "
                f"{facts.method}, no refinement)."
            )
        elif facts.spread:
            lines.append(
                f"Loss on the calibration sample ({facts.unit}): {measured:+.3g} "
                f"measured for the plan as a whole (trial method {facts.method}, no refinement)."
            )
        else:
            lines.append(
                f"Loss on the calibration sample ({facts.unit}): {total.loss_rise:.3g} if rises add "
                f"up; {measured:.3g} measured for the plan as a whole."
            )
        if facts.vary_keep or facts.spread:
            lines.append(
                "Kernels run 2:4 only: densities that vary with the layer gain no time on hardware."
            )
        else:
            times = "measured GEMM times" if facts.latency.status == "measured" else "the roofline"
            lines.append(
                f"Speed-up of the model: {total.speedup:.3f}, predicted from {times} of "
                f"{facts.latency.gpu} at {facts.latency.rows} rows, with {total.flop_share:.0%} of the FLOPs "
                "in these groups."
            )
        return lines

    def to_json(self) -> Json:
        groups = [{**asdict(row), "members": list(row.members)} for row in self.decisions]
        return {
            "model": self.model,
            "pattern": self.pattern,
            **self.facts.to_json(),
            "totals": self.totals.to_json(),
            "groups": groups,
            "patterns": self.patterns(),
        }


def _percent(increase: float) -> str:
    return f"{math.expm1(min(increase, 700)):+.1%}"


def candidates(spec: Allocate) -> list[NMPattern]:
    """Return the patterns that a group may get: the asked one, and with `vary_keep` its
    neighbours."""
    asked = NMPattern.parse(spec.pattern)
    keeps = (asked.keep - 1, asked.keep, asked.keep + 1) if spec.vary_keep else (asked.keep,)
    patterns = [NMPattern(keep, asked.group) for keep in keeps if 1 <= keep < asked.group]
    if spec.vary_keep and len(patterns) == 1:
        raise UsageError(
            f"{asked} has no neighbours to vary.", "try a larger group, for example 4:8"
        )
    return patterns
