"""Weight uses and verification of ONNX graphs."""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from onnx import helper

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.pattern import NMPattern
from nmsparse_deploy.prove import OnnxGraph, read_weight, scan, verify_onnx, weight_uses
from tests.fixtures.onnx_files import TYPES, external, ints, node, saved, tensor
from tests.fixtures.tensor_files import dense, mask_set, sparse

K, N = 48, 32
KN = sparse(K, N, axis=0)[0].numpy()
NK = sparse(N, K, axis=1)[0].numpy()
SCALE = np.linspace(1, 2, N).astype(np.float32)

# name -> (nodes, initializers, axis in the stored tensor, K, N, path)
GRAPHS = {
    "MatMul": ([node("MatMul", "x w", "y")], [tensor("w", KN)], 0, K, N, ()),
    "MatMul batched": (
        [node("MatMul", "x w", "y")],
        [tensor("w", np.stack([KN] * 2))],
        1,
        K,
        N,
        (),
    ),
    "MatMul from the left": ([node("MatMul", "w x", "y")], [tensor("w", NK)], 1, K, N, ()),
    "MatMul vector": (
        [node("MatMul", "x w", "y")],
        [tensor("w", np.tile(KN[:, 0], 8))],
        0,
        K * 8,
        1,
        (),
    ),
    "Gemm": ([node("Gemm", "x w", "y")], [tensor("w", KN)], 0, K, N, ()),
    "Gemm transB": ([node("Gemm", "x w", "y", transB=1)], [tensor("w", NK)], 1, K, N, ()),
    "Gemm from the left": ([node("Gemm", "w x", "y")], [tensor("w", NK)], 1, K, N, ()),
    "Gemm transA": ([node("Gemm", "w x", "y", transA=1)], [tensor("w", KN)], 0, K, N, ()),
    "Conv": (
        [node("Conv", "x w", "y")],
        [tensor("w", sparse(16, 8, 3, 3, axis=1)[0].numpy())],
        1,
        8,
        16,
        (),
    ),
    "Transpose": (
        [node("Transpose", "w", "t", perm=[1, 0]), node("MatMul", "x t", "y")],
        [tensor("w", NK)],
        1,
        K,
        N,
        ("Transpose",),
    ),
    "Transpose by default": (
        [node("Transpose", "w", "t"), node("MatMul", "x t", "y")],
        [tensor("w", NK)],
        1,
        K,
        N,
        ("Transpose",),
    ),
    # a permutation that is not its own inverse: [N, 1, K] -> [1, K, N]
    "Transpose rank 3": (
        [node("Transpose", "w", "t", perm=[1, 2, 0]), node("MatMul", "x t", "y")],
        [tensor("w", NK[:, None])],
        2,
        K,
        N,
        ("Transpose",),
    ),
    "Cast, Identity": (
        [node("Cast", "w", "c", to=10), node("Identity", "c", "i"), node("MatMul", "x i", "y")],
        [tensor("w", KN)],
        0,
        K,
        N,
        ("Cast", "Identity"),
    ),
    "DQ per channel": (
        [node("DequantizeLinear", "w s z", "d", axis=1), node("MatMul", "x d", "y")],
        [tensor("w", KN * 20, "I8"), tensor("s", SCALE), tensor("z", np.zeros(N), "I8")],
        0,
        K,
        N,
        ("DequantizeLinear",),
    ),
    "DQ blocked int4": (
        [node("DequantizeLinear", "w s", "d", axis=0, block_size=16), node("MatMul", "x d", "y")],
        [tensor("w", np.sign(KN) * 3, "I4"), tensor("s", np.ones((3, N)))],
        0,
        K,
        N,
        ("DequantizeLinear",),
    ),
    "DQ, Transpose": (
        [
            node("DequantizeLinear", "w s", "d", axis=0),
            node("Transpose", "d", "t", perm=[1, 0]),
            node("MatMul", "x t", "y"),
        ],
        [tensor("w", NK * 20, "I8"), tensor("s", SCALE)],
        1,
        K,
        N,
        ("DequantizeLinear", "Transpose"),
    ),
    "Q, DQ of a float": (
        [
            node("QuantizeLinear", "w s", "q"),
            node("DequantizeLinear", "q s", "d"),
            node("MatMul", "x d", "y"),
        ],
        [tensor("w", KN), tensor("s", 0.1)],
        0,
        K,
        N,
        ("QuantizeLinear", "DequantizeLinear"),
    ),
    "Reshape of N": (
        [node("Reshape", "w r", "v"), node("MatMul", "x v", "y")],
        [tensor("w", KN.reshape(K, 4, 8)), ints("r", 0, -1)],
        0,
        K,
        N,
        ("Reshape",),
    ),
    "Reshape adds an axis": (
        [node("Reshape", "w r", "v"), node("MatMul", "x v", "y")],
        [tensor("w", KN), ints("r", 1, K, N)],
        0,
        K,
        N,
        ("Reshape",),
    ),
    "Reshape after Transpose": (
        [node("Transpose", "w", "t"), node("Reshape", "t r", "v"), node("MatMul", "x v", "y")],
        [tensor("w", NK), ints("r", 1, K, N)],
        1,
        K,
        N,
        ("Transpose", "Reshape"),
    ),
    "Mul per channel": (
        [node("Mul", "w s", "m"), node("MatMul", "x m", "y")],
        [tensor("w", KN), tensor("s", SCALE)],
        0,
        K,
        N,
        ("Mul",),
    ),
    "Mul from the left": (
        [node("Mul", "s w", "m"), node("MatMul", "x m", "y")],
        [tensor("w", KN), tensor("s", 2.0)],
        0,
        K,
        N,
        ("Mul",),
    ),
    "Div by a vector": (
        [node("Div", "w s", "m"), node("MatMul", "x m", "y")],
        [tensor("w", KN), tensor("s", np.ones((K, 1)))],
        0,
        K,
        N,
        ("Div",),
    ),
    "Constant node": (
        [helper.make_node("Constant", [], ["w"], value=tensor("", KN)), node("MatMul", "x w", "y")],
        [],
        0,
        K,
        N,
        (),
    ),
    "Reshape by plain ints": (
        [
            helper.make_node("Constant", [], ["r"], value_ints=[1, K, N]),
            node("Reshape", "w r", "v"),
            node("MatMul", "x v", "y"),
        ],
        [tensor("w", KN)],
        0,
        K,
        N,
        ("Reshape",),
    ),
}


