"""Every operator that multiplies and sums, and every way of a constant to one: the axis that its
definition reduces, or a sentence."""

import hashlib

import numpy as np
import pytest
from onnx import helper

from nmsparse_deploy.prove import OnnxGraph, verify_onnx
from tests.fixtures.onnx_files import ints, node, saved, tensor
from tests.fixtures.tensor_files import dense, sparse

K, N = 48, 32
MS = "com.microsoft"


def weight(*shape, axis):
    return sparse(*shape, axis=axis)[0].numpy()


def ms(op, inputs, output="y", **attributes):
    return node(op, inputs, output, domain=MS, **attributes)


# name -> (node that reads `w`, shape of `w`, axis that it reduces)
READERS = {
    "ConvTranspose": (node("ConvTranspose", "x w", "y"), (16, 8, 3, 3), 0),
    "ConvTranspose in groups": (node("ConvTranspose", "x w", "y", group=2), (16, 8, 3, 3), 0),
    "Conv in groups": (node("Conv", "x w", "y", group=2), (16, 8, 3, 3), 1),
    "Conv 1d": (node("Conv", "x w", "y"), (16, 8, 5), 1),
    "ConvInteger": (node("ConvInteger", "x w", "y"), (16, 8, 3, 3), 1),
    "QLinearConv": (node("QLinearConv", "x s s w s s s s", "y"), (16, 8, 3, 3), 1),
    "DeformConv": (node("DeformConv", "x w x", "y"), (16, 8, 3, 3), 1),
    "MatMulInteger": (node("MatMulInteger", "x w", "y"), (K, N), 0),
    "MatMulInteger from the left": (node("MatMulInteger", "w x", "y"), (N, K), 1),
    "QLinearMatMul": (node("QLinearMatMul", "x s s w s s s s", "y"), (K, N), 0),
    "Einsum kn": (node("Einsum", "x w", "y", equation="bk,kn->bn"), (K, N), 0),
    "Einsum nk": (node("Einsum", "x w", "y", equation="... k, n k -> ... n"), (N, K), 1),
    "Einsum implicit": (node("Einsum", "x w", "y", equation="bk,kn"), (K, N), 0),
    "Einsum of a batch": (node("Einsum", "x w", "y", equation="ebk,ekn->ebn"), (2, K, N), 1),
    "Einsum of heads": (node("Einsum", "x w", "y", equation="bsd,dhe->bshe"), (K, 4, 8), 0),
    "Einsum from the left": (node("Einsum", "w x", "y", equation="nk,bk->bn"), (N, K), 1),
    "Einsum ellipsis": (node("Einsum", "x w", "y", equation="...k,...kn->...n"), (2, K, N), 1),
    "LSTM": (node("LSTM", "x w r", "y"), (1, 4 * N, K), 2),
    "LSTM recurrence": (node("LSTM", "x r w", "y"), (1, 4 * K, K), 2),
    "GRU": (node("GRU", "x w r", "y"), (2, 3 * N, K), 2),
    "RNN": (node("RNN", "x w r", "y"), (1, N, K), 2),
    "FusedMatMul": (ms("FusedMatMul", "x w"), (K, N), 0),
    "FusedMatMul transB": (ms("FusedMatMul", "x w", transB=1), (N, K), 1),
    "FusedMatMul transA": (ms("FusedMatMul", "w x", transA=1), (K, N), 0),
    "FusedMatMul transBatchB": (ms("FusedMatMul", "x w", transBatchB=1), (K, 2, N), 0),
    "FusedGemm": (ms("FusedGemm", "x w", transB=1), (N, K), 1),
    "GemmFloat8": (ms("GemmFloat8", "x w", transB=1), (N, K), 1),
    "Attention": (ms("Attention", "x w"), (K, 3 * N), 0),
    "QAttention": (ms("QAttention", "x w x s s"), (K, 3 * N), 0),
    "FusedConv": (ms("FusedConv", "x w"), (16, 8, 3, 3), 1),
    "NhwcConv": (ms("NhwcConv", "x w"), (16, 8, 3, 3), 1),
    "QLinearConv of Microsoft": (ms("QLinearConv", "x s s w s s s s"), (16, 8, 3, 3), 1),
    "DynamicQuantizeMatMul": (ms("DynamicQuantizeMatMul", "x w s"), (K, N), 0),
    "MatMulIntegerToFloat": (ms("MatMulIntegerToFloat", "x w s s"), (K, N), 0),
    "QGemm": (ms("QGemm", "x s s w s s", transB=1), (N, K), 1),
    "DynamicQuantizeLSTM": (ms("DynamicQuantizeLSTM", "x w r"), (1, K, 4 * N), 1),
}
SCALAR = tensor("s", 0.0)


