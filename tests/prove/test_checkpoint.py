import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.pattern import NMPattern
from nmsparse_deploy.prove import scan, verify_checkpoint
from tests.fixtures.tensor_files import dense, mask_set, plant, row, sparse, write_raw

FLOATS = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def saved(folder, name="model.safetensors", metadata=None, **tensors):
    save_file(
        {key.replace("__", "."): value.contiguous() for key, value in tensors.items()},
        folder / name,
        metadata,
    )
    return folder / name


def by_name(report):
    return {check.tensor: check for check in report.checks}


# --- with masks ---


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_masked_tensors_hold(tmp_path, dtype, axis):
    weight, mask = sparse(32, 24, axis=axis, dtype=dtype)
    path = saved(tmp_path, a__weight=weight, norm=torch.ones(7))
    report = verify_checkpoint(path, mask_set(a__weight=mask))
    assert report.ok and report.checked == 1
    assert by_name(report)["a.weight"].mask_mismatch == 0
    assert by_name(report)["norm"].skipped == "not in the mask set"


def test_a_missing_masked_tensor_fails(tmp_path):
    weight, mask = sparse(32, 24)
    report = verify_checkpoint(saved(tmp_path, a=weight), mask_set(a=mask, b=mask))
    assert not report.ok and "no tensor 'b'" in report.summary()
    assert not verify_checkpoint(saved(tmp_path, a=weight), MaskSet({})).ok


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 3 * 5 * 24 - 1),
    st.sampled_from([0, 1, 2]),
    st.sampled_from([NMPattern(2, 4), NMPattern(2, 3)]),
)
def test_any_single_value_outside_the_mask_is_found(tmp_path_factory, place, axis, pattern):
    shape = [3, 5, 24] if axis == 2 else [3, 24, 5] if axis == 1 else [24, 3, 5]
    weight, mask = sparse(*shape, axis=axis, pattern=pattern)
    at = tuple(int(i) for i in np.unravel_index(place, shape))
    pruned = not mask.unpack()[at]
    path = saved(tmp_path_factory.mktemp("one"), w=plant(weight, at))
    check = by_name(verify_checkpoint(path, mask_set(w=mask)))["w"]
    assert check.mask_mismatch == check.bad == int(pruned)
    assert check.ok is not pruned
    if pruned:
        assert check.first_bad == tuple(
            n - n % pattern.group if i == axis else n for i, n in enumerate(at)
        )


def test_a_tensor_of_many_chunks_is_checked_to_its_last_value(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "CHUNK", 64)
    weight, mask = sparse(40, 24, pattern=NMPattern(2, 3))
    assert verify_checkpoint(saved(tmp_path, w=weight), mask_set(w=mask)).ok
    at = tuple(torch.nonzero(~mask.unpack())[-1].tolist())
    check = verify_checkpoint(saved(tmp_path, w=plant(weight, at)), mask_set(w=mask)).checks[0]
    assert check.mask_mismatch == 1 and check.first_bad == (at[0], at[1] - at[1] % 3)


def test_minus_zero_nan_and_wrong_shapes_fail_under_a_mask(tmp_path):
    weight, mask = sparse(32, 24)
    keep = mask.unpack()
    for broken, word in (
        (torch.where(keep, weight, -0.0), "minus zero"),
        (torch.where(keep, torch.inf, 0.0), "NaN"),
        (weight.T, "shape"),
    ):
        report = verify_checkpoint(saved(tmp_path, w=broken), mask_set(w=mask))
        assert not report.ok and word in report.summary()


def test_a_masked_tensor_of_an_unreadable_type_fails(tmp_path):
    _, mask = sparse(4, 8)
    path = write_raw(tmp_path / "a.safetensors", {"w": row("F8_E8M0", [4, 8], 0, 32)}, bytes(32))
    report = verify_checkpoint(path, mask_set(w=mask))
    assert not report.ok and "F8_E8M0" in report.summary()


# --- without masks ---


@pytest.mark.parametrize(
    "shape, axis",
    [
        ((32, 64), 1),
        ((32, 64), 0),
        ((2, 32, 64), 2),
        ((2, 32, 64), 1),
        ((32, 16, 3, 3), 1),
        ((48, 50), 0),
    ],
)
def test_the_sparse_axis_is_found(tmp_path, shape, axis):
    weight, _ = sparse(*shape, axis=axis, dtype=torch.bfloat16)
    outputs = [size for i, size in enumerate(shape[:3]) if i != axis]
    bias = torch.zeros(outputs if len(shape) < 4 else shape[0])
    report = verify_checkpoint(
        saved(tmp_path, w=weight, w_bias=bias, embedding=dense(100, 64), bias=torch.zeros(64))
    )
    assert report.ok and report.checked == 1, report.summary()
    assert by_name(report)["w"].axis == axis
    assert by_name(report)["w"].groups == math.prod(shape) // 4
    assert by_name(report)["embedding"].skipped == "dense"
    assert by_name(report)["bias"].skipped == "not a weight matrix"


