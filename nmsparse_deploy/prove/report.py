"""What a verification says: one row per tensor (or per weight use), one report per artefact."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from nmsparse_deploy.pattern import NMPattern
from nmsparse_deploy.prove.group_counter import GroupCount
from nmsparse_deploy.prove.output_counter import OutputCount

Place = Literal["torch", "file", "onnx"]


def gemm_shape(shape: tuple[int, ...], axis: int) -> tuple[int, int]:
    """Return (K, N) of a stored weight: N is the other axis of a matrix or of a stack's last two, a
    kernel's first (its second, if it is transposed)."""
    axis %= len(shape)
    if len(shape) == 1:
        return shape[0], 1
    if len(shape) > 3:
        return shape[axis], shape[1 if axis == 0 else 0]
    last = len(shape) - 1
    return shape[axis], shape[last - 1 if axis == last else last]


@dataclass(frozen=True)
class TensorCheck:
    """One tensor under one pattern along one axis."""

    place: Place
    tensor: str
    dtype: str
    shape: tuple[int, ...]
    pattern: str
    axis: int | None = None
    parameter: str | None = None
    """The parameter of the model that the tensor holds, where that is known."""
    node: str | None = None
    """The ONNX node that reads the tensor."""
    groups: int = 0
    bad: int = 0
    first_bad: tuple[int, ...] | None = None
    """Coordinates, in the stored tensor, of the first value of the first bad group."""
    sparser: int = 0
    nonzeros: int = 0
    negative_zeros: int = 0
    nonfinite: int = 0
    mask_mismatch: int | None = None
    """Non-zeros outside the stored mask; None where there was no mask to compare with."""
    shape_verdict: str | None = None
    sha256: str | None = None
    """Hash of the stored bytes, to tie an engine to what was verified here."""
    skipped: str | None = None
    """Why the tensor makes no claim."""
    note: str | None = None
    """What the row takes for granted."""
    followed: bool = True
    """Whether its values, or the axis that its reader reduces, could be looked at."""
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the tensor holds what it claims, or claims nothing."""
        return not self.problems

    def to_json(self) -> dict[str, object]:
        """Return the row as `verify.json` holds it."""
        row = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }
        return {**row, "ok": self.ok}


@dataclass(frozen=True)
class VerifyReport:
    """All checks of one artefact. `problems` are sentences that belong to no single tensor."""

    place: Place
    artefact: str
    checks: tuple[TensorCheck, ...] = ()
    problems: tuple[str, ...] = ()
    bytes_read: int = 0
    seconds: float = field(default=0.0, compare=False)

    @property
    def ok(self) -> bool:
        """Whether the artefact holds."""
        return not self.problems and not self.failed

    @property
    def checked(self) -> int:
        """Rows that make a claim, held or not."""
        return sum(check.skipped is None for check in self.checks)

    @property
    def failed(self) -> int:
        """Rows that do not hold."""
        return sum(not check.ok for check in self.checks)

    @property
    def skipped(self) -> int:
        """Rows that make no claim."""
        return sum(check.skipped is not None for check in self.checks)

    @property
    def not_followed(self) -> int:
        """Rows of weights that could not be looked at."""
        return sum(not check.followed for check in self.checks)

    def strict(self) -> VerifyReport:
        """Return the report of a reader who takes no weight on trust: what could not be followed
        is a problem."""
        rows = [check for check in self.checks if not check.followed and check.ok]
        places = [f"'{c.tensor}'" + (f" at '{c.node}'" if c.node else "") for c in rows]
        problems = [f"{place}: {check.skipped}." for place, check in zip(places, rows)]
        return replace(self, problems=(*self.problems, *problems))

    @property
    def zero_share(self) -> float | None:
        """Share of zeros where there were no groups to count, that is under unstructured masks."""
        compared = [
            c
            for c in self.checks
            if c.skipped is None and c.mask_mismatch is not None and not c.groups
        ]
        size = sum(math.prod(check.shape) for check in compared)
        return 1 - sum(check.nonzeros for check in compared) / size if size else None

    def failures(self) -> list[str]:
        """Return every reason why the artefact does not hold, as sentences."""
        rows = [
            f"'{check.tensor}': {problem}." for check in self.checks for problem in check.problems
        ]
        return [*self.problems, *rows]

    def to_json(self) -> dict[str, object]:
        """Return the report as `verify.json` holds it."""
        return {
            "place": self.place,
            "artefact": self.artefact,
            "ok": self.ok,
            "checked": self.checked,
            "failed": self.failed,
            "skipped": self.skipped,
            "not_followed": self.not_followed,
            "zero_share": self.zero_share,
            "problems": list(self.problems),
            "bytes_read": self.bytes_read,
            "seconds": self.seconds,
            "checks": [check.to_json() for check in self.checks],
        }

    def summary(self) -> str:
        """Say in one sentence what was checked and whether it holds."""
        groups = sum(check.groups for check in self.checks if check.skipped is None)
        counted = (
            f"{groups:,} groups"
            if groups or self.zero_share is None
            else f"{self.zero_share:.1%} zeros"
        )
        lost = sum(check.skipped is not None for check in self.checks if not check.followed)
        text = (
            f"{self.artefact}: {self.checked} tensors checked ({counted}), "
            f"{self.skipped - lost} skipped"
        )
        if self.not_followed:
            text += f", {self.not_followed} not followed"
        if self.ok:
            return f"{text}; all hold."
        failures = self.failures()
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        return f"{text}, {self.failed} failed: {failures[0].rstrip('.')}{more}."


def describe_count(count: GroupCount, first_bad: tuple[int, ...] | None) -> str:
    """Say how many groups of a tensor are not in the pattern, and where the first is."""
    return f"{count.bad:,} of {count.groups:,} groups break the pattern, the first at {list(first_bad or ())}"


def describe_outputs(outputs: OutputCount, bad: int) -> str | None:
    """Say how many outputs are dense beside others that hold; None when all break or stray values
    do."""
    if outputs.broken == outputs.outputs or 2 * bad < outputs.broken * outputs.groups:
        return None
    return (
        f"{outputs.broken:,} of {outputs.outputs:,} outputs are dense, the first is output "
        f"{outputs.first_broken}"
    )


CLAIMS = ("sparse", "near miss")
"""Verdicts on a tensor that is meant to be sparse."""


def judge(
    count: GroupCount, pattern: NMPattern, outputs: OutputCount | None = None
) -> Literal["sparse", "near miss", "by chance", "dense"]:
    """Judge a tensor of unknown intent by comparing it with the same number of zeros strewn at
    random.

    With a share p of non-zeros, a random group holds at most `keep` of them with the binomial
    probability q. `sparse`: every group is in the pattern, and chance does that less than once in a
    million (else `by chance`: an almost empty or tiny tensor). `near miss`: the share of good
    groups is more than half-way from q to 1 and six standard deviations above q, so neither a dense
    tensor nor an unstructured one of any sparsity gets there; or whole outputs hold, more of them
    than chance explains, beside others that do not.
    """
    if not count.nonzeros:
        return "by chance"
    p = count.nonzeros / (count.groups * pattern.group)
    q = min(
        1.0,
        sum(
            math.comb(pattern.group, k) * p**k * (1 - p) ** (pattern.group - k)
            for k in range(pattern.keep + 1)
        ),
    )
    if not count.bad:
        return "sparse" if q**count.groups < 1e-6 else "by chance"
    if outputs is not None and outputs.beyond_chance(pattern):
        return "near miss"
    share = 1 - count.bad / count.groups
    spread = math.sqrt(q * (1 - q) / count.groups)
    return "near miss" if share > (1 + q) / 2 and share > q + 6 * spread else "dense"


NOT_CHECKED = ({"place": "engine", "why": "no TensorRT engine was built here"},)
"""Steps of the chain that this machine could not take; they are counted, not hidden."""
