"""The peak of a stretch is that of the stretch, and the life's peak forgets nothing."""

from __future__ import annotations

import sys

import pytest
import torch

from nmsparse_deploy.system.memory import peak_memory_mb, start_stretch, stretch_peak_mb


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="the mark can be reset on Linux only")
def test_a_stretch_counts_anew():
    def use(megabytes: int) -> None:
        torch.ones(megabytes << 18).sum()

    start_stretch()
    idle = stretch_peak_mb()
    use(200)
    large = stretch_peak_mb()
    start_stretch()
    use(50)
    small = stretch_peak_mb()
    assert large >= idle + 190 and small <= large - 100
    assert peak_memory_mb() >= large
