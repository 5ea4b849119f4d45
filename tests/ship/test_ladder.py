"""The ladder of evidence: what each source proves, why a layer stops, and that nothing is ever
claimed without proof."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmsparse_deploy.prove import TensorCheck
from nmsparse_deploy.ship.evidence import LEVELS
from nmsparse_deploy.ship.ladder import Sources, climb
from nmsparse_deploy.ship.onnx.gemms import Gemm
from nmsparse_deploy.ship.tensorrt.log import EngineLayer, parse_log

SPARSE = "sm90_xmma_sparse_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64"
DENSE = "sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize64x64x64"
Q, K, V, UP, DOWN = GEMMS = tuple(
    Gemm(node, f"{node}.weight", f"w_{node}", 64, 32, "F16", reads, flops)
    for node, reads, flops in (
        ("q", "x", 100),
        ("k", "x", 50),
        ("v", "x", 50),
        ("up", "y", 400),
        ("down", "z", 400),
    )
)
MERGED = EngineLayer("q+k+v_myl0_1", "gemm", SPARSE, ("q", "k", "v"), "{raw of qkv}")
UP_LAYER = EngineLayer("up_myl0_2", "gemm", DENSE, ("up",), "{raw of up}")
DOWN_LAYER = EngineLayer("down_myl0_3", "gemm", SPARSE + "_gelu", ("down", "add"), "{raw of down}")
LAYERS = (MERGED, UP_LAYER, DOWN_LAYER)
LOG = parse_log(
    "(Sparsity) Found 3 layer(s) eligible to use sparse tactics: q+k+v_myl0_1, up_myl0_2, down_myl0_3\n"
    "(Sparsity) Chose 2 layer(s) using sparse tactics: q+k+v_myl0_1, down_myl0_3"
)
KERNELS = {
    SPARSE + "_execute_kernel": 1,
    SPARSE + "_gelu_execute_kernel": 1,
    DENSE + "_execute": 1,
    "elementwise": 9,
}
COUNTERS = {
    SPARSE + "_execute_kernel": {"hgmma_sparsity_on": 12.0, "hgmma_sparsity_off": 0.0},
    SPARSE + "_gelu_execute_kernel": {"hgmma_sparsity_on": 0.0, "hgmma_sparsity_off": 5.0},
}


def check(gemm: Gemm, **changes) -> TensorCheck:
    row = TensorCheck(
        "onnx",
        gemm.tensor,
        "F16",
        (gemm.k, gemm.n),
        "2:4",
        0,
        gemm.parameter,
        gemm.node,
        groups=512,
        sha256="beef",
    )
    return replace(row, **changes)


FULL = Sources({gemm.node: check(gemm) for gemm in GEMMS}, True, LOG, LAYERS, KERNELS, COUNTERS)


def evidence(sources: Sources = FULL, gemms=GEMMS):
    found = climb("e.engine", "m.onnx", gemms, sources)
    json.dumps(found.to_json(), allow_nan=False)
    return found, {layer.node: layer for layer in found.layers}


def test_every_rung_has_its_raw_text():
    found, by = evidence()
    assert [by[node].level for node in ("q", "k", "v", "up", "down")] == ["counted"] * 3 + [
        "eligible",
        "observed",
    ]
    assert by["q"].proofs["pattern"] == "w_q: 512 groups of 2:4 along axis 0, 0 bad, sha256 beef"
    assert by["q"].proofs["shape"] == "64 x 96 (3 merged): recommended"
    assert (
        by["v"].proofs["eligible"].startswith("(Sparsity) Found 3")
        and by["v"].proofs["tactic"] == "{raw of qkv}"
    )
    assert by["q"].proofs["observed"] == f"{SPARSE}_execute_kernel ran 1 times"
    assert by["q"].proofs["counted"] == "hgmma_sparsity_on = 12; hgmma_sparsity_off = 0"
    assert (by["q"].reason, by["q"].why_not) == (None, "") and by["q"].merged_with == ("k", "v")
    assert by["up"].reason == "dense was faster" and "counters show no sparse" in by["down"].why_not
    assert found.flop_basis == "input shapes" and not found.problems and not found.unplaced


def test_counts_and_shares_of_flops():
    found, _ = evidence()
    assert [found.count(level) for level in LEVELS] == [5, 5, 5, 4, 4, 4, 3]
    assert [found.share(level) for level in ("pattern", "chosen", "counted")] == [1.0, 0.6, 0.2]
    assert (
        found.verdict
        == "3 of 5 GEMMs (20% of their FLOPs) issued sparse instructions, as counted by the hardware."
    )
    seen = evidence(replace(FULL, counters=None))[0]
    assert seen.verdict == "4 of 5 GEMMs (60% of their FLOPs) ran on sparse tensor-core kernels."
    unseen = evidence(replace(FULL, counters=None, kernels=None))[0]
    assert "not watched running" in unseen.verdict and unseen.sparse_seen


@pytest.mark.parametrize("source", ["log", "layers", "kernels", "counters"])
def test_what_nobody_looked_at_is_said(source):
    _, by = evidence(replace(FULL, **{source: None}))
    levels = {
        "log": (),
        "layers": ("tactic", "observed", "counted"),
        "kernels": ("observed", "counted"),
        "counters": ("counted",),
    }[source]
    assert not any(level in layer.proofs for layer in by.values() for level in levels)
    if levels:
        assert by["q"].reason == "not checked"


def test_without_a_sparse_kernel_speed_is_not_due_to_sparsity():
    dense = [replace(layer, tactic=DENSE) for layer in LAYERS]
    found, by = evidence(replace(FULL, layers=dense, kernels={DENSE: 3}))
    assert not found.sparse_seen and "not due to sparse tensor cores" in found.verdict
    assert (
        by["q"].level == "chosen"
        and by["q"].why_not == f"the engine holds the dense kernel {DENSE}"
    )
    assert "5 eligible, 4 chosen" in found.verdict


def test_chosen_in_the_log_alone_is_no_sparse_kernel():
    found, by = evidence(replace(FULL, layers=None, kernels=None, counters=None))
    assert by["q"].level == "chosen" and "not due to sparse tensor cores" in found.verdict


def test_the_twin_without_sparse_weights():
    found, by = evidence(
        replace(
            FULL, sparse_weights=False, log=parse_log(""), layers=(UP_LAYER,), kernels={DENSE: 1}
        )
    )
    assert {layer.reason for layer in by.values()} == {"built without sparse weights"}
    assert "not due to sparse tensor cores" in found.verdict and {
        layer.level for layer in by.values()
    } == {"shape"}


def test_one_dense_member_stops_its_whole_fusion_group():
    checks = {**FULL.checks, "k": check(K, skipped="not in the link map")}
    _, by = evidence(
        replace(FULL, checks=checks, log=parse_log(""), layers=(), kernels={}, counters=None)
    )
    assert by["k"].level is None and by["k"].reason == "not in pattern"
    for node in ("q", "v"):
        assert by[node].level == "pattern" and by[node].reason == "fusion partner dense"
        assert "'k.weight' reads the same tensor" in by[node].why_not
    assert by["up"].level == "shape"


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"problems": ("3 of 512 groups break the pattern",), "bad": 3}, "3 of 512"),
        ({"skipped": "dense"}, "makes no claim: dense"),
        ({"pattern": "4:8"}, "4:8 is not 2:4"),
        ({"pattern": "unstructured:0.5"}, "unstructured:0.5 is not 2:4"),
    ],
)
def test_why_a_weight_is_not_in_the_pattern(changes, words):
    _, by = evidence(replace(FULL, checks={**FULL.checks, "up": check(UP, **changes)}))
    assert (
        by["up"].level is None and by["up"].reason == "not in pattern" and words in by["up"].why_not
    )


@pytest.mark.parametrize("pattern", ["1:4", "2:8", "1:2"])
def test_patterns_that_imply_it_count(pattern):
    _, by = evidence(replace(FULL, checks={**FULL.checks, "up": check(UP, pattern=pattern)}))
    assert pattern in by["up"].proofs["pattern"]


def test_an_unsuitable_shape_stops_at_the_pattern():
    narrow = replace(UP, k=36)
    _, by = evidence(replace(FULL, log=None, layers=None), (*GEMMS[:3], narrow, DOWN))
    assert (
        by["up"].level == "pattern" and by["up"].reason == "shape" and "36 x 32" in by["up"].why_not
    )


def test_not_eligible_is_said_only_when_every_name_is_understood():
    named = parse_log(
        "(Sparsity) Found 1 layer(s) eligible to use sparse tactics: up_myl0_2\n"
        "(Sparsity) Chose 0 layer(s) using sparse tactics"
    )
    dense = replace(FULL, log=named, layers=(UP_LAYER,), kernels=None)
    assert evidence(dense)[1]["down"].reason == "not eligible"
    foreign = parse_log(
        "(Sparsity) Found 1 layer(s) eligible to use sparse tactics: {ForeignNode[q...down]}"
    )
    found, by = evidence(replace(dense, log=foreign))
    assert by["down"].reason == "unknown" and found.unplaced == ("{ForeignNode[q...down]}",)
    counted = parse_log(
        "(Sparsity) Found 39 layer(s) eligible to use sparse tactics\n(Sparsity) Chose 0 layer(s) using "
        "sparse tactics"
    )
    assert evidence(replace(dense, log=counted))[1]["down"].reason == "unknown"


@pytest.mark.parametrize("kind", ["eligible", "chosen"])
@pytest.mark.parametrize(
    "name",
    [
        "{ForeignNode[q...down]}",
        "{ForeignNode[down]}",
        "{q...down}",
        "{up + relu...down}",
        "up + {ForeignNode[q...down]}",
        "{ForeignNode[q...v]} || up",
        "PWN({ForeignNode[q...down]}, up)",
        "up_myl0_2 + {ForeignNode[{q}...down]} [profile 1]",
        "{ForeignNode[q...do",
        "up + {ForeignNode[q...do",
        "up + ForeignNode[q...down]",
        "up + q...down",
    ],
)
def test_a_range_of_nodes_leaves_what_it_does_not_name_unknown(name, kind):
    """Neither "not eligible" nor "dense was faster" is said of a node that may be inside, however
    the engine's own layers are called."""
    other = "eligible" if kind == "chosen" else "chosen"
    words = {
        "eligible": "(Sparsity) Found {} layer(s) eligible to use sparse tactics: {}",
        "chosen": "(Sparsity) Chose {} layer(s) using sparse tactics: {}",
    }
    every = ", ".join(gemm.node for gemm in GEMMS)
    log = parse_log(f"{words[kind].format(1, name)}\n{words[other].format(5, every)}")
    for layers in ((), (EngineLayer(name, "myelin", "", (), "{}"),)):
        found, by = evidence(replace(FULL, log=log, layers=layers, kernels=None, counters=None))
        stops = {layer.reason for layer in by.values() if kind not in layer.proofs}
        assert stops == {"unknown"} and found.unplaced


