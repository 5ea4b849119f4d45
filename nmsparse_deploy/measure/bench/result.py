"""What a benchmark measured, and what may be concluded from it: the content of `bench.json` and
`bench-gpu.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from nmsparse_deploy.models.roofline import Prediction
from nmsparse_deploy.ship.evidence import EngineEvidence
from nmsparse_deploy.ship.torch_sparse.kernel_choice import GemmDecision
from nmsparse_deploy.system.environment import Environment
from nmsparse_deploy.system.timing import SpeedUp, TimedArm


@dataclass(frozen=True)
class BenchResult:
    """All arms of one measurement on a processor, and ratios to the dense arm."""

    where: str
    shape: dict[str, int]
    arms: tuple[TimedArm, ...]
    ratios: dict[str, SpeedUp]
    verdict: str
    predicted: tuple[Prediction, ...]
    """Roofline bounds for GPUs that were not there; no measurement."""
    environment: Environment

    def to_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Phase:
    """One workload, replayed or enqueued plainly, in all arms."""

    name: str
    replayed: bool
    """Through a CUDA graph?"""
    shape: dict[str, int]
    arms: tuple[TimedArm, ...]
    over_dense: dict[str, SpeedUp]
    over_pruned: dict[str, SpeedUp]

    @property
    def how(self) -> str:
        return "CUDA graph" if self.replayed else "plain"


@dataclass(frozen=True)
class AmdahlBound:
    """The speed-up of the whole model that those of single GEMMs allow."""

    gemm_share: float
    gemm_speedup: float
    bound: float


@dataclass(frozen=True)
class GpuBenchResult:
    """All arms of one model on a GPU, with what was seen running in each."""

    status: Literal["measured", "dry run"]
    precision: str
    batch: int
    length: int
    layers: int
    """In which the arms differ."""
    weight_bytes: dict[str, int]
    """Of these layers, by arm."""
    transient_bytes: dict[str, dict[str, int | None]]
    """What a call takes beyond what is allocated, by workload and arm."""
    flops: int
    gemm_flop_share: float | None
    amdahl: dict[str, AmdahlBound | None]
    decisions: dict[str, tuple[GemmDecision, ...]]
    phases: tuple[Phase, ...]
    failed: dict[str, str]
    """What could not be timed, and why."""
    evidence: dict[str, dict[str, EngineEvidence]]
    """By workload and arm."""
    verdict: str
    before: Mapping[str, object]
    """Versions, libraries and the state of the GPU when it began."""
    after: Mapping[str, object] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        decisions = {
            name: [decision.to_json() for decision in made] for name, made in self.decisions.items()
        }
        return {**asdict(self), "decisions": decisions, "evidence": _to_json(self.evidence)}


def _to_json(evidence: Mapping[str, Mapping[str, EngineEvidence]]) -> dict[str, object]:
    return {
        name: {arm: proved.to_json() for arm, proved in arms.items()}
        for name, arms in evidence.items()
    }