@pytest.mark.parametrize("reader, shape, axis", READERS.values(), ids=READERS.keys())
def test_every_reader_is_judged_along_the_axis_of_its_definition(tmp_path, reader, shape, axis):
    file = saved(tmp_path, [reader], [tensor("w", weight(*shape, axis=axis)), SCALAR])
    report = verify_onnx(file, expect=["w"])
    assert report.ok and report.checked == 1 and not report.not_followed, report.summary()
    assert report.checks[0].axis == axis and report.checks[0].tensor == "w"
    other = next(i for i, size in enumerate(shape) if i != axis and size % 4 == 0)
    wrong = saved(tmp_path, [reader], [tensor("w", weight(*shape, axis=other)), SCALAR])
    report = verify_onnx(wrong)
    assert not report.ok and f"2:4 along axis {other}" in report.summary()
    assert "the pattern lies along the wrong axis" in report.summary()
    report = verify_onnx(saved(tmp_path, [reader], [tensor("w", dense(*shape)), SCALAR]))
    assert report.checks[0].skipped == "dense" and "Nothing in" in report.summary()


GOOD = [node("MatMul", "x g", "h")]
# name -> (nodes that read `w`, shape of `w`, the words of its row)
NOT_FOLLOWED = {
    "Einsum of two letters": (
        [node("Einsum", "h w", "y", equation="bhd,hdk->bk")],
        (4, 8, N),
        "reduces not one",
    ),
    "Einsum that does not say what it reads": (
        [node("Einsum", "h w", "y", equation="bk->bk")],
        (K, N),
        "reduces not one",
    ),
    "MatMulNBits": ([ms("MatMulNBits", "h w s")], (N, 2, 16), "read by com.microsoft.MatMulNBits"),
    "MoE": ([ms("MoE", "h h w")], (4, N, K), "read by com.microsoft.MoE"),
    "nchwc": (
        [node("Conv", "h w", "y", domain="com.microsoft.nchwc")],
        (16, 16, 3, 3),
        "read by com.microsoft.nchwc.Conv",
    ),
    "another domain": ([node("Linear", "h w", "y", domain="mine")], (K, N), "read by mine.Linear"),
    "an operator that is not known": ([node("MatMul4", "h w", "y")], (K, N), "read by MatMul4"),
    "computed index, unknown rank": (
        [node("NonZero", "x", "i"), node("Gather", "w i", "t"), node("MatMul", "h t", "y")],
        (3, K, N),
        "Gather with a computed index",
    ),
    "computed index, another layout": (
        [
            node("NonZero", "x", "i"),
            node("Gather", "w i", "u"),
            node("Transpose", "u", "v"),
            node("Cast", "v", "t", to=1),
            node("MatMul", "h t", "y"),
        ],
        (3, K, N),
        "Gather with a computed index",
    ),
    "a shape of run time behind what is not followed": (
        [node("Relu", "w", "u"), node("Reshape", "u x", "t"), node("MatMul", "h t", "y")],
        (K, N),
        "passes through Relu",
    ),
    "a scale of run time behind what is not followed": (
        [
            node("Relu", "w", "u"),
            node("Reshape", "h n", "m"),
            node("Mul", "m u", "t"),
            node("MatMul", "h t", "y"),
        ],
        (K, N),
        "passes through Relu",
    ),
    "a kernel that is modulated at run time": (
        [node("Mul", "w h", "u"), node("Reshape", "u x", "t"), node("Conv", "h t", "y")],
        (16, 16, 3, 3),
        "scaled by 'h'",
    ),
    "values that are written into it": (
        [node("Reshape", "x n", "m"), node("Max", "w m", "t"), node("MatMul", "h t", "y")],
        (K, N),
        "passes through Max",
    ),
    "a computed change": (
        [
            node("MatMul", "x g", "a"),
            node("Reshape", "a n", "m"),
            node("Add", "w m", "t"),
            node("MatMul", "h t", "y"),
        ],
        (K, N),
        "passes through Add",
    ),
    "a zero point that is computed": (
        [node("DequantizeLinear", "w s x", "t"), node("MatMul", "h t", "y")],
        (K, N),
        "zero point 'x' is not a stored constant",
    ),
    "a loop that changes it": (
        [
            helper.make_node(
                "Loop",
                ["n", "", "w"],
                ["y"],
                body=helper.make_graph(
                    [node("MatMul", "h v", "o"), node("Tanh", "v", "v2")],
                    "b",
                    [helper.make_tensor_value_info(name, 1, None) for name in "icv"],
                    [helper.make_tensor_value_info(name, 1, None) for name in ("c", "v2", "o")],
                ),
            )
        ],
        (K, N),
        "carried from step to step",
    ),
}


