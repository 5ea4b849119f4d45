"""What proves that an engine multiplies with sparse tensor cores, layer by layer, and what may be
claimed from it.

The ladder: the stored weight has the pattern; its whole fusion group has it, in a shape that
kernels exist for; the builder found it eligible; the builder chose a sparse kernel for it; the
finished engine holds that kernel; the kernel was seen to run; the hardware counted sparse
instructions. A level is reached when there is raw text that says so, and nothing above the highest
level is ever claimed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Literal

from nmsparse_deploy.ship.tensorrt.log import Pass

Level = Literal["pattern", "shape", "eligible", "chosen", "tactic", "observed", "counted"]
LEVELS: tuple[Level, ...] = (
    "pattern",
    "shape",
    "eligible",
    "chosen",
    "tactic",
    "observed",
    "counted",
)
WHAT_LEVELS_ARE = (
    "A layer's level of evidence is the last of the steps in these tables that raw output of the "
    "builder, the profiler or the hardware shows for it; each step includes those before it."
)
KERNEL_LEVELS: tuple[Level, ...] = ("tactic", "observed", "counted")
"""From here on a sparse kernel was seen by its name."""
Reason = Literal[
    "not in pattern",
    "fusion partner dense",
    "shape",
    "not eligible",
    "dense was faster",
    "built without sparse weights",
    "not checked",
    "unknown",
]
CLAIMS: dict[Level, str] = {
    "counted": "issued sparse instructions, as counted by the hardware",
    "observed": "ran on sparse tensor-core kernels",
    "tactic": "have a sparse tensor-core kernel in the engine, which was not watched running",
}
"""The best that may be said, first."""
NOT_SPARSE = "not due to sparse tensor cores"


@dataclass(frozen=True)
class LayerEvidence:
    """One multiplication of the graph. `proofs` holds the raw text for every level that was
    reached."""

    node: str
    parameter: str | None
    k: int
    n: int
    dtype: str
    flops: int
    proofs: dict[Level, str]
    reason: Reason | None
    """Why the level after the highest was not reached; None on the last one."""
    why_not: str
    merged_with: tuple[str, ...] = ()
    """Other nodes that read the same tensor."""

    @property
    def level(self) -> Level | None:
        return next((level for level in reversed(LEVELS) if level in self.proofs), None)

    @property
    def sparse(self) -> bool:
        """Tell whether a sparse kernel was seen for it."""
        return any(level in self.proofs for level in KERNEL_LEVELS)

    @property
    def name(self) -> str:
        return self.parameter or self.node

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "rung": self.level}


@dataclass(frozen=True)
class EngineEvidence:
    """All multiplications of one engine by a stored weight, and what the sources said beyond single
    layers."""

    engine: str
    artefact: str
    """What it was built from: an ONNX file, or a folder."""
    sparse_weights: bool
    """Was the builder allowed to use sparse kernels?"""
    layers: tuple[LayerEvidence, ...]
    flop_basis: Literal["input shapes", "equal rows"]
    """FLOPs at the engine's input shapes, or where those could not be inferred, with the same rows
    for every GEMM."""
    passes: tuple[Pass, ...] = ()
    """The builder's eligible and chosen lines in their order."""
    unplaced: tuple[str, ...] = ()
    """Names in these lines, and sparse kernels, that could not be tied to one multiplication."""
    unplaced_kernels: int = 0
    problems: tuple[str, ...] = ()

    def count(self, level: Level) -> int:
        return sum(level in layer.proofs for layer in self.layers)

    def share(self, level: Level) -> float:
        """Return the share of the FLOPs of these multiplications in layers with that level."""
        total = sum(layer.flops for layer in self.layers)
        return (
            sum(layer.flops for layer in self.layers if level in layer.proofs) / total
            if total
            else 0.0
        )

    @property
    def sparse_seen(self) -> bool:
        return self.unplaced_kernels > 0 or any(layer.sparse for layer in self.layers)

    @property
    def verdict(self) -> str:
        """Return what may be said about speed, in one sentence."""
        everything = len(self.layers)
        if not self.sparse_weights:
            return f"Built without sparse weights: whatever its speed, it is {NOT_SPARSE}."
        if not self.sparse_seen:
            return (
                f"No sparse kernel was seen in {everything} GEMMs ({self.count('eligible')} eligible, "
                f"{self.count('chosen')} chosen): any difference in speed is {NOT_SPARSE}."
            )
        for level, what in CLAIMS.items():
            if self.count(level):
                return f"{self.count(level)} of {everything} GEMMs ({self.share(level):.0%} of their FLOPs) {what}."
        return (
            f"{self.unplaced_kernels} sparse kernels were seen, but none could be tied to one of {everything} "
            "GEMMs, so it is not known which of them run sparse."
        )

    @property
    def reasons(self) -> dict[str, int]:
        """Return why layers stopped where they did, the most frequent reason first."""
        return dict(Counter(layer.reason for layer in self.layers if layer.reason).most_common())

    def to_json(self) -> dict[str, object]:
        return {
            **asdict(self),
            "gemms": len(self.layers),
            "rungs": {
                level: {"layers": self.count(level), "flop_share": self.share(level)}
                for level in LEVELS
            },
            "reasons": self.reasons,
            "sparse_seen": self.sparse_seen,
            "verdict": self.verdict,
            "layers": [layer.to_json() for layer in self.layers],
        }
