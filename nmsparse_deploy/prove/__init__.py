"""Prove that a sparsity pattern holds: in a live model, in a checkpoint, in an ONNX file."""

from nmsparse_deploy.prove.checkpoint import verify_checkpoint
from nmsparse_deploy.prove.live import verify_module, verify_tensors
from nmsparse_deploy.prove.onnx import Link, LinkedPlace, verify_onnx
from nmsparse_deploy.prove.onnx_graph import (
    OnnxGraph,
    Untraced,
    WeightUse,
    read_weight,
    weight_uses,
)
from nmsparse_deploy.prove.report import Place, TensorCheck, VerifyReport

__all__ = [
    "Link",
    "LinkedPlace",
    "OnnxGraph",
    "Place",
    "TensorCheck",
    "Untraced",
    "VerifyReport",
    "WeightUse",
    "read_weight",
    "verify_checkpoint",
    "verify_module",
    "verify_onnx",
    "verify_tensors",
    "weight_uses",
]
