"""What ONNX Runtime's own tools make of a small model with one sparse and one dense weight."""

import logging

import numpy as np
import onnx
import pytest
from onnx import helper

from nmsparse_deploy.prove import verify_onnx
from tests.fixtures.onnx_files import node, tensor
from tests.fixtures.tensor_files import dense, sparse

ort = pytest.importorskip("onnxruntime")
quantization = pytest.importorskip("onnxruntime.quantization")
INT8, UINT8 = quantization.QuantType.QInt8, quantization.QuantType.QUInt8
QDQ, OPERATORS = quantization.QuantFormat.QDQ, quantization.QuantFormat.QOperator

# kind -> (nodes, weights: the first is sparse, shape of the input)
KINDS = {
    "MatMul": (
        [node("MatMul", "x g", "a"), node("Relu", "a", "b"), node("MatMul", "b d", "y")],
        (sparse(64, 64, axis=0)[0], dense(64, 32)),
        [2, 64],
    ),
    "Gemm": (
        [
            node("Gemm", "x g", "a", transB=1),
            node("Relu", "a", "b"),
            node("Gemm", "b d", "y", transB=1),
        ],
        (sparse(64, 64, axis=1)[0], dense(32, 64)),
        [2, 64],
    ),
    "Conv": (
        [node("Conv", "x g", "a"), node("Relu", "a", "b"), node("Conv", "b d", "y")],
        (sparse(32, 16, 3, 3, axis=1)[0], dense(16, 32, 3, 3)),
        [1, 16, 8, 8],
    ),
}


class Samples(quantization.CalibrationDataReader):
    def __init__(self, shape):
        rng = np.random.default_rng(0)
        self.left = [{"x": rng.normal(size=shape).astype(np.float32)} for _ in range(2)]

    def get_next(self):
        return self.left.pop() if self.left else None


def float_model(folder, kind):
    nodes, weights, shape = KINDS[kind]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, shape)],
        [helper.make_tensor_value_info("y", 1, None)],
        [tensor(name, np.asarray(weight)) for name, weight in zip("gd", weights)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "float.onnx")
    return folder / "float.onnx", shape


def verdicts(report):
    return {
        check.tensor[0]: check.skipped or ("ok" if check.ok else check.problems[0])
        for check in report.checks
    }


@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
@pytest.mark.parametrize("kind", KINDS)
def test_dynamic_and_static_quantisation_are_judged_by_what_zero_is_stored_as(
    tmp_path, kind, per_channel
):
    logging.disable(logging.WARNING)  # the tools ask for a step of preparation
    source, shape = float_model(tmp_path, kind)
    made = tmp_path / "quantised.onnx"
    for dtype in (INT8, UINT8):
        quantization.quantize_dynamic(source, made, weight_type=dtype, per_channel=per_channel)
        report = verify_onnx(made)
        assert not report.not_followed and verdicts(report)["d"] == "dense"
        if dtype == INT8:
            assert report.ok and verdicts(report)["g"] == "ok"
        else:
            assert "lost in the stored integers" in verdicts(report)["g"]
    for form in (QDQ, OPERATORS):
        for symmetric in (True,) if per_channel else (True, False):
            quantization.quantize_static(
                source,
                made,
                Samples(shape),
                quant_format=form,
                weight_type=INT8,
                per_channel=per_channel,
                extra_options={"WeightSymmetric": symmetric},
            )
            report = verify_onnx(made)
            assert not report.not_followed and verdicts(report)["d"] == "dense"
            assert report.ok == symmetric, report.summary()
    logging.disable(logging.NOTSET)


def test_four_bit_blocks_are_not_followed(tmp_path):
    blocks = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    source, _ = float_model(tmp_path, "MatMul")
    quantizer = blocks.MatMulNBitsQuantizer(onnx.load(source), block_size=32, is_symmetric=True)
    quantizer.process()
    onnx.save(quantizer.model.model, tmp_path / "blocks.onnx")
    report = verify_onnx(tmp_path / "blocks.onnx")
    assert not report.ok and report.not_followed == 2
    assert set(verdicts(report).values()) == {"not followed: read by com.microsoft.MatMulNBits"}


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_that_the_runtime_has_optimised_are_followed(tmp_path, kind):
    source, _ = float_model(tmp_path, kind)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    report = verify_onnx(tmp_path / "fused.onnx").strict()
    assert report.ok and verdicts(report) == {"g": "ok", "d": "dense"}
