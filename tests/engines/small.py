"""A graph of three multiplications, two of which read the same tensor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from nmsparse_deploy.engines.tensorrt_build import Settings

SHAPES = {"x": (4, 64)}
TYPES = {"fp16": (TensorProto.FLOAT16, np.float16), "fp32": (TensorProto.FLOAT, np.float32)}


def weights(seed: int, dtype, dense: bool = False) -> np.ndarray:
    """[64, 64], 2:4 along axis 0."""
    made = np.random.default_rng(seed).standard_normal((64, 64)).astype(dtype)
    if not dense:
        made.reshape(16, 4, 64)[:, 2:] = 0
    return made


def graph(folder: Path, precision: str = "fp16", dense: tuple[str, ...] = (), external: bool = True) -> Path:
    """x -> q, k (both read x); q + k -> out. `dense` names weights without the pattern."""
    kind, dtype = TYPES[precision]
    nodes = [helper.make_node("MatMul", ["x", "w_q"], ["a"], name="q"), helper.make_node("MatMul", ["x", "w_k"], ["b"], name="k"),
             helper.make_node("Add", ["a", "b"], ["c"], name="add"), helper.make_node("MatMul", ["c", "w_o"], ["y"], name="o")]
    stored = [numpy_helper.from_array(weights(seed, dtype, name in dense), name) for seed, name in enumerate(("w_q", "w_k", "w_o"))]
    io = [helper.make_tensor_value_info(name, kind, ["batch", 64]) for name in ("x", "y")]
    model = helper.make_model(helper.make_graph(nodes, "g", io[:1], io[1:], stored), opset_imports=[helper.make_opsetid("", 20)])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    onnx.save(model, str(path), save_as_external_data=external, location="model.onnx.data", size_threshold=0)
    return path


def settings(**changes) -> Settings:
    return Settings(**{"shapes": SHAPES, **changes})
