"""TensorRT-RTX as a compile check: its layer list, what is said about each GEMM, and what is said
without it."""

import builtins
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from nmsparse_deploy.errors import CheckFailed, MissingExtra, NmsparseError, UsageError
from nmsparse_deploy.ship.onnx.link import LinkMap, LinkRow
from nmsparse_deploy.ship.onnx.qdq import insert_qdq
from nmsparse_deploy.ship.quantise import Range
from nmsparse_deploy.ship.tensorrt import rtx as tensorrt_rtx
from nmsparse_deploy.ship.tensorrt.rtx import TensorRtRtx, judge, size_of
from nmsparse_deploy.ship.tensorrt.rtx_layers import layers


def tensor(name, shape, dtype):
    return (
        f"{{ Name: {name}, Dimensions: [{shape}], Strides: [1], StrideOrder: [0], Datatype: {dtype}, "
        "Format: (Linear) Row major linear format }"
    )


def line(name, kind, given, constants, made, onnx_nodes):
    lists = [", ".join(f" {tensor(*t)}" for t in part) for part in (given, constants, made)]
    metadata = "".join(f"[ONNX Layer: {node}]" for node in onnx_nodes)
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [{lists[0]}], Constants: [{lists[1]}], Outputs: [{lists[2]}], "
        f"TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: {metadata}"
    )


ALPHA = ("alpha", "1", "Float")


def listing(dtype="Half", out="Half"):
    return "\n".join(
        [
            "Layers:",
            line(
                "q+k_0",
                "gemm",
                [("x", "2,64", dtype)],
                [("w", "64,96", dtype), ALPHA],
                [("y", "2,96", out)],
                ["q", "k"],
            ),
            line(
                "o_1",
                "kgen",
                [("y", "2,64", out)],
                [("w2", "64,64", out)],
                [("z", "2,64", out)],
                ["o", "add"],
            ),
            "",
            "I/O Tensors:",
            " Name: x, IOMode: Input, DataType: Half, Dimensions: [2,64]",
        ]
    )


@pytest.fixture
def graph(tmp_path):
    """q and k read x; o reads q; head reads k."""
    rng = np.random.default_rng(0)
    shapes = {"q": (64, 64), "k": (64, 32), "o": (64, 64), "head": (32, 64)}
    stored = [
        numpy_helper.from_array((rng.standard_normal(s) / 8).astype(np.float16), f"w_{n}")
        for n, s in shapes.items()
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w_q"], ["q"], "q"),
        helper.make_node("MatMul", ["x", "w_k"], ["k"], "k"),
        helper.make_node("MatMul", ["q", "w_o"], ["o"], "o"),
        helper.make_node("MatMul", ["k", "w_head"], ["h"], "head"),
        helper.make_node("Add", ["o", "h"], ["y"], "add"),
    ]
    io = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["batch", "sequence", 64])]
        for name in "xy"
    ]
    path = tmp_path / "model.onnx"
    onnx.save(
        helper.make_model(
            helper.make_graph(nodes, "g", *io, stored),
            ir_version=10,
            opset_imports=[helper.make_opsetid("", 20)],
        ),
        str(path),
    )
    return path


def test_the_layer_list_is_read_line_by_line():
    first, second = layers(listing())
    assert (first.name, first.kind, first.onnx_nodes) == ("q+k_0", "gemm", ("q", "k"))
    assert [(t.shape, t.dtype) for t in first.constants] == [((64, 96), "Half"), ((1,), "Float")]
    assert first.outputs[0].shape == (2, 96) and first.tactic == "__myelin_CASK_STUB"
    assert first.is_gemm and not second.is_gemm
    assert layers("nothing here\nName: x") == []


