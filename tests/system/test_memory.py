"""The peak since a reset counts anew, the life's peak forgets nothing; what is used and free is
what the system says."""

from __future__ import annotations

import sys

import pytest
import torch

from nmsparse_deploy.system.hardware import compute_dtype, cpu_name
from nmsparse_deploy.system.memory import (
    free_memory,
    peak_memory_mb,
    peak_since_reset_mb,
    reset_peak,
    used_memory,
)


@pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_available(),
    reason="the mark can be reset on Linux only",
)
def test_a_reset_counts_anew():
    def use(megabytes: int) -> None:
        torch.ones(megabytes << 18).sum()

    reset_peak()
    idle = peak_since_reset_mb()
    use(200)
    large = peak_since_reset_mb()
    reset_peak()
    use(50)
    small = peak_since_reset_mb()
    assert large >= idle + 190 and small <= large - 100
    assert peak_memory_mb() >= large


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, its memory counts")
def test_what_is_taken_is_used():
    before = used_memory()
    taken = torch.ones(100 << 18)
    assert used_memory() >= before + 0.9 * taken.nbytes
    assert taken.nbytes < free_memory() == pytest.approx(free_memory(torch.device("cpu")), rel=0.5)


def test_the_processor_is_named_with_its_cores():
    assert cpu_name().endswith("logical cores)") and len(cpu_name().partition(" (")[0]) > 2
    assert compute_dtype("bf16", torch.device("cpu")) == torch.bfloat16
    assert compute_dtype("auto", torch.device("cpu")) in (torch.bfloat16, torch.float32)
