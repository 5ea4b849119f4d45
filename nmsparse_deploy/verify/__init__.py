"""Prove that a sparsity pattern holds: in a live model, in a checkpoint, in an ONNX file."""

from .checkpoint import verify_checkpoint
from .live import verify_module
from .types import Progress, TensorCheck, VerifyReport, shape_verdict

__all__ = ["Progress", "TensorCheck", "VerifyReport", "shape_verdict", "verify_checkpoint", "verify_module"]