def test_gemms_are_tied_to_onnx_nodes_and_merged_ones_are_told(graph):
    found = judge(graph, layers(listing()), "1", 10, {})
    (gemm,) = found.gemms
    assert (gemm.nodes, gemm.k, gemm.n, gemm.inputs, gemm.outputs) == (
        ("q", "k"),
        64,
        96,
        ("Half",),
        ("Half",),
    )
    assert (found.merged, found.generated, found.lost, found.wide) == (
        (("q", "k"),),
        ("o",),
        ("head",),
        (),
    )
    assert found.to_json()["rung"] == "compiles"
    assert (
        "1 GEMMs, 1 of them merged from 2" in found.summary()
        and "1 products are in no layer" in found.summary()
    )


def test_a_gemm_in_fp32_over_narrower_weights_is_an_island(graph):
    assert judge(graph, layers(listing("Float")), "1", 10, {}).wide == ("k", "q")


def test_eight_bits_means_operands_and_result(graph):
    def eight(given, made):
        return judge(graph, layers(listing(given, made)), "1", 10, {}).gemms[0].eight_bit

    assert eight("Int8", "Int8") and eight("FP8", "FP8")
    assert not eight("Int8", "Half") and not eight("Half", "Half")


def test_sizes_of_axes():
    assert [
        size_of(axis, {"past": 7, "batch": 2}, "x")
        for axis in (3, "batch", "past + 1", "past+batch")
    ] == [3, 2, 8, 9]
    with pytest.raises(UsageError, match="no size was given for 'width'"):
        size_of("width", {}, "x")


def test_without_the_package_it_is_one_sentence_with_the_command(graph, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "tensorrt_rtx":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match="needs the package 'tensorrt-rtx-cu13'") as caught:
        TensorRtRtx.build(graph)
    assert "nmsparse-deploy[trt-rtx]" in caught.value.hint


def test_a_plan_is_never_run():
    with pytest.raises(NmsparseError, match="never run"):
        TensorRtRtx(None).run({})


def test_nothing_in_the_engine_deserialises():
    assert "deserialize" not in Path(tensorrt_rtx.__file__).read_text()


# --- with the library ---


@pytest.fixture
def library():
    return pytest.importorskip("tensorrt_rtx")


def test_a_graph_compiles_without_a_gpu_and_what_reads_one_input_is_merged(library, graph):
    found = TensorRtRtx.build(graph, {"batch": 2, "length": 64}).compiled
    assert {node for gemm in found.gemms for node in gemm.nodes} == {"q", "k", "o", "head"}
    assert {frozenset(nodes) for nodes in found.merged} >= {frozenset({"q", "k"})}
    assert not found.wide and not found.lost


@pytest.mark.parametrize(("kind", "dtype"), [("int8", "Int8"), ("fp8", "FP8")])
@pytest.mark.parametrize("one_scale", [False, True])
def test_eight_bit_graphs_compile_to_eight_bit_gemms_and_outputs_need_one_scale(
    library, graph, kind, dtype, one_scale
):
    rows = tuple(
        LinkRow(f"{n}.weight", n, n, "MatMul", f"w_{n}", 0, s, "F16", "")
        for n, s in (("q", (64, 64)), ("k", (64, 32)), ("o", (64, 64)), ("head", (32, 64)))
    )
    insert_qdq(
        graph,
        LinkMap("model.onnx", rows),
        dict.fromkeys(("q", "k", "o", "head"), Range(3, 3)),
        kind,
        {row.parameter for row in rows},
        one_scale,
    )
    found = TensorRtRtx.build(graph, {"batch": 2, "length": 64}).compiled
    assert all(gemm.inputs == (dtype,) for gemm in found.gemms)
    eight = {node for gemm in found.gemms if gemm.eight_bit for node in gemm.nodes}
    assert (eight >= {"q", "k"}) if one_scale else not eight


def test_a_refused_graph_is_one_sentence_with_the_reason(library, graph, tmp_path):
    model = onnx.load(str(graph))
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, str(graph))
    with pytest.raises(CheckFailed, match="cannot parse") as caught:
        TensorRtRtx.build(graph)
    assert "\n" not in caught.value.message and "NoSuchOperator" in caught.value.message
    with pytest.raises(UsageError, match="no ONNX file"):
        TensorRtRtx.build(tmp_path / "gone.onnx")
