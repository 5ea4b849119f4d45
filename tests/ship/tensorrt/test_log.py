"""Build logs and inspector output of every wording, and the names that tell a sparse kernel from a
dense one."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.ship.tensorrt.log import (
    hides_nodes,
    is_sparse_kernel,
    layer_nodes,
    layers_in_log,
    nodes_of,
    parse_inspector,
    parse_log,
)
from tests import ROOT

RECORDED = ROOT / "tests/golden/tensorrt"


def text(name: str) -> str:
    return (RECORDED / name).read_text()


def test_wording_of_8():
    (step,) = parse_log(text("trt8.log")).passes
    assert (
        step.eligible.names == ("Conv_235 + Relu_236", "Conv_626", "MatMul_401")
        and step.eligible.count == 3
    )
    assert (
        step.chosen.names == ("Conv_235 + Relu_236",)
        and step.chosen.line == step.eligible.line + 1 == 4
    )
    assert step.chosen.raw.startswith("[03/23/2021") and parse_log(text("trt8.log")).memory == ()


def test_nothing_chosen_is_zero_and_not_missing():
    (step,) = parse_log(text("trt8-none.log")).passes
    assert step.eligible.count == 1 and step.chosen.count == 0 and step.chosen.complete


def test_wording_of_10_and_every_pass_in_its_place():
    log = parse_log(text("trt10.log"))
    assert [(s.eligible.count, s.chosen.count, s.eligible.line) for s in log.passes] == [
        (2, 0, 2),
        (3, 1, 5),
    ]
    assert set(log.names("eligible")) == {
        "node_linear_6_myl0_11",
        "node_linear_13_myl0_22",
        "node_linear_2+node_linear_1+node_linear_myl0_1",
    }
    assert list(log.names("chosen")) == ["node_linear_2+node_linear_1+node_linear_myl0_1"]


def test_counts_without_names_are_not_complete():
    (step,) = parse_log(
        "(Sparsity) Found 39 layer(s) eligible to use sparse tactics\n"
        "(Sparsity) Chose 0 layer(s) using sparse tactics\n"
    ).passes
    assert (step.eligible.count, step.eligible.names, step.eligible.complete) == (39, (), False)
    assert step.chosen.complete


def test_a_list_that_does_not_add_up_names_nobody():
    (step,) = parse_log(
        "(Sparsity) Found 2 layer(s) eligible to use sparse tactics: a, b, c"
    ).passes
    assert step.eligible.names == () and not step.eligible.complete and step.chosen is None


def test_a_choice_without_its_first_line_is_a_pass_of_its_own():
    both = "(Sparsity) Chose 1 layer(s) using sparse tactics: a\n(Sparsity) Chose 1 layer(s) using sparse tactics: b"
    assert [(s.eligible, s.chosen.names) for s in parse_log(both).passes] == [
        (None, ("a",)),
        (None, ("b",)),
    ]


NAMES = st.lists(
    st.text(
        st.characters(codec="ascii", categories=("L", "N"), include_characters="_+. /"), min_size=1
    )
    .map(str.strip)
    .filter(bool),
    max_size=6,
)


@given(st.lists(st.tuples(NAMES, NAMES), max_size=4))
def test_what_is_written_in_either_wording_is_read_back(passes):
    old = [
        (
            "(Sparsity) Layers eligible for sparse math: ",
            "(Sparsity) TRT inference plan picked sparse implementation for layers: ",
        )
    ] * len(passes)
    new = [
        (
            f"(Sparsity) Found {len(a)} layer(s) eligible to use sparse tactics: ",
            f"(Sparsity) Chose {len(b)} layer(s) using sparse tactics: ",
        )
        for a, b in passes
    ]
    for heads in (old, new):
        lines = [
            line
            for (one, two), (a, b) in zip(heads, passes)
            for line in (one + ", ".join(a), "[V] noise", two + ", ".join(b))
        ]
        found = parse_log("\n".join(lines)).passes
        assert [(s.eligible.names, s.chosen.names) for s in found] == [
            (tuple(a), tuple(b)) for a, b in passes
        ]


def test_every_wording_of_lost_memory_is_found():
    lines = [line for line in text("memory.log").splitlines() if "Try decreasing" not in line]
    assert parse_log(text("memory.log")).memory == tuple(line.strip() for line in lines)


@pytest.mark.parametrize(
    "line",
    [
        "[I] [MemUsageChange] Init CUDA: CPU +0, GPU +0, now: CPU 1831, GPU 3621 (MiB)",
        "[V] Total Scratch Memory: 213995520",
        "[I] Total Weights Memory: 180864 bytes",
        "[V] Tactic: 0x3f3 Time: 0.01",
        "[W] CUDA lazy loading is not enabled.",
    ],
)
def test_ordinary_lines_about_memory_are_no_failure(line):
    assert parse_log(line).memory == ()


def test_errors_are_collected():
    found = parse_log(
        "[V] [E] no\n[E] one\n[F] two\n[09/16/2022-09:55:37] [E] [TRT] three\n[W] four"
    ).errors
    assert found == ("one", "two", "three")


@pytest.mark.parametrize(
    "name",
    [
        "sm80_xmma_fprop_sparse_conv_i8i8_i8i32_f32_nchw_vect_c_32_sptensor16x8x64_g1",
        "sm80_xmma_sparse_gemm_i8i8_i8i32_f32_tn_n_sptensor16x8x64_gelu",
        "sm90_xmma_sparse_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x256x64_warpgroupsize1x1x1_execute_kernel",
        "sm90_xmma_sparse_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x64",
        "cutlass3x_sm100_sptensorop_s128x128x64spgemm_f16_f16_f32_void_f16_128x128x64_align16",
        "sm89_xmma_sparse_gemm_e4m3e4m3_e4m3f32_f32_tn_n_execute_split_k_kernel__5x_cusparselt",
    ],
)
def test_every_family_of_sparse_kernels_is_known(name):
    assert is_sparse_kernel(name) and is_sparse_kernel(name.upper())


@pytest.mark.parametrize(
    "name",
    [
        "",
        "__myelin_CASK_STUB",
        "sparse",
        "gather_sparse_rows_kernel",
        "my_sparse_attention",
        "Sparsity",
        "sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize64x64x64",
        "sm80_xmma_fprop_implicit_gemm_i8i8_i8i32_f32",
        "cutlass3x_sm100_tensorop_s128x128x64gemm_f16",
        "void at::native::vectorized_elementwise_kernel<4, sparse>",
    ],
)
def test_other_names_are_not_sparse_kernels(name):
    assert not is_sparse_kernel(name)


def test_having_sparse_weights_is_not_running_a_sparse_kernel():
    first, second, third = parse_inspector(text("inspector-conv.json"))
    assert first.has_sparse_weights and first.sparse and first.nodes == ("Conv_235", "Relu_236")
    assert second.has_sparse_weights and not second.sparse
    assert third.has_sparse_weights is None and not third.sparse, (
        "a layer's name is not its kernel's"
    )


def test_compiler_layers_have_tactic_names_only():
    merged, fusion, dense = parse_inspector(text("inspector-compiler.json"))
    assert merged.sparse and merged.nodes == ("node_linear_2", "node_linear_1", "node_linear")
    assert fusion.tactic == "" and not fusion.sparse and not dense.sparse
    assert all(layer.has_sparse_weights is None for layer in (merged, fusion, dense))


def test_an_engine_without_detail_names_its_layers():
    first, second = parse_inspector(text("inspector-names.json"))
    assert first.name == "node_linear_6_myl0_11" and not first.tactic and not second.nodes
    assert layer_nodes(first, {"node_linear_6"}) == ("node_linear_6",)


@pytest.mark.parametrize(
    "bad", ["", "[]", "{}", '{"Layers": 3}', '{"Layers": [{}]}', '{"Layers": [7]}', '{"Layers": [']
)
def test_anything_else_is_one_sentence(bad):
    with pytest.raises(UsageError, match="not the JSON of an engine inspector"):
        parse_inspector(bad)


def test_the_layer_list_of_a_build_log():
    found = layers_in_log(text("rtx-layers.txt"))
    assert [(layer.kind, layer.nodes) for layer in found] == [
        ("gemm", ("node_linear_2", "node_linear_1", "node_linear")),
        ("runtime_fusion", ("node_linear_3", "node_add_402")),
        ("gemm", ("node_linear_5", "node_linear_4")),
        ("gemm", ("node_linear_6",)),
    ]
    assert [layer.tactic for layer in found] == [
        "__myelin_CASK_STUB",
        "",
        "__myelin_CASK_STUB",
        "__myelin_CASK_STUB",
    ]


KNOWN = {
    "node_linear",
    "node_linear_1",
    "node_linear_2",
    "node_linear_3",
    "Conv_235",
    "a[0]",
    "x.y",
}


@pytest.mark.parametrize(
    "name,nodes",
    [
        ("node_linear_1", ("node_linear_1",)),
        (
            "node_linear_2+node_linear_1+node_linear_myl0_1",
            ("node_linear_2", "node_linear_1", "node_linear"),
        ),
        ("Conv_235 + Relu_236", ("Conv_235",)),
        ("Conv_235 + Relu_236 [profile 1]", ("Conv_235",)),
        ("__myl_FcAdd_myl0_7", ("node_linear_3",)),
        ("{ForeignNode[node_linear...node_linear_3]}", ()),
        ("node_linear_", ()),
        ("Conv_235 + relu || node_linear + relu_b", ("Conv_235", "node_linear")),
        ("Conv_235 + PWN(PWN(sigmoid), node_linear)", ("Conv_235", "node_linear")),
        ("Conv_235 + {ForeignNode[node_linear...x.y]}", ("Conv_235",)),
    ],
)
def test_a_name_means_the_nodes_it_says_and_no_others(name, nodes):
    assert nodes_of(name, parse_inspector(text("inspector-compiler.json")), KNOWN) == nodes


def test_node_names_with_brackets_survive_metadata():
    listed = {
        "Layers": [
            {"Name": "n", "Metadata": "[ONNX Layer: a[0]]\x1e[ONNX Layer: x.y][ONNX Layer: b]"}
        ]
    }
    assert parse_inspector(json.dumps(listed))[0].nodes == ("a[0]", "x.y", "b")


def test_horizontal_fusion_names_both_nodes():
    log = parse_log(text("horizontal-fusion.log"))
    for kind in ("eligible", "chosen"):
        (name,) = log.names(kind)
        assert nodes_of(name, [], {"conv_a", "conv_b"}) == ("conv_a", "conv_b")


def test_a_name_with_commas_is_one_name():
    line = "(Sparsity) Layers eligible for sparse math: a + PWN(b, c), {ForeignNode[d...e]}, f"
    (listed,) = parse_log(line).lines("eligible")
    assert listed.names == ("a + PWN(b, c)", "{ForeignNode[d...e]}", "f")
    assert [hides_nodes(name) for name in listed.names] == [False, True, False]