@pytest.mark.parametrize("nodes, shape, words", NOT_FOLLOWED.values(), ids=NOT_FOLLOWED.keys())
def test_what_is_not_followed_has_a_row_is_counted_and_fails_when_expected(
    tmp_path, nodes, shape, words
):
    stored = [tensor("g", weight(K, K, axis=0)), tensor("w", dense(*shape)), SCALAR, ints("n", 1)]
    file = saved(tmp_path, [*GOOD, *nodes], stored)
    report = verify_onnx(file)
    row = {check.tensor: check for check in report.checks}["w"]
    assert report.ok and row.skipped.startswith("not followed: ") and words in row.skipped
    assert report.not_followed == 1 and ", 1 not followed" in report.summary()
    assert report.to_json()["not_followed"] == 1
    strict = report.strict()
    assert not strict.ok and "'w'" in strict.failures()[0] and words in strict.failures()[0]
    expected = verify_onnx(file, expect=["w"])
    assert not expected.ok and expected.failed == 1
    assert any(words in line for line in expected.failures())
    alone = saved(tmp_path, [step for step in nodes if step.output[0] != "h"], stored[1:])
    report = verify_onnx(alone)
    assert not report.ok and "Nothing in" not in report.summary()
    assert "1 weights of" in report.summary() and "could not be followed" in report.summary()