def test_a_sparse_kernel_of_a_layer_with_two_products_belongs_to_neither():
    both = EngineLayer("__myl_fused_myl0_4", "fusion", SPARSE + "_silu", ("up", "down"), "{}")
    found, by = evidence(replace(FULL, layers=(MERGED, both), kernels=None, counters=None))
    assert by["q"].sparse and not by["up"].sparse and not by["down"].sparse
    assert by["down"].level == "chosen" and "holds several multiplications" in by["down"].why_not
    assert found.unplaced_kernels == 1 and found.unplaced == (SPARSE + "_silu",)


def test_a_hidden_kernel_that_runs_sparse_is_counted_and_given_to_nobody():
    hidden = (EngineLayer("__myl_fused_myl0_4", "runtime_fusion", "", ("up",), "{}"),)
    found, by = evidence(replace(FULL, layers=hidden, kernels={SPARSE: 1}, counters=None))
    assert found.unplaced_kernels == 1 and found.sparse_seen and not by["up"].sparse
    assert "none could be tied" in found.verdict and found.unplaced[-1] == SPARSE


def test_a_kernel_that_ran_less_often_than_its_layers_proves_none_of_them():
    twice = (MERGED, replace(DOWN_LAYER, tactic=SPARSE))
    _, by = evidence(replace(FULL, layers=twice, kernels={SPARSE + "_x": 1}))
    assert (
        by["q"].level == by["down"].level == "tactic"
        and "ran 1 times for 2 layers" in by["q"].why_not
    )
    assert (
        evidence(replace(FULL, layers=twice, kernels={SPARSE + "_x": 2}))[1]["q"].level
        == "observed"
    )


