"""CUDA graphs: one call is recorded and replayed without the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def record(call: Callable[[], Any]) -> Callable[[], Any]:
    """Record one call; the returned one replays it and gives what the recorded one gave.

    Whatever the call reads and writes stays where it is: results of one replay are overwritten by
    the next.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # lazily made handles and workspaces must not be recorded
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay
