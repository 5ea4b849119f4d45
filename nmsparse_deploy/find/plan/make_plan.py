"""Plan which matrices get the pattern, and say why the others stay dense."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase

from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.find.facts import Json
from nmsparse_deploy.models.base import Discovery, Skipped, Target
from nmsparse_deploy.pattern import NMPattern, Pattern
from nmsparse_deploy.recipe import decided
from nmsparse_deploy.system.sparse_cores import shape_verdict


@dataclass(frozen=True)
class PlanRow:
    """One target: the pattern it gets (None = dense) and the reason."""

    target: Target
    pattern: Pattern | None
    reason: str

    def shape_verdict(self) -> str | None:
        """Tell whether sparse tensor cores have kernels for this shape; None where they cannot run
        the pattern."""
        return (
            shape_verdict(self.target.k, self.target.outputs, self.pattern)
            if self.pattern
            else None
        )


@dataclass(frozen=True)
class Plan:
    """A decision for every target, and everything that was never a target."""

    rows: tuple[PlanRow, ...]
    skipped: tuple[Skipped, ...]
    blocks: tuple[str, ...]
    """Paths of all repeated blocks, in the order in which they run."""
    shared: tuple[str, ...] = ()
    """Those that run several times in one forward pass."""

    def pruned(self, block: int | None = None) -> list[PlanRow]:
        """Return the targets that get a pattern, of one block or of all."""
        return [
            row for row in self.rows if row.pattern and (block is None or row.target.block == block)
        ]

    def summary(self) -> str:
        """Say how many matrices and weights are selected, of all that are multiplied, and what stays
        dense for which reason, the most first."""
        chosen = self.pruned()
        values = sum(row.target.k * row.target.n for row in chosen)
        dense: Counter[str] = Counter()
        for row in self.rows:
            if not row.pattern:
                dense[row.reason.partition(" as ")[0]] += row.target.k * row.target.n
        for skipped in self.skipped:
            if skipped.gemm:
                dense[skipped.reason] += math.prod(skipped.shape)
        every = values + dense.total()
        why = "".join(f"; {size / every:.1%} {reason}" for reason, size in dense.most_common())
        return (
            f"{len(chosen)} of {len(self.rows)} prunable matrices in {len(self.blocks)} blocks selected: "
            f"{values / 1e6:.1f} of {every / 1e6:.1f} M weights that are multiplied "
            f"({values / every:.1%}){'; dense' if why else ''}{why.removeprefix(';')}."
        )

    def to_json(self) -> Json:
        rows = [
            {
                **asdict(r.target),
                "pattern": str(r.pattern) if r.pattern else None,
                "reason": r.reason,
                "shape_verdict": r.shape_verdict(),
            }
            for r in self.rows
        ]
        return {
            "blocks": list(self.blocks),
            "rows": rows,
            "skipped": [asdict(s) for s in self.skipped],
        }


def by_fusion(rows: Sequence[PlanRow]) -> dict[str, list[PlanRow]]:
    """Sort rows by fusion group, in the order in which the groups run."""
    parts: dict[str, list[PlanRow]] = {}
    for row in rows:
        parts.setdefault(row.target.fusion, []).append(row)
    return parts


def make_plan(
    discovery: Discovery,
    pattern: Pattern,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    patterns: Mapping[str, str] | None = None,
) -> Plan:
    """Apply shape and user rules, then make every fusion group all or nothing.

    Compilers merge the layers of a fusion group (q/k/v, gate/up) into one GEMM; one dense member
    would make the merged weight dense. `include` and `exclude` are globs on parameter names;
    `patterns` decides single parameters otherwise than `pattern`. Raises `UsageError` when a glob
    or a name matches nothing or a named pattern cannot be had, and `NmsparseError` when nothing is
    left to prune.
    """
    for glob in (*include, *exclude):
        if not any(fnmatchcase(t.name, glob) for t in discovery.targets):
            raise UsageError(
                f"'{glob}' matches no prunable parameter.", "nmsparse-deploy inspect lists them"
            )
    named = _named(discovery, patterns or {})
    wanted = {t.name: named.get(t.name, (pattern, ""))[0] or pattern for t in discovery.targets}
    reasons = {
        t.name: _stays_dense(t, wanted[t.name], include, exclude, named) for t in discovery.targets
    }
    dense_groups = {t.fusion: t for t in discovery.targets if reasons[t.name]}
    rows = []
    for target in discovery.targets:
        reason = reasons[target.name]
        partner = dense_groups.get(target.fusion)
        if reason is None and partner is not None:
            reason = f"reads the same input as {partner.name}, which stays dense"
        chosen = "selected by plan" if target.name in named else "selected"
        rows.append(
            PlanRow(target, None, reason)
            if reason
            else PlanRow(target, wanted[target.name], chosen)
        )
    plan = Plan(tuple(rows), discovery.skipped, discovery.blocks, discovery.shared)
    _check_merged(plan)
    if not plan.pruned():
        why = rows[0].reason if rows else "no weight lies in the repeated blocks"
        raise NmsparseError(f"Nothing can be pruned to {pattern}: {why}.")
    return plan


def _named(
    discovery: Discovery, patterns: Mapping[str, str]
) -> dict[str, tuple[Pattern | None, str]]:
    """Return the decisions about single parameters, checked against the model."""
    targets = {target.name: target for target in discovery.targets}
    named = {name: decided(text) for name, text in patterns.items()}
    for name, (pattern, _) in named.items():
        if name not in targets:
            raise UsageError(
                f"The plan names '{name}', which is no prunable parameter of this model.",
                "nmsparse-deploy inspect lists them",
            )
        if pattern and targets[name].k % pattern.alignment:
            raise UsageError(
                f"'{name}' cannot have {pattern}: its reduction length {targets[name].k} is not divisible "
                f"by {pattern.alignment}."
            )
    return named


def _check_merged(plan: Plan) -> None:
    """Raise `UsageError` when one merged GEMM would have two N:M patterns."""
    first: dict[str, PlanRow] = {}
    for row in plan.pruned():
        other = first.setdefault(row.target.fusion, row)
        if isinstance(row.pattern, NMPattern) and row.pattern != other.pattern:
            raise UsageError(
                f"'{other.target.name}' and '{row.target.name}' read the same input and are merged into "
                f"one GEMM, but the plan gives them {other.pattern} and {row.pattern}."
            )


def _stays_dense(
    target: Target,
    pattern: Pattern,
    include: Sequence[str],
    exclude: Sequence[str],
    named: Mapping[str, tuple[Pattern | None, str]],
) -> str | None:
    if target.k % pattern.alignment:
        return f"reduction length {target.k} is not divisible by {pattern.alignment}"
    if include and not any(fnmatchcase(target.name, glob) for glob in include):
        return "not named by --include"
    for glob in exclude:
        if fnmatchcase(target.name, glob):
            return f"excluded by '{glob}'"
    if target.name in named and named[target.name][0] is None:
        why = named[target.name][1]
        return f"kept dense by plan: {why}" if why else "kept dense by plan"
    return None
