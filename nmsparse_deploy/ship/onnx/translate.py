"""Operators that torch's exporter translates into nodes which no runtime accepts, translated here
instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return by operator of torch what writes its nodes, for `torch.onnx.export`."""
    from onnxscript import opset18

    op: Any = opset18  # its stubs know no plain lists

    def squeeze(self: Any, dim: int) -> Any:
        """Leave an axis that is not 1 long, as torch does; ONNX refuses to squeeze it (PixArt has
        such a call)."""
        length = self.shape[dim] if self.shape is not None and len(self.shape) else 0
        return (
            op.Identity(self)
            if isinstance(length, int) and length != 1
            else op.Squeeze(self, [dim])
        )

    return {torch.ops.aten.squeeze.dim: squeeze}