@pytest.mark.parametrize(
    "pattern", [NMPattern(1, 4), NMPattern(4, 8), NMPattern(2, 8), NMPattern(1, 2)], ids=str
)
def test_other_patterns_without_masks(tmp_path, pattern):
    weight, _ = sparse(64, 64, pattern=pattern)
    assert verify_checkpoint(saved(tmp_path, w=weight), pattern=pattern).ok
    assert not verify_checkpoint(saved(tmp_path, w=dense(64, 64)), pattern=pattern).ok


def test_a_4_8_checkpoint_is_not_a_2_4_checkpoint(tmp_path):
    weight, _ = sparse(64, 64, pattern=NMPattern(4, 8))
    assert not verify_checkpoint(saved(tmp_path, w=weight)).ok


def test_a_near_miss_fails_and_names_the_place(tmp_path):
    good, _ = sparse(64, 64)
    near, mask = sparse(64, 64, seed=5)
    at = tuple(torch.nonzero(~mask.unpack())[77].tolist())
    report = verify_checkpoint(saved(tmp_path, good=good, near=plant(near, at)))
    assert not report.ok and report.failed == 1
    assert by_name(report)["near"].first_bad == (at[0], at[1] - at[1] % 4)


def test_a_near_miss_after_the_first_chunk_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "CHUNK", 1024)
    weight, mask = sparse(64, 64)
    at = tuple(torch.nonzero(~mask.unpack())[-1].tolist())
    report = verify_checkpoint(saved(tmp_path, w=plant(weight, at)))
    assert report.failed == 1 and report.checks[0].bad == 1 and report.checks[0].axis == 1


def test_an_unstructured_checkpoint_fails_because_nothing_is_sparse(tmp_path):
    weight = torch.where(
        torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) < 0.5, dense(64, 64), 0.0
    )
    report = verify_checkpoint(saved(tmp_path, w=weight))
    assert not report.ok and report.failed == 0 and "Nothing" in report.summary()


def test_minus_zeros_of_a_stranger_are_counted_but_allowed(tmp_path):
    weight, mask = sparse(64, 64)
    report = verify_checkpoint(saved(tmp_path, w=torch.where(mask.unpack(), weight, -0.0)))
    assert report.ok and report.checks[0].negative_zeros == 64 * 32


def test_expected_tensors_have_to_be_sparse(tmp_path):
    weight, _ = sparse(64, 64)
    path = saved(tmp_path, a__q=weight, b__q=dense(64, 64), c__bias=torch.ones(8))
    assert verify_checkpoint(path, expect=["a.*"]).ok
    assert "'b.q'" in verify_checkpoint(path, expect=["*.q"]).summary()
    assert "expected to be sparse" in verify_checkpoint(path, expect=["c.*"]).summary()
    assert "Nothing is called 'z.*'" in verify_checkpoint(path, expect=["z.*"]).summary()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_quantised_weights_are_examined(tmp_path, dtype):
    weight, _ = sparse(64, 64)
    values = (weight * 20).clamp(-127, 127)
    report = verify_checkpoint(
        saved(tmp_path, w=(values.abs() if dtype == torch.uint8 else values).to(dtype))
    )
    assert report.ok and report.checked == 1


# --- folders ---


def test_shards_are_read_through_their_index(tmp_path):
    first, _ = sparse(64, 64, seed=1)
    second, _ = sparse(64, 64, seed=2)
    saved(tmp_path, "model-1.safetensors", a=first)
    saved(tmp_path, "model-2.safetensors", b=second)
    saved(tmp_path, "stray.safetensors", c=dense(64, 64))
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(by_name(verify_checkpoint(tmp_path))) == {"a", "b"}


def test_the_masks_in_a_run_folder_are_not_weights(tmp_path):
    weight, mask = sparse(64, 64)
    saved(tmp_path, w=weight)
    masks = mask_set(w=mask)
    masks.save(tmp_path / "masks.safetensors")
    assert verify_checkpoint(tmp_path, masks).ok
    assert verify_checkpoint(tmp_path).checked == 1


def test_progress_ends_at_the_whole(tmp_path):
    weight, _ = sparse(64, 64)
    seen = []
    report = verify_checkpoint(
        saved(tmp_path, a=weight, b=weight.clone()), progress=lambda *step: seen.append(step)
    )
    assert [done for _, done, _ in seen] == [0, 64 * 64 * 4, 2 * 64 * 64 * 4]
    assert {total for *_, total in seen} == {report.bytes_read} and str(tmp_path) in seen[0][0]


def test_memory_does_not_grow_with_the_file(tmp_path):
    """A sparse file on disk (holes read as zeros) many times larger than what the pass may use."""
    import tracemalloc

    size = 256 << 20
    path = write_raw(tmp_path / "big.safetensors", {"w": row("BF16", [size >> 13, 4096], 0, size)})
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + size)
    tracemalloc.start()
    verify_checkpoint(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
