"""Timing: paired arms, one implementation for processors and GPUs; where sparse starts to win; what
it was timed on."""

from nmsparse_deploy.measure.bench.result import BenchResult, GpuBenchResult
from nmsparse_deploy.system.timing import (
    CPU_SENTENCE,
    Call,
    Clock,
    SpeedUp,
    TimedArm,
    interleave,
    ratio,
    summarise,
    wall,
)

__all__ = [
    "CPU_SENTENCE",
    "BenchResult",
    "Call",
    "Clock",
    "GpuBenchResult",
    "SpeedUp",
    "TimedArm",
    "interleave",
    "ratio",
    "summarise",
    "wall",
]
