"""Weights in several tensors: bits and values are decoded, packed codes are named and not followed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmsparse_deploy.prove import scan, verify_checkpoint
from tests.fixtures.tensor_files import dense, sparse
from tests.prove.test_checkpoint import by_name, saved


def stored(weight, name="l"):
    """A weight as compressed-tensors' sparse-bitmask stores it."""
    kept = (weight != 0).numpy()
    return {
        f"{name}.compressed": weight[weight != 0],
        f"{name}.bitmask": torch.from_numpy(np.packbits(kept, axis=-1, bitorder="little")),
        f"{name}.shape": torch.tensor(weight.shape),
        f"{name}.row_offsets": torch.arange(len(weight)),
    }


def stored24(weight, name="l"):
    parts = stored(weight, name)
    del parts[f"{name}.row_offsets"]
    parts[f"{name}.compressed"] = parts[f"{name}.compressed"].reshape(len(weight), -1)
    return parts


@settings(deadline=None, max_examples=30)
@given(st.integers(20, 60), st.integers(8, 40), st.booleans(), st.sampled_from([64, 1 << 20]))
def test_bits_and_values_are_judged_as_the_weight_is(tmp_path_factory, rows, quads, full, chunk):
    weight = sparse(rows, 4 * quads)[0]
    folder = tmp_path_factory.mktemp("bits")
    before, scan.CHUNK = scan.CHUNK, chunk
    try:
        path = saved(folder, **(stored if full else stored24)(weight))
        (check,) = verify_checkpoint(path, expect=["l"]).checks
        plain = verify_checkpoint(saved(folder, "plain.safetensors", l=weight)).checks[0]
    finally:
        scan.CHUNK = before
    assert check.ok and check.skipped is None and check.axis == 1
    for key in ("shape", "groups", "bad", "sparser", "nonzeros", "dtype", "shape_verdict"):
        assert getattr(check, key) == getattr(plain, key)


def test_a_dense_or_broken_bitmask_is_told(tmp_path):
    good = stored24(sparse(64, 128)[0], "good")
    unstructured = torch.where(
        torch.rand(64, 128, generator=torch.Generator().manual_seed(0)) < 0.5, dense(64, 128), 0.0
    )
    report = verify_checkpoint(saved(tmp_path, **good, **stored(unstructured, "any")))
    assert report.ok and by_name(report)["any"].skipped == "dense"
    stray = sparse(64, 128, seed=1)[0]
    stray[3, :4] = 1.0
    report = verify_checkpoint(saved(tmp_path, **good, **stored(stray, "near")))
    assert report.failed == 1 and by_name(report)["near"].first_bad == (3, 0)
    mixed = torch.cat([sparse(40, 128)[0], dense(24, 128)])
    report = verify_checkpoint(saved(tmp_path, **good, **stored(mixed, "mixed")))
    assert "24 of 64 outputs are dense, the first is output 40" in report.summary()


@pytest.mark.parametrize(
    "part, value, words",
    [
        ("shape", torch.tensor([64, 64]), "does not fit its shape"),
        ("shape", torch.tensor([64]), "does not fit its shape"),
        ("shape", torch.tensor([-64, -128]), "does not fit its shape"),
        ("shape", torch.tensor([1 << 39, 1 << 39]), "does not fit its shape"),
        ("shape", torch.zeros(2), "does not fit its shape"),
        ("shape", torch.zeros(100, dtype=torch.int64), "does not fit its shape"),
        ("bitmask", torch.zeros(64, 16, dtype=torch.int8), "does not fit its shape"),
        ("bitmask", torch.zeros(64, 15, dtype=torch.uint8), "does not fit its shape"),
        ("bitmask", torch.zeros(64, 16, dtype=torch.uint8), "keeps 0 places"),
        ("compressed", torch.ones(64, 63), "4,032 values are stored"),
        ("compressed", torch.full((64, 64), torch.nan), "4,096 values are NaN"),
    ],
)
def test_parts_that_do_not_fit_fail(tmp_path, part, value, words):
    parts = stored24(sparse(64, 128)[0]) | {f"l.{part}": value}
    report = verify_checkpoint(saved(tmp_path, **parts))
    assert not report.ok and words in report.summary()


def test_expect_finds_the_weight_by_any_of_its_names(tmp_path):
    path = saved(tmp_path, **stored24(sparse(64, 128)[0], "a.q_proj"), b=dense(64, 64))
    for glob in ("a.q_proj", "*q_proj.weight", "*.bitmask"):
        assert verify_checkpoint(path, expect=[glob]).ok
    path = saved(tmp_path, **stored(dense(64, 128), "a.q_proj"))
    assert not verify_checkpoint(path, expect=["*q_proj*"]).ok


I32, U8, F16 = torch.int32, torch.uint8, torch.float16
PACKED = {
    "marlin-24": {"l.weight_packed": I32, "l.scale_packed": F16, "l.meta": torch.int16},
    "compressed-tensors packs": {"l.weight_packed": I32, "l.weight_scale": F16},
    "GPTQ": {"l.qweight": I32, "l.qzeros": I32, "l.scales": F16, "l.g_idx": I32},
    "bitsandbytes": {"l.weight": U8, "l.weight.absmax": F16, "l.weight.quant_map": F16},
    "NVFP4": {"l.weight": U8, "l.weight_scale": F16, "l.weight_scale_2": F16},
    "HQQ": {"l.W_q": U8, "l.scale": F16, "l.zero": F16},
    "MXFP4": {"experts.gate_up_proj_blocks": U8, "experts.gate_up_proj_scales": U8},
    "AQLM": {"l.codes": torch.int8, "l.codebooks": F16, "l.scales": F16},
}


@pytest.mark.parametrize("scheme", PACKED)
def test_packed_codes_are_named_and_not_followed(tmp_path, scheme):
    parts = {name: torch.ones(64, 64, dtype=kind) for name, kind in PACKED[scheme].items()}
    report = verify_checkpoint(saved(tmp_path, **parts))
    (check,) = report.checks
    assert check.tensor == next(iter(parts)) and not check.followed
    assert scheme in check.skipped and check.skipped.startswith("not followed: ")
    assert not report.ok and "1 weights were not followed" in report.summary()
    assert "is 2:4 sparse" not in report.summary()
    good = sparse(64, 64)[0]
    assert verify_checkpoint(saved(tmp_path, **parts, good=good)).ok
    report = verify_checkpoint(saved(tmp_path, **parts, good=good), expect=[check.tensor])
    assert "expected to be sparse, but not followed" in report.summary()
    strict = verify_checkpoint(saved(tmp_path, **parts, good=good)).strict()
    assert not strict.ok and f"'{check.tensor}': not followed: " in strict.summary()


def test_plain_weights_with_such_names_are_judged(tmp_path):
    weight = sparse(64, 64)[0]
    parts = {"a.weight": weight, "a.weight_scale_2": torch.ones(1), "lora.B": dense(64, 64)}
    report = verify_checkpoint(saved(tmp_path, **parts, **{"lora.s": torch.ones(1)}))
    assert report.ok and report.checked == 1 and by_name(report)["lora.B"].skipped == "dense"
    codes = (weight * 20).clamp(-127, 127).to(torch.int8)
    parts = {"a.weight": codes, "a.weight_scale": torch.ones(64, 1), "a.weight.SCB": torch.ones(64)}
    assert verify_checkpoint(saved(tmp_path, **parts), expect=["a.weight"]).ok