W = weight(K, N, axis=0)
# name -> (nodes from `w` to `t`, the stored tensor, its axis, other tensors)
WAYS = {
    "Unsqueeze": ([node("Unsqueeze", "w a", "t")], W, 0, [ints("a", 0)]),
    "Unsqueeze by attribute": ([node("Unsqueeze", "w", "t", axes=[0])], W, 0, []),
    "Squeeze": ([node("Squeeze", "w a", "t")], W[None], 1, [ints("a", 0)]),
    "Squeeze of all": ([node("Squeeze", "w", "t")], W[:, None], 0, []),
    "Flatten": ([node("Flatten", "w", "t")], W.reshape(K, 4, 8), 0, []),
    "Neg, CastLike": ([node("Neg", "w", "n"), node("CastLike", "n x", "t")], W, 0, []),
    "Dropout": ([node("Dropout", "w", "t")], W, 0, []),
    "Slice of the outputs": (
        [node("Slice", "w b e a", "t")],
        np.concatenate([dense(K, 8), W], 1),
        0,
        [ints("b", 8), ints("e", 1 << 40), ints("a", 1)],
    ),
    "Slice of the inputs": (
        [node("Slice", "w b e", "t")],
        np.concatenate([dense(2, N), W, dense(2, N)]),
        0,
        [ints("b", 2), ints("e", -2)],
    ),
    "Gather of a stack": (
        [node("Gather", "w i", "t")],
        np.stack([dense(K, N), W]),
        1,
        [ints("i", 1)],
    ),
    "Gather of outputs": (
        [node("Gather", "w i", "t", axis=1)],
        np.concatenate([dense(K, 1), W], 1),
        0,
        [ints("i", *range(N, 0, -1))],
    ),
    "Expand": ([node("Expand", "w r", "t")], W, 0, [ints("r", 2, 1, 1)]),
    "Reshape by what is computed": (
        [
            node("Shape", "w", "f"),
            node("Concat", "one f", "r", axis=0),
            node("Reshape", "w r", "t"),
        ],
        W,
        0,
        [ints("one", 1)],
    ),
    "Reshape there and back": (
        [node("Reshape", "w r", "a"), node("Mul", "a s", "b"), node("Reshape", "b q", "t")],
        W,
        0,
        [ints("r", 3, 16, N), ints("q", K, N), tensor("s", np.ones((3, 1, N)))],
    ),
    "a scale that is expanded": (
        [node("Expand", "s r", "e"), node("Mul", "w e", "t")],
        W,
        0,
        [tensor("s", 2.0), ints("r", K, N)],
    ),
    "a scale of run time": (
        [node("Reshape", "h n", "m"), node("Mul", "m w", "t")],
        W,
        0,
        [ints("n", 1)],
    ),
    "a Sequence": (
        [node("SequenceConstruct", "w", "q"), node("SequenceAt", "q i", "t")],
        W,
        0,
        [ints("i", 0)],
    ),
    "DQ of Microsoft": ([ms("DequantizeLinear", "w s", "t")], W, 0, [tensor("s", 2.0)]),
}


@pytest.mark.parametrize("nodes, stored, axis, more", WAYS.values(), ids=WAYS.keys())
def test_what_keeps_zeros_in_place_is_followed(tmp_path, nodes, stored, axis, more):
    good = tensor("g", weight(K, K, axis=0))
    nodes = [*GOOD, *nodes, node("MatMul", "h t", "y")]
    report = verify_onnx(saved(tmp_path, nodes, [good, tensor("w", stored), *more]), expect=["w"])
    assert report.ok and report.checked == 2 and not report.not_followed, report.failures()
    row = {check.tensor: check for check in report.checks}["w"]
    assert row.axis == axis and row.groups == K * N // 4
    full = dense(*stored.shape)
    report = verify_onnx(saved(tmp_path, nodes, [good, tensor("w", full), *more]))
    assert report.ok and report.checked == 1
    assert {check.tensor: check.skipped for check in report.checks}["w"] == "dense"


def test_a_bad_group_of_a_part_is_named_where_it_is_stored(tmp_path):
    stored = np.concatenate([dense(2, N), W])
    stored[10:14, 5] = 1
    nodes = [node("Slice", "w b e", "t"), node("MatMul", "x t", "y")]
    report = verify_onnx(
        saved(tmp_path, nodes, [tensor("w", stored), ints("b", 2), ints("e", K + 2)])
    )
    assert report.checks[0].bad == 1 and report.checks[0].first_bad == (10, 5)
    stored_bytes = stored.astype(np.float32).tobytes()
    assert report.checks[0].sha256 == hashlib.sha256(stored_bytes).hexdigest()


def test_a_part_that_many_nodes_read_is_read_once(tmp_path):
    nodes = []
    for i in range(20):
        nodes += [node("Slice", "w b e", f"t{i}"), node("MatMul", f"x t{i}", f"y{i}")]
    stored = [tensor("w", dense(64, 64)), ints("b", 4), ints("e", 60)]
    report = verify_onnx(saved(tmp_path, nodes, stored))
    assert len(report.checks) == 20 and report.bytes_read == 56 * 64 * 4


