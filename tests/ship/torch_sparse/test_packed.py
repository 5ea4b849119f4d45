"""Packed 2:4 weights: nothing is lost, nothing is larger than promised, and what is no 2:4 is
refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nmsparse_deploy.errors import CheckFailed
from nmsparse_deploy.masks import project
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.ship.torch_sparse.packed import Packed, pack, packable, stored_share, unpack

DTYPES = (torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn)


def weight(
    dtype: torch.dtype, n: int = 8, k: int = 32, seed: int = 0, keep: int = 2
) -> torch.Tensor:
    drawn = torch.randint(1, 9, (n, k), generator=torch.Generator().manual_seed(seed)).float()
    signs = (
        torch.randint(0, 2, (n, k), generator=torch.Generator().manual_seed(seed + 1)).float() * 2
        - 1
    )
    mask = project(torch.rand(n, k, generator=torch.Generator().manual_seed(seed + 2)), TWO_FOUR)
    if keep == 1:
        mask &= torch.arange(k) % 4 == mask.view(n, -1, 4).int().argmax(-1).repeat_interleave(4, 1)
    return torch.where(mask, drawn * signs, 0.0).to(dtype)


def by_hand(rows: torch.Tensor) -> tuple[list[list[float]], list[list[int]]]:
    """The same layout, one group at a time."""
    values, places = [], []
    for row in rows.float().tolist():
        kept, where = [], []
        for start in range(0, len(row), 4):
            group = row[start : start + 4]
            chosen = [i for i, value in enumerate(group) if value]
            chosen = sorted(chosen + [i for i in range(4) if i not in chosen][: 2 - len(chosen)])
            kept += [group[i] for i in chosen]
            where += chosen
        values.append(kept)
        places.append(
            [sum(where[i + j] << 2 * j for j in range(4)) for i in range(0, len(where), 4)]
        )
    return values, places


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(seed=st.integers(0, 99), keep=st.sampled_from((1, 2)))
def test_packing_is_what_it_says_and_comes_back(dtype, seed, keep):
    rows = weight(dtype, seed=seed, keep=keep)
    packed = pack(rows)
    values, places = by_hand(rows)
    assert packed.values.float().tolist() == values and packed.places.tolist() == places
    assert packed.shape == tuple(rows.shape) and unpack(packed).dtype == dtype
    assert torch.equal(unpack(packed).float(), rows.float())


@pytest.mark.parametrize("dtype,sixteenths", zip(DTYPES, (9, 9, 10, 10)), ids=str)
def test_sizes_are_nine_or_ten_sixteenths(dtype, sixteenths):
    rows = weight(dtype, 64, 128)
    assert pack(rows).nbytes * 16 == rows.nbytes * sixteenths
    assert stored_share(dtype) == sixteenths / 16


def test_a_third_value_is_refused():
    rows = weight(torch.float16)
    rows[3, 8:12] = 1
    with pytest.raises(CheckFailed, match="1 of 64 groups"):
        pack(rows)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float8_e4m3fn), ids=str)
def test_minus_zero_is_a_zero(dtype):
    rows = torch.zeros(1, 8)
    rows[0, :4] = torch.tensor([-0.0, 3.0, -0.0, 2.0])
    found = unpack(pack(rows.to(dtype))).float()
    assert found.tolist() == [[0, 3, 0, 2, 0, 0, 0, 0]] and not torch.signbit(found).any()


def test_damaged_places_are_noticed():
    packed = pack(weight(torch.float16))
    with pytest.raises(CheckFailed, match="same place"):
        unpack(Packed(packed.values, torch.zeros_like(packed.places)))


@pytest.mark.parametrize("k,fits", ((8, True), (64, True), (12, False), (6, False), (0, False)))
def test_rows_have_to_fill_whole_bytes(k, fits):
    assert packable(k, 16) is fits
