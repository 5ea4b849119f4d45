"""Timing: paired arms, one implementation for processors and GPUs; where sparse starts to win; what it was timed on."""

from nmsparse_deploy.system.timing import (
    CPU_SENTENCE,
    BenchResult,
    Call,
    Clock,
    TimedArm,
    interleave,
    ratio,
    summarise,
    wall,
)

__all__ = ["CPU_SENTENCE", "BenchResult", "Call", "Clock", "TimedArm", "interleave", "ratio", "summarise", "wall"]