def test_parts_of_a_split_and_of_a_concat_are_judged_each_on_its_own(tmp_path):
    fused = np.concatenate([W, dense(K, N)], 1)
    split = helper.make_node("Split", ["w"], ["q", "k"], axis=1, num_outputs=2)
    nodes = [split, node("MatMul", "x q", "a"), node("MatMul", "x k", "b")]
    report = verify_onnx(saved(tmp_path, nodes, [tensor("w", fused)]))
    assert [check.skipped for check in report.checks] == [None, "dense"] and report.ok
    for axis, other in ((1, dense(K, N)), (0, dense(8, N))):
        nodes = [node("Concat", "w v", "c", axis=axis), node("MatMul", "x c", "y")]
        report = verify_onnx(saved(tmp_path, nodes, [tensor("w", W), tensor("v", other)]))
        rows = {check.tensor: check.skipped for check in report.checks}
        assert report.ok and rows == {"w": None, "v": "dense"}
    shifted = [tensor("v", dense(2, N)), tensor("w", W)]
    nodes = [node("Concat", "v w", "c", axis=0), node("MatMul", "x c", "y")]
    report = verify_onnx(saved(tmp_path, nodes, shifted))
    assert "middle of a group" in {check.tensor: check.skipped for check in report.checks}["w"]
    turned = [node("Concat", "w v", "c", axis=0), node("Transpose", "c", "t")]
    stored = [tensor("w", W.T.copy()), tensor("v", dense(N, K))]
    report = verify_onnx(saved(tmp_path, [*turned, node("MatMul", "x t", "y")], stored))
    assert [(check.axis, check.skipped) for check in report.checks] == [(1, None), (1, "dense")]


def test_weights_that_an_if_or_a_loop_hands_out_are_followed(tmp_path):
    def gives(name, stored):
        out = helper.make_tensor_value_info(f"{name}_out", 1, None)
        return helper.make_graph(
            [node("Identity", name, f"{name}_out")], name, [], [out], [tensor(name, stored)]
        )

    branch = node("If", "x", "t", then_branch=gives("w", W), else_branch=gives("v", dense(K, N)))
    report = verify_onnx(saved(tmp_path, [branch, node("MatMul", "x t", "y")], []))
    assert {check.tensor: check.skipped for check in report.checks} == {"w": None, "v": "dense"}
    body = helper.make_graph(
        [node("Gather", "w i", "t"), node("MatMul", "s t", "o"), node("Identity", "c", "d")],
        "b",
        [
            helper.make_tensor_value_info("i", 7, []),
            helper.make_tensor_value_info("c", 9, []),
            helper.make_tensor_value_info("s", 1, None),
        ],
        [helper.make_tensor_value_info(name, 1, None) for name in ("d", "o")],
    )
    stack = np.stack([weight(K, K, axis=0)] * 3)
    loop = helper.make_node("Loop", ["n", "", "x"], ["y"], body=body)
    report = verify_onnx(saved(tmp_path, [loop], [tensor("w", stack), ints("n", 3)]))
    assert report.ok and report.checks[0].axis == 1 and report.checks[0].groups == 3 * K * K // 4


def test_tables_masks_and_scales_of_activations_are_no_weights(tmp_path):
    table = dense(9, K)
    nodes = [
        node("Gather", "e x", "a"),
        node("Add", "a p", "b"),
        node("Mul", "b p", "c"),
        ms("SkipLayerNormalization", "c p", "d"),
        node("Einsum", "d p", "f", equation="bsd,sd->bsd"),
        ms("RotaryEmbedding", "f i p p", "r"),
        node("MatMul", "r w", "y"),
    ]
    stored = [tensor("e", table), tensor("p", table), tensor("w", W), ints("i", 0)]
    graph = OnnxGraph(saved(tmp_path, nodes, stored))
    assert [use.tensor for use in graph.uses] == ["w"] and not graph.untraced


def test_joining_again_and_again_ends(tmp_path):
    """Each doubles what the one before it made."""
    for axes in ((0,), (0, 1)):
        chain = [
            node("Concat", f"w{i} w{i}", f"w{i + 1}", axis=axes[i % len(axes)]) for i in range(60)
        ]
        file = saved(tmp_path, [*chain, node("MatMul", "x w60", "y")], [tensor("w0", W)])
        report = verify_onnx(file)
        assert "joined to too many" in report.checks[0].skipped


