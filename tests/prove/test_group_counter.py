"""The streaming counter against a count by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmsparse_deploy.pattern import NMPattern
from nmsparse_deploy.prove.group_counter import (
    ELEMENT_TYPES,
    TORCH_ELEMENTS,
    GroupCount,
    GroupCounter,
    check,
    group_origin,
)

PATTERNS = [NMPattern(*p) for p in ((1, 4), (2, 4), (4, 8), (2, 8), (1, 2), (2, 3))]
DTYPES = list(TORCH_ELEMENTS)
VALUES = [0.0, 0.0, 0.0, -0.0, 1.0, -2.0, 127.0, math.nan, math.inf, -math.inf]


@st.composite
def tensors(draw):
    dtype, pattern = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(PATTERNS))
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    axis = draw(st.integers(0, len(shape) - 1))
    shape[axis] = pattern.group * draw(st.integers(1, 4))
    pool = VALUES if dtype.is_floating_point else [0, 0, 0, 1, 2, 127]
    values = draw(
        st.lists(st.sampled_from(pool), min_size=math.prod(shape), max_size=math.prod(shape))
    )
    tensor = torch.tensor(values, dtype=torch.float64).to(dtype).reshape(shape)
    if not dtype.is_floating_point and dtype != torch.uint8:
        tensor = torch.where(
            tensor == 127, torch.iinfo(dtype).min, tensor
        )  # only the top bit is set
    return tensor, pattern, axis - len(shape) if draw(st.booleans()) else axis


def count_by_hand(tensor, pattern, axis):
    wide = tensor.double().numpy()
    groups = np.moveaxis(wide, axis, -1)
    groups = groups.reshape(*groups.shape[:-1], -1, pattern.group)
    bad = sparser = 0
    for index in np.ndindex(groups.shape[:-1]):
        nonzeros = sum(1 for value in groups[index] if value != 0)
        bad += nonzeros > pattern.keep
        sparser += nonzeros < pattern.keep
    return {
        "groups": math.prod(groups.shape[:-1]),
        "bad": bad,
        "sparser": sparser,
        "nonzeros": int((wide != 0).sum()),
        "negative_zeros": int(((wide == 0) & np.signbit(wide)).sum()),
        "nonfinite": int((~np.isfinite(wide)).sum()),
    }


def first_bad_by_hand(tensor, pattern, axis):
    """The bad group that starts first in memory order of its first values."""
    wide, axis = tensor.double().numpy(), axis % tensor.ndim
    starts = [i for i in np.ndindex(wide.shape) if i[axis] % pattern.group == 0]
    for start in starts:
        place = tuple(slice(n, n + pattern.group) if a == axis else n for a, n in enumerate(start))
        if np.count_nonzero(wide[place]) > pattern.keep:
            return start
    return None


@settings(deadline=None, max_examples=300)
@given(tensors())
def test_the_counter_counts_what_a_person_counts(case):
    tensor, pattern, axis = case
    count = check(tensor, pattern, axis)
    assert {key: getattr(count, key) for key in count_by_hand(*case)} == count_by_hand(*case)
    first = (
        None
        if count.first_bad is None
        else group_origin(count.first_bad, tuple(tensor.shape), axis, pattern)
    )
    assert first == first_bad_by_hand(*case)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_one_planted_value_is_found_where_it_was_planted(pattern, dtype, axis):
    shape = [6, 10]
    shape[axis] = pattern.group * 5
    tensor = torch.zeros(shape, dtype=torch.float32)
    along = tensor.movedim(axis, -1).unflatten(-1, (-1, pattern.group))
    along[..., : pattern.keep] = 1
    at = [3, 7]
    at[axis] = pattern.group * 2 + pattern.keep
    tensor[tuple(at)] = 1
    count = check(tensor.to(dtype), pattern, axis)
    at[axis] = pattern.group * 2
    assert count.bad == 1
    assert group_origin(count.first_bad, tuple(shape), axis, pattern) == tuple(at)


@pytest.mark.parametrize("name", [name for name, element in ELEMENT_TYPES.items() if element.sign])
@pytest.mark.parametrize("inner", [1, 8])
def test_every_bit_pattern_of_a_float_type_is_classified(name, inner):
    """All values of the 8- and 16-bit types; the borders of the wider ones."""
    element, kind = ELEMENT_TYPES[name], next(k for k, v in TORCH_ELEMENTS.items() if v == name)
    if element.bits <= 16:
        bits = np.arange(1 << element.bits, dtype=np.uint64)
    else:
        borders = np.array(
            [0, 1, element.inf - 1, element.inf, element.inf + 1, element.sign - 1, 12345, 2],
            np.uint64,
        )
        bits = np.tile(np.concatenate([borders, borders | np.uint64(element.sign)]), 4)
    raw = bits.astype(f"u{element.bits // 8}").view(np.uint8)
    values = torch.from_numpy(raw.copy()).view(kind).double()
    count = GroupCounter(NMPattern(2, 4), element, inner).count(raw)
    assert count.nonzeros == int((values != 0).sum())
    assert count.nonfinite == int((~torch.isfinite(values)).sum())
    assert count.negative_zeros == int(((values == 0) & torch.signbit(values)).sum())


@settings(deadline=None, max_examples=60)
@given(tensors(), st.integers(1, 5))
def test_counts_of_chunks_add_up_to_the_count_of_the_whole(case, groups_per_chunk):
    tensor, pattern, axis = case
    axis %= tensor.ndim
    element, inner = (
        ELEMENT_TYPES[TORCH_ELEMENTS[tensor.dtype]],
        math.prod(tensor.shape[axis + 1 :]),
    )
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    counter, step = (
        GroupCounter(pattern, element, inner),
        pattern.group * inner * element.bits // 8 * groups_per_chunk,
    )
    parts = (counter.count(raw[i : i + step]) for i in range(0, raw.size, step))
    assert sum(parts, GroupCount()) == check(tensor, pattern, axis)


def test_half_a_group_is_refused():
    with pytest.raises(ValueError, match="whole groups"):
        GroupCounter(NMPattern(2, 4), ELEMENT_TYPES["F32"]).count(np.zeros(8, np.uint8))
    with pytest.raises(ValueError, match="not divisible"):
        check(torch.zeros(4, 6), NMPattern(2, 4))
