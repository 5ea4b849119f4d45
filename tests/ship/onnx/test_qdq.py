"""8-bit graphs: what is stored, what is verified, what ONNX Runtime computes from it."""

import hashlib

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.masks import Mask, MaskSet, project
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.prove import verify_onnx
from nmsparse_deploy.prove.onnx_graph import OnnxGraph
from nmsparse_deploy.ship.onnx.link import LinkMap, LinkRow
from nmsparse_deploy.ship.onnx.onnxruntime import OnnxRuntime
from nmsparse_deploy.ship.onnx.qdq import insert_qdq
from nmsparse_deploy.ship.quantise import FORMATS, Range

WIDTH = 32
EVERY = pytest.mark.parametrize("kind", FORMATS)


@pytest.fixture
def small(tmp_path):
    """Two products that read one activation, one of them with a bias, added and passed to a third
    as a Gemm."""
    rng = np.random.default_rng(0)
    dense = {
        name: torch.from_numpy(rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 6)
        for name in "abc"
    }
    axes = {"a": 0, "b": 0, "c": 1}
    masks = {name: project(w.abs(), TWO_FOUR, axes[name]) for name, w in dense.items()}
    stored = {
        name: torch.where(masks[name], w, torch.zeros(())).half().numpy()
        for name, w in dense.items()
    }
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["xa"], "mul_a"),
        helper.make_node("MatMul", ["x", "b"], ["xb"], "mul_b"),
        helper.make_node("Add", ["xb", "bias"], ["biased"], "add_bias"),
        helper.make_node("Add", ["xa", "biased"], ["sum"], "add"),
        helper.make_node("Gemm", ["sum", "c", "bias"], ["y"], "mul_c", transB=1),
    ]
    values = [*stored.items(), ("bias", np.full(WIDTH, 0.25, np.float16))]
    io = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["batch", WIDTH])]
        for name in "xy"
    ]
    graph = helper.make_graph(nodes, "g", *io, [numpy_helper.from_array(v, n) for n, v in values])
    path = tmp_path / "model.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10),
        str(path),
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
    )
    link = LinkMap(
        path.name,
        tuple(
            LinkRow(
                f"{n}.weight",
                n,
                f"mul_{n}",
                "Gemm" if n == "c" else "MatMul",
                n,
                axes[n],
                (WIDTH, WIDTH),
                "F16",
                "",
            )
            for n in "abc"
        ),
    )
    x = np.random.default_rng(1).standard_normal((64, WIDTH)).astype(np.float16)
    xa, xb = (x.astype(np.float32) @ stored[n].astype(np.float32) for n in "ab")
    out = (xa + xb + 0.25) @ stored["c"].astype(np.float32).T + 0.25
    ranges = {
        "a": Range(np.abs(x).max(), np.abs(xa).max()),
        "b": Range(np.abs(x).max(), np.abs(xb + 0.25).max()),
        "c": Range(np.abs(xa + xb + 0.25).max(), np.abs(out).max()),
    }
    packed = MaskSet({f"{n}.weight": Mask.pack(masks[n], axes[n], TWO_FOUR, "") for n in "abc"})
    return path, link, ranges, packed, x, out


NAMES = {f"{name}.weight" for name in "abc"}


def ops(path):
    return [node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node]


@EVERY
@pytest.mark.parametrize("one_scale", [False, True])
@pytest.mark.parametrize("requantise", [(), NAMES])
def test_the_graph_computes_what_it_did_up_to_eight_bits_at_any_optimisation(
    small, kind, one_scale, requantise
):
    path, link, ranges, _, x, expected = small
    insert_qdq(path, link, ranges, kind, requantise, one_scale)
    onnx.checker.check_model(str(path), full_check=True)
    for level in ("none", "basic", "all") if kind == "int8" else ("none", "basic"):
        found = (
            OnnxRuntime.build(path, {"optimization": level, "threads": 1})
            .run({"x": x})["y"]
            .astype(np.float32)
        )
        assert np.linalg.norm(found - expected) < (
            0.03 if kind == "int8" else 0.08
        ) * np.linalg.norm(expected)


@EVERY
def test_the_verifier_reads_the_codes_against_the_masks(small, kind):
    path, link, ranges, masks, _, _ = small
    result = insert_qdq(path, link, ranges, kind)
    report = verify_onnx(path, masks, result.link.by_parameter())
    assert report.ok and report.checked == 3, report.failures()
    graph = OnnxGraph(path)
    for row in result.link.rows:
        codes = graph.read(row.tensor)
        assert codes.itemsize == 1 and row.dtype == FORMATS[kind].element
        assert row.sha256 == hashlib.sha256(codes.tobytes()).hexdigest()
    assert result.gemms == 3 and result.requantised == 0


def test_a_code_that_moved_is_found(small):
    path, link, ranges, masks, _, _ = small
    result = insert_qdq(path, link, ranges, "int8")
    model = onnx.load(str(path), load_external_data=False)
    place = {
        entry.key: entry.value
        for t in model.graph.initializer
        if t.name == "a_int8"
        for entry in t.external_data
    }
    zero = int(np.flatnonzero(~masks.masks["a.weight"].unpack().numpy().reshape(-1))[0])
    with open(path.parent / "model.onnx.data", "r+b") as file:
        file.seek(int(place["offset"]) + zero)
        file.write(b"\x01")
    assert not verify_onnx(path, masks, result.link.by_parameter()).ok


def test_one_activation_is_quantised_once_and_outputs_behind_their_bias(small):
    path, link, ranges, _, _, _ = small
    result = insert_qdq(path, link, ranges, "int8", NAMES)
    assert (ops(path).count("QuantizeLinear"), result.requantised) == (2 + 3, 3)
    model = onnx.load(str(path), load_external_data=False)
    maker = {out: node for node in model.graph.node for out in node.output}
    quantized = next(
        node
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and "biased" in node.input[0]
    )
    assert maker[quantized.input[0]].name == "add_bias"


def test_with_one_scale_the_weights_of_an_activation_share_it(small):
    path, link, ranges, _, _, _ = small
    insert_qdq(path, link, ranges, "int8", NAMES, one_scale=True)
    graph = OnnxGraph(path)
    a, b, c = (graph.read(f"{name}_scale") for name in "abc")
    assert a == b != c and a.shape == ()
    assert graph.read("xa_out_scale") == graph.read("biased_out_scale")


def test_zero_points_of_activations_say_that_codes_are_signed(small):
    """Without one, ONNX Runtime takes moved codes for unsigned and cuts off everything negative."""
    path, link, ranges, _, _, _ = small
    insert_qdq(path, link, ranges, "int8", NAMES)
    graph = onnx.load(str(path), load_external_data=False).graph
    stored = {tensor.name for tensor in graph.initializer}
    pairs = [
        n
        for n in graph.node
        if n.op_type.endswith("quantizeLinear") or n.op_type == "QuantizeLinear"
    ]
    assert all(len(n.input) == 3 for n in pairs if n.input[0] not in stored)


def test_what_cannot_be_eight_bits_is_one_sentence(small):
    path, link, ranges, _, _, _ = small
    conv = LinkMap(
        link.onnx, (LinkRow("k.weight", "k", "conv", "Conv", "k", 1, (8, 4, 3, 3), "F16", ""),)
    )
    with pytest.raises(NmsparseError, match="needs a matrix"):
        insert_qdq(path, conv, ranges, "int8")