# --- zero points ---

CODES = np.rint(W * 20)


def quantised(folder, codes, zero, kind="U8", op="DequantizeLinear", extra=(), more=()):
    """`w` with the zero point `z`, beside a sparse weight."""
    stored = [tensor("g", weight(K, K, axis=0)), tensor("w", codes, kind), tensor("s", 1.0)]
    if zero is not None:
        stored.append(tensor("z", zero, kind))
    read = {
        "DequantizeLinear": [node("DequantizeLinear", "w s z", "t"), node("MatMul", "h t", "y")],
        "MatMulInteger": [node("MatMulInteger", "h w  z".replace("  ", " x "), "y")],
        "QLinearMatMul": [node("QLinearMatMul", "h s x w s z s x", "y")],
        "DynamicQuantizeMatMul": [ms("DynamicQuantizeMatMul", "h w s z")],
        "Sub": [
            node("Cast", "w", "c", to=1),
            node("Sub", "c z", "u"),
            node("Mul", "u s", "v"),
            node("MatMul", "h v", "y"),
        ],
    }[op]
    return verify_onnx(saved(folder, [*GOOD, *extra, *read], [*stored, *more]))


@pytest.mark.parametrize(
    "op", ["DequantizeLinear", "MatMulInteger", "QLinearMatMul", "DynamicQuantizeMatMul", "Sub"]
)
@pytest.mark.parametrize("zero", [128, np.full(N, 128)], ids=["tensor", "channel"])
def test_codes_are_judged_minus_their_zero_point(tmp_path, op, zero):
    codes = np.rint(dense(K, N) * 20) + 128
    report = quantised(tmp_path, codes, zero, op=op)
    rows = {check.tensor: check for check in report.checks}
    assert report.ok and rows["w"].skipped == "dense", report.failures()
    report = quantised(tmp_path, CODES + 128, zero, op=op)
    assert not report.ok and "2:4 in real values" in report.failures()[0]
    assert "lost in the stored integers" in report.failures()[0]
    report = quantised(tmp_path, CODES, np.zeros_like(zero), "I8", op=op)
    assert report.ok and report.checked == 2


@pytest.mark.parametrize(
    "extra, more",
    [
        ([node("ConstantOfShape", "n", "z", value=tensor("", [128], "U8"))], [ints("n", N)]),
        ([node("Expand", "o n", "z")], [tensor("o", 128, "U8"), ints("n", N)]),
        ([node("Cast", "o", "c8", to=2), node("Identity", "c8", "z")], [tensor("o", 128.0)]),
        (
            [node("Sub", "o q", "z")],
            [tensor("o", np.full(N, 130), "U8"), tensor("q", np.full(N, 2), "U8")],
        ),
    ],
    ids=["ConstantOfShape", "Expand", "Cast, Identity", "Sub"],
)
def test_zero_points_that_are_computed_from_constants_are_folded(tmp_path, extra, more):
    codes = np.rint(dense(K, N) * 20) + 128
    report = quantised(tmp_path, codes, None, extra=extra, more=more)
    assert report.ok and not report.not_followed
    assert {check.tensor: check.skipped for check in report.checks}["w"] == "dense"
    report = quantised(tmp_path, CODES + 128, None, extra=extra, more=more)
    assert "lost in the stored integers" in report.failures()[0]


def test_a_fold_that_would_be_large_is_left_alone(tmp_path):
    nodes = [
        node("ConstantOfShape", "n", "big", value=tensor("", [128], "U8")),
        node("Add", "big big", "z"),
        node("DequantizeLinear", "w s z", "t"),
        node("MatMul", "x t", "y"),
    ]
    stored = [tensor("w", CODES, "I8"), tensor("s", 1.0), ints("n", 1 << 30, 1 << 20)]
    assert not verify_onnx(saved(tmp_path, nodes, stored)).ok
