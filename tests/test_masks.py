"""Mask files: exact round trips, hostile files, and masks that belong to another model."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from nmsparse_deploy.errors import CheckFailed, UsageError
from nmsparse_deploy.masks import FORMAT, Mask, MaskSet, project, tensor_hash
from nmsparse_deploy.pattern import TWO_FOUR, NMPattern


def mask_set(weight: torch.Tensor, name: str = "w") -> MaskSet:
    mask = project(weight.abs(), TWO_FOUR)
    return MaskSet(
        {name: Mask.pack(mask, -1, TWO_FOUR, tensor_hash(weight))}, {"method": "magnitude"}
    )


@given(st.integers(1, 7), st.integers(1, 5), st.integers(0, 2**31))
def test_pack_round_trip(rows, groups, seed):
    pattern = NMPattern(2, 3)  # sizes that are no multiple of eight bits
    mask = project(
        torch.rand(rows, groups * 3, generator=torch.Generator().manual_seed(seed)), pattern
    )
    assert torch.equal(Mask.pack(mask, 1, pattern, "h").unpack(), mask)


def test_save_and_load(tmp_path):
    weight = torch.randn(8, 16)
    before = mask_set(weight)
    before.save(tmp_path / "m.safetensors")
    after = MaskSet.load(tmp_path / "m.safetensors")
    assert after.info == {"method": "magnitude"}
    assert torch.equal(after.masks["w"].unpack(), before.masks["w"].unpack())
    assert after.masks["w"].pattern == TWO_FOUR and after.masks["w"].axis == 1
    after.check_base({"w": weight})


def test_apply_writes_plus_zero():
    weight = -torch.ones(2, 4)
    pruned = mask_set(weight).masks["w"].apply(weight)
    assert not torch.signbit(pruned[pruned == 0]).any() and (pruned == 0).sum() == 4


def test_masks_of_another_model_are_refused():
    weight = torch.randn(8, 16)
    masks = mask_set(weight)
    with pytest.raises(CheckFailed, match="no parameter 'w'"):
        masks.check_base({"v": weight})
    with pytest.raises(CheckFailed, match="shape"):
        masks.check_base({"w": weight[:4]})
    with pytest.raises(CheckFailed, match="other dense weights"):
        masks.check_base({"w": weight + 1})


def test_missing_truncated_and_foreign_files(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(UsageError, match="no mask file"):
        MaskSet.load(path)
    mask_set(torch.randn(8, 16)).save(path)
    whole = path.read_bytes()
    for cut in (0, 4, 20, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(UsageError, match="damaged"):
            MaskSet.load(path)
    save_file({"w": np.zeros(16, np.uint8)}, path)
    with pytest.raises(UsageError, match="not a mask file"):
        MaskSet.load(path)


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"shape": [8, 17], "axis": 1, "pattern": "2:4", "dense": ""},
        {"shape": ["x"], "axis": 1, "pattern": "2:4", "dense": ""},
        7,
    ],
)
def test_headers_that_lie(tmp_path, row):
    path = tmp_path / "m.safetensors"
    save_file(
        {"w": np.zeros(16, np.uint8)}, path, {FORMAT: json.dumps({"info": {}, "masks": {"w": row}})}
    )
    with pytest.raises(UsageError, match="damaged"):
        MaskSet.load(path)


def test_header_with_offsets_out_of_range(tmp_path):
    path = tmp_path / "m.safetensors"
    header = json.dumps(
        {"w": {"dtype": "U8", "shape": [16], "data_offsets": [0, 1 << 40]}}
    ).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(UsageError, match="damaged"):
        MaskSet.load(path)