def test_the_longest_tactic_owns_a_kernel():
    """`..._gelu` holds the name of the plain kernel; it must not prove that the plain one ran."""
    _, by = evidence(replace(FULL, kernels={SPARSE + "_gelu_execute": 2}))
    assert by["down"].level == "observed" and by["q"].level == "tactic"


def test_a_sparse_kernel_for_a_dense_weight_is_a_problem():
    found, by = evidence(
        replace(FULL, checks={**FULL.checks, "down": check(DOWN, skipped="dense")})
    )
    assert by["down"].level is None and by["down"].proofs == {} and "'down'" in found.problems[0]


@pytest.mark.parametrize(
    "on,off,counted", [(12, 0, True), (12, 3, False), (0, 0, False), (0, 5, False)]
)
def test_only_sparse_and_no_dense_instructions_count(on, off, counted):
    read = {SPARSE + "_execute_kernel": {"hgmma_sparsity_on": on, "hgmma_sparsity_off": off}}
    _, by = evidence(replace(FULL, counters=read))
    assert ("counted" in by["q"].proofs) == counted and by["down"].reason == "not checked"


def test_unknown_flops_weigh_every_gemm_by_its_size():
    found, by = evidence(FULL, (replace(Q, flops=None), *GEMMS[1:]))
    assert found.flop_basis == "equal rows" and {layer.flops for layer in by.values()} == {
        2 * 64 * 32
    }


PARTS = st.fixed_dictionaries(
    {
        "log": st.sampled_from([None, LOG, parse_log("")]),
        "kernels": st.sampled_from([None, KERNELS, {}]),
        "layers": st.sampled_from([None, LAYERS, LAYERS[:1], ()]),
        "counters": st.sampled_from([None, COUNTERS, {}]),
        "checks": st.sets(st.sampled_from([g.node for g in GEMMS])).map(
            lambda kept: {g.node: check(g) for g in GEMMS if g.node in kept}
        ),
    }
)


@given(PARTS)
def test_taking_sources_away_never_raises_a_claim(parts):
    full, some = evidence()[1], evidence(replace(FULL, **parts))[1]
    for node, layer in some.items():
        assert set(layer.proofs) <= set(full[node].proofs)
        assert ("pattern" in layer.proofs) or not layer.proofs
        assert (layer.reason is None) == (layer.level == "counted")
        for level, part in (
            ("tactic", "layers"),
            ("eligible", "log"),
            ("observed", "kernels"),
            ("counted", "counters"),
        ):
            assert level not in layer.proofs or parts[part]