def by_tensor(report):
    return {check.tensor: check for check in report.checks}


@pytest.mark.parametrize("nodes, tensors, axis, k, n, path", GRAPHS.values(), ids=GRAPHS.keys())
def test_every_way_to_a_multiplication_is_followed(tmp_path, nodes, tensors, axis, k, n, path):
    file = saved(tmp_path, nodes, tensors)
    (use,) = weight_uses(file)
    assert (use.tensor, use.axis, use.k, use.n, use.path) == ("w", axis, k, n, path)
    assert use.node == nodes[-1].name and use.op == nodes[-1].op_type and not use.problems
    report = verify_onnx(file)
    assert report.ok and report.checked == 1, report.summary()


@pytest.mark.parametrize("nodes, tensors, axis, k, n, path", GRAPHS.values(), ids=GRAPHS.keys())
def test_one_planted_value_is_found_behind_every_path(tmp_path, nodes, tensors, axis, k, n, path):
    """Fill one group of the stored tensor; the check must name it."""
    file = saved(tmp_path, nodes, tensors)
    (use,) = weight_uses(file)
    values = read_weight(file, use).astype(np.float64)
    place = [size // 2 for size in values.shape]
    place[axis] = 4
    first = tuple(place)
    values[tuple(slice(4, 8) if i == axis else n for i, n in enumerate(place))] = 1
    broken = tensor("w", values, use.dtype)
    nodes = [
        helper.make_node("Constant", [], ["w"], value=broken) if step.output[0] == "w" else step
        for step in nodes
    ]
    report = verify_onnx(saved(tmp_path, nodes, [broken if t.name == "w" else t for t in tensors]))
    assert not report.ok
    assert by_tensor(report)["w"].bad == 1 and by_tensor(report)["w"].first_bad == first


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_is_read_in_both_encodings(tmp_path, dtype, raw):
    values = np.sign(KN) * 3
    values = np.abs(values) if dtype.startswith("U") else values
    file = saved(tmp_path, [node("MatMul", "x w", "y")], [tensor("w", values, dtype, raw)])
    (use,) = weight_uses(file)
    assert use.dtype == dtype
    np.testing.assert_array_equal(read_weight(file, use).astype(np.float64), values)
    report = verify_onnx(file)
    assert report.ok and report.checks[0].nonzeros == np.count_nonzero(values)


@pytest.mark.parametrize("dtype", ["I4", "U4"])
def test_the_padding_of_an_odd_number_of_half_bytes_is_dropped(tmp_path, dtype):
    values = np.arange(15).reshape(3, 5) % 8
    values = values if dtype == "U4" else values - 8
    file = saved(tmp_path, [node("MatMul", "x w", "y")], [tensor("w", values, dtype)])
    np.testing.assert_array_equal(read_weight(file, weight_uses(file)[0]), values)


def test_scopes_of_the_exporter_are_read_and_nothing_else_is_run(tmp_path):
    nodes = [
        node("MatMul", "x w", "a", scopes="['', 'model.layers.0', 'model.layers.0.mlp.up_proj']"),
        node("MatMul", "a v", "b", scopes="__import__('os').getcwd()"),
        node("MatMul", "b u", "y", scopes="['cut"),
    ]
    file = saved(tmp_path, nodes, [tensor(name, KN) for name in "wvu"])
    assert [use.scopes for use in weight_uses(file)] == [
        ("", "model.layers.0", "model.layers.0.mlp.up_proj"),
        (),
        (),
    ]
    assert verify_onnx(file, expect=["*.up_proj.weight"]).ok
    assert "Nothing is called" in verify_onnx(file, expect=["*.down_proj.weight"]).summary()


def test_activations_and_embeddings_are_not_weights(tmp_path):
    nodes = [
        node("Gather", "e x", "a"),
        node("MatMul", "a a", "b"),
        node("Mul", "b s", "c"),
        node("MatMul", "c w", "y"),
    ]
    graph = OnnxGraph(
        saved(tmp_path, nodes, [tensor("e", dense(9, K)), tensor("s", SCALE), tensor("w", KN)])
    )
    assert [use.tensor for use in graph.uses] == ["w"] and not graph.untraced


def test_weights_in_branches_and_in_functions_are_found(tmp_path):
    branch = helper.make_graph(
        [node("MatMul", "x w", "inner")],
        "b",
        [],
        [helper.make_tensor_value_info("inner", 1, None)],
        initializer=[tensor("w", KN)],
    )
    other = helper.make_graph(
        [node("Identity", "x", "same")], "c", [], [helper.make_tensor_value_info("same", 1, None)]
    )
    file = saved(tmp_path, [node("If", "x", "y", then_branch=branch, else_branch=other)], [])
    assert verify_onnx(file).checked == 1
    function = helper.make_function(
        "local",
        "Layer",
        ["a", "b"],
        ["c"],
        [node("MatMul", "a b", "c")],
        [helper.make_opsetid("", 23)],
    )
    file = saved(
        tmp_path,
        [helper.make_node("Layer", ["x", "w"], ["y"], domain="local")],
        [tensor("w", KN)],
        functions=[function],
    )
    assert [(use.tensor, use.axis) for use in weight_uses(file)] == [("w", 0)]


@pytest.mark.parametrize(
    "nodes, tensors",
    [
        (
            [node("Mul", "w k", "m"), node("MatMul", "x m", "y")],
            [tensor("w", dense(K, N)), tensor("k", KN != 0)],
        ),
        (
            [
                node("Cast", "k", "f", to=1),
                node("Mul", "f w", "m"),
                node("Transpose", "m", "t"),
                node("MatMul", "x t", "y"),
            ],
            [tensor("w", dense(N, K)), tensor("k", NK != 0, "U8")],
        ),
        (
            [node("Where", "k w z", "m"), node("MatMul", "x m", "y")],
            [tensor("w", dense(K, N)), tensor("k", KN != 0, "U8"), tensor("z", 0.0)],
        ),
    ],
    ids=["Mul", "Cast, Mul, Transpose", "Where"],
)
def test_a_mask_that_was_not_baked_fails(tmp_path, nodes, tensors):
    report = verify_onnx(saved(tmp_path, nodes, tensors))
    assert not report.ok and any("mask was not baked" in line for line in report.failures())


@pytest.mark.parametrize("op", ["DequantizeLinear", "QuantizeLinear"])
def test_an_asymmetric_zero_point_fails(tmp_path, op):
    points = np.zeros(N)
    points[-1] = 3
    nodes = [node(op, "w s z", "d", axis=1), node("MatMul", "x d", "y")]
    stored = tensor("w", KN * 20, "I8") if op == "DequantizeLinear" else tensor("w", KN)
    report = verify_onnx(
        saved(tmp_path, nodes, [stored, tensor("s", SCALE), tensor("z", points, "I8")])
    )
    assert not report.ok and "zero point 'z' is not zero" in report.summary()
    report = verify_onnx(
        saved(tmp_path, [node(op, "w s x", "d"), nodes[1]], [stored, tensor("s", SCALE)])
    )
    assert "not a stored constant" in report.summary()


@pytest.mark.parametrize(
    "nodes, tensors, words",
    [
        (
            [node("Reshape", "w r", "v"), node("MatMul", "x v", "y")],
            [tensor("w", KN), ints("r", K // 2, N * 2)],
            "mixed",
        ),
        ([node("Reshape", "w x", "v"), node("MatMul", "x v", "y")], [tensor("w", KN)], "run time"),
        (
            [node("Reshape", "w r", "v"), node("MatMul", "x v", "y")],
            [tensor("w", KN), ints("r", 7, -1)],
            "bad shape",
        ),
        (
            [node("Transpose", "w", "v", perm=[0, 5]), node("MatMul", "x v", "y")],
            [tensor("w", KN)],
            "bad perm",
        ),
        (
            [node("Add", "w d", "v"), node("MatMul", "x v", "y")],
            [tensor("w", KN), tensor("d", KN)],
            "Add",
        ),
        (
            [node("Mul", "w d", "v"), node("MatMul", "x v", "y")],
            [tensor("w", KN[:1]), tensor("d", KN[:, :1])],
            "enlarges",
        ),
    ],
    ids=["mixes K", "unknown shape", "bad shape", "bad perm", "Add", "outer product"],
)
def test_what_cannot_be_followed_is_said_and_claims_nothing(tmp_path, nodes, tensors, words):
    file = saved(tmp_path, nodes, tensors)
    (item,) = OnnxGraph(file).untraced
    assert item.tensor in ("w", "d") and words in item.reason
    report = verify_onnx(file)
    assert not report.ok and report.checked == 0 and words in report.checks[0].skipped
    assert "expected to be sparse" in verify_onnx(file, expect=[item.tensor]).summary()


def test_a_shared_weight_that_is_sparse_along_one_of_its_two_axes_is_a_conflict(tmp_path):
    nodes = [node("MatMul", "x w", "a"), node("Gemm", "a w", "y", transB=1)]
    report = verify_onnx(saved(tmp_path, nodes, [tensor("w", KN)]))
    assert not report.ok and report.failed == 1 and "conflict" in report.summary()
    assert (
        verify_onnx(
            saved(tmp_path, [nodes[0], node("MatMul", "a w", "y")], [tensor("w", KN)])
        ).checked
        == 2
    )


def test_foreign_rules_hold_for_graphs(tmp_path):
    nodes = [node("MatMul", "x w", "a"), node("MatMul", "a h", "b"), node("MatMul", "b o", "y")]
    file = saved(
        tmp_path, nodes, [tensor("w", KN), tensor("h", dense(K, N)), tensor("o", dense(K + 2, N))]
    )
    report = verify_onnx(file)
    assert (
        report.ok
        and by_tensor(report)["h"].skipped == "dense"
        and "axis 0" in by_tensor(report)["o"].skipped
    )
    assert not verify_onnx(file, expect=["MatMul_b"]).ok
    assert (
        "Nothing" in verify_onnx(saved(tmp_path, nodes[1:2], [tensor("h", dense(K, N))])).summary()
    )
    assert json.loads(json.dumps(report.to_json()))["checks"][0]["node"] == "MatMul_a"
    assert verify_onnx(file, pattern=NMPattern(2, 8)).ok is False


# --- with masks and a link map ---


def link_row(name, axis, node_name=""):
    return SimpleNamespace(node=node_name, tensor=name, axis=axis)


@pytest.mark.parametrize("dtype", ["F32", "F16", "I8", "U8", "I4"])
def test_hashes_are_of_the_stored_bytes(tmp_path, dtype):
    stored = tensor("w", np.sign(KN) * 3 if dtype != "U8" else np.abs(np.sign(KN)) * 3, dtype)
    nodes = [node("DequantizeLinear", "w s", "d"), node("MatMul", "x d", "y")]
    if dtype[0] == "F":
        nodes = [node("MatMul", "x w", "y")]
    file = saved(tmp_path, nodes, [stored, tensor("s", np.float32(0.1))])
    (check,) = [check for check in verify_onnx(file).checks if check.tensor == "w"]
    assert check.sha256 == hashlib.sha256(stored.raw_data).hexdigest()


@pytest.fixture
def linked(tmp_path):
    """A square weight, stored transposed: only the axis tells the layouts apart."""
    weight, mask = sparse(64, 64, dtype=torch.float16)
    values = weight.T.numpy()
    file = saved(tmp_path, [node("MatMul", "x val_1", "y", "mm")], [tensor("val_1", values, "F16")])
    return file, values, mask_set(p=mask), {"p": [link_row("val_1", 0, "mm")]}, mask


def test_linked_weights_hold_in_the_layout_they_are_stored_in(linked):
    file, _, masks, link, _ = linked
    report = verify_onnx(file, masks, link)
    check = report.checks[0]
    assert report.ok and check.parameter == "p" and check.axis == 0 and check.mask_mismatch == 0
    assert check.shape_verdict == "recommended" and len(check.sha256) == 64


def test_a_linked_weight_with_another_mask_fails(linked):
    file, values, _, link, _ = linked
    other = sparse(64, 64, seed=9)[1]
    check = verify_onnx(file, mask_set(p=other), link).checks[0]
    assert not check.ok and check.bad == 0
    assert check.mask_mismatch == int(((values.T != 0) & ~other.unpack().numpy()).sum()) > 0


def test_a_mask_in_the_stored_layout_needs_no_turning(tmp_path):
    for shape, axis, op, more in (
        ((N, K), 1, "Gemm", {"transB": 1}),
        ((K, N), 0, "MatMul", {}),
        ((16, 8, 3, 3), 1, "Conv", {}),
    ):
        weight, mask = sparse(*shape, axis=axis)
        file = saved(tmp_path, [node(op, "x w", "y", **more)], [tensor("w", weight)])
        assert verify_onnx(file, mask_set(w=mask), {"w": [link_row("w", axis)]}).ok


def test_a_stored_leading_axis_of_one_is_no_obstacle(tmp_path):
    weight, mask = sparse(N, K)
    file = saved(tmp_path, [node("MatMul", "x w", "y")], [tensor("w", weight.T.numpy()[None])])
    assert verify_onnx(file, mask_set(p=mask), {"p": [link_row("w", 1)]}).ok


def test_a_link_map_is_not_believed_against_the_graph(linked):
    file, _, masks, _, _ = linked
    for link, words in (
        ({}, "gives it no place"),
        ({"p": [link_row("gone", 0)]}, "no such tensor"),
        ({"p": [link_row("val_1", 1)]}, "says axis 1"),
        ({"p": [link_row("val_1", 0, "other")]}, "does not multiply"),
    ):
        report = verify_onnx(file, masks, link)
        assert not report.ok and any(words in line for line in report.failures()), report.failures()
    assert not verify_onnx(file, MaskSet({}), {}).ok
    wide = sparse(64, 32)[1]
    assert (
        "do not fit" in verify_onnx(file, mask_set(p=wide), {"p": [link_row("val_1", 0)]}).summary()
    )
    with pytest.raises(UsageError, match="link map is needed"):
        verify_onnx(file, masks)


def test_minus_zero_fails_in_a_linked_weight(linked, tmp_path):
    _, values, masks, link, _ = linked
    minus = np.where(values == 0, -0.0, values)
    file = saved(tmp_path, [node("MatMul", "x val_1", "y", "mm")], [tensor("val_1", minus, "F16")])
    assert "minus zero" in verify_onnx(file, masks, link).summary()


def test_a_second_use_of_a_linked_weight(linked, tmp_path):
    _, values, masks, link, _ = linked
    stored = [tensor("val_1", values, "F16"), tensor("head", dense(64, 8))]
    first = node("MatMul", "x val_1", "a", "mm")
    along = [first, node("MatMul", "a val_1", "b"), node("MatMul", "b head", "y")]
    report = verify_onnx(saved(tmp_path, along, stored), masks, link)
    assert report.ok and {check.skipped for check in report.checks} == {
        None,
        "verified at another node",
        "not in the link map",
    }
    across = [first, node("Gemm", "a val_1", "y", transB=1)]
    assert "conflict" in verify_onnx(saved(tmp_path, across, stored), masks, link).summary()


def test_an_unbaked_mask_fails_although_the_link_map_names_the_weight(tmp_path):
    weight, mask = sparse(K, N, axis=0)
    nodes = [node("Mul", "w k", "m"), node("MatMul", "x m", "y")]
    file = saved(tmp_path, nodes, [tensor("w", dense(K, N)), tensor("k", weight != 0)])
    report = verify_onnx(file, mask_set(w=mask), {"w": [link_row("w", 0)]})
    assert (
        any("mask was not baked" in line for line in report.failures()) and report.checks[0].bad > 0
    )


# --- external data ---


def test_external_data_is_streamed_from_its_offset(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "CHUNK", 1024)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "w.bin").write_bytes(b"x" * 12 + KN.tobytes() + b"y" * 5)
    where = external("w", KN, "data/w.bin", offset=12, length=KN.nbytes)
    file = saved(tmp_path, [node("MatMul", "x w", "y")], [where])
    report = verify_onnx(file)
    assert (
        report.ok and report.checks[0].nonzeros == KN.size // 2 and report.bytes_read == KN.nbytes
    )
    np.testing.assert_array_equal(read_weight(file, weight_uses(file)[0]), KN)


def test_packed_external_integers_are_widened_chunk_by_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "CHUNK", 128)
    packed = tensor("w", np.sign(KN) * 3, "I4")
    (tmp_path / "w.bin").write_bytes(packed.raw_data)
    stored = external("w", KN, "w.bin", dtype=TYPES["I4"])
    nodes = [node("DequantizeLinear", "w s", "d"), node("MatMul", "x d", "y")]
    report = verify_onnx(saved(tmp_path, nodes, [stored, tensor("s", 1.0)]))
    assert report.ok and report.checks[0].nonzeros == KN.size // 2
