"""Add up the statistics of several processes, each with its share of the calibration sequences."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from nmsparse_deploy.find.calibration.layer_stats import StatsAccumulator
from nmsparse_deploy.system.distributed import Processes

SUMS = ("total", "square_sum", "gram", "cross", "drift", "wanted")


def share(accumulators: Iterable[StatsAccumulator], device: torch.device, team: Processes) -> None:
    """Make each accumulator the sum over all processes.

    The processes call this with accumulators of the same inputs in the same order. What no token
    has reached in one process counts as zeros there.
    """
    if team.world == 1:
        return
    sums = list(accumulators)
    shapes = [
        [None if (value := getattr(each, name)) is None else tuple(value.shape) for name in SUMS]
        for each in sums
    ]
    gathered = team.gather([(each.tokens, shape) for each, shape in zip(sums, shapes)])
    for place, each in enumerate(sums):
        each.tokens = sum(process[place][0] for process in gathered)
        for index, name in enumerate(SUMS):
            shape = next(
                (process[place][1][index] for process in gathered if process[place][1][index]), None
            )
            if shape is None:
                continue
            value = getattr(each, name)
            value = torch.zeros(shape, device=device) if value is None else value
            setattr(each, name, team.add(value.contiguous()))
