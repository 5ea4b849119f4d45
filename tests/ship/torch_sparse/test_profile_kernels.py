"""Kernels by layer: read off a profile's tree, and what they prove."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from nmsparse_deploy.prove import TensorCheck
from nmsparse_deploy.ship.evidence import NOT_SPARSE
from nmsparse_deploy.ship.torch_sparse.profile_kernels import (
    RANGE,
    LayerGemm,
    all_kernels,
    by_layer,
    evidence,
    profile_kernels,
)

SPARSE = "sm90_xmma_sparse_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64_cusparselt"
DENSE = "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT"
CPU, CUDA = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA


def event(name, kernels=(), children=(), device=CPU):
    return SimpleNamespace(
        name=name,
        device_type=device,
        cpu_children=list(children),
        kernels=[SimpleNamespace(name=kernel) for kernel in kernels],
    )


def profile():
    """Two calls of layer a with a nested operation, one of b, something beside them."""
    inner = event("aten::_cslt_sparse_mm", [SPARSE])
    return [
        event(f"{RANGE}a", children=[event("aten::linear", ["pad_kernel"], [inner])]),
        event(f"{RANGE}a", children=[event("op", children=[inner])]),
        event(f"{RANGE}b", [DENSE]),
        event("aten::softmax", ["softmax"]),
        event(SPARSE, device=CUDA),
        event(SPARSE, device=CUDA),
        event(DENSE, device=CUDA),
        event(f"{RANGE}a", device=CUDA),
    ]


def test_a_kernel_belongs_to_the_layer_whose_range_holds_it():
    assert by_layer(profile()) == {"a": {"pad_kernel": 1, SPARSE: 2}, "b": {DENSE: 1}}
    assert all_kernels(profile()) == {SPARSE: 2, DENSE: 1}


def gemm(name, layer, **more) -> LayerGemm:
    return LayerGemm(name, layer, 64, 64, **more)


def check(name, ok=True) -> TensorCheck:
    return TensorCheck(
        "torch",
        name,
        "F16",
        (64, 64),
        "2:4",
        1,
        name,
        groups=1024,
        problems=() if ok else ("1 bad group",),
    )


def climb(gemms, kernels, ran=None):
    found = evidence(
        "arm",
        "torch",
        gemms,
        "fp16",
        {one.layer: 32 for one in gemms},
        {one.parameter: check(one.parameter, one.parameter != "broken") for one in gemms},
        kernels,
        ran,
    )
    return found, {layer.parameter: layer for layer in found.layers}


def test_each_rung_needs_its_own_proof():
    gemms = [
        gemm("a", "a"),
        gemm("b", "b"),
        gemm("broken", "c"),
        gemm("narrow", "d", why_not="too narrow"),
        gemm("slow", "e", kept_dense="sparse is slower"),
    ]
    found, rows = climb(gemms, by_layer(profile()))
    assert {name: (row.level, row.reason) for name, row in rows.items()} == {
        "a": ("observed", "not checked"),
        "b": ("chosen", "unknown"),
        "broken": (None, "not in pattern"),
        "narrow": ("pattern", "shape"),
        "slow": ("eligible", "dense was faster"),
    }
    assert DENSE in rows["b"].why_not and SPARSE in rows["a"].proofs["observed"]
    assert (
        found.share("observed") == 1 / 5
        and "1 of 5 GEMMs (20% of their FLOPs) ran" in found.verdict
    )
    assert rows["a"].flops == 2 * 64 * 64 * 32


def test_nothing_is_claimed_without_a_sparse_kernel():
    unwatched, rows = climb([gemm("a", "a")], None)
    assert (
        rows["a"].level == "chosen"
        and rows["a"].reason == "not checked"
        and NOT_SPARSE in unwatched.verdict
    )
    dense, _ = climb([gemm("b", "b")], by_layer(profile()))
    assert NOT_SPARSE in dense.verdict


def test_a_sparse_kernel_outside_every_layer_is_told_and_proves_no_layer():
    found, rows = climb([gemm("b", "b")], {"b": {DENSE: 1}}, {SPARSE: 4, DENSE: 1})
    assert found.unplaced == (SPARSE,) and rows["b"].level == "chosen"


def test_a_real_profile_has_a_range_for_every_layer_and_leaves_no_hooks():
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    layers, every = profile_kernels(lambda: module(torch.ones(2, 8)), module, ["0", "2"])
    assert set(layers) == {"0", "2"}
    assert every == {} or torch.cuda.is_available()
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())
