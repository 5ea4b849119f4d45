import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmsparse_deploy.pattern import TWO_FOUR, NMPattern
from nmsparse_deploy.prove.group_counter import check
from nmsparse_deploy.prove.report import gemm_shape, judge


@pytest.mark.parametrize(
    "shape, axis, k_n",
    [
        ((10, 20), 1, (20, 10)),
        ((10, 20), 0, (10, 20)),
        ((3, 10, 20), 2, (20, 10)),
        ((3, 10, 20), 1, (10, 20)),
        ((10, 20, 3, 3), 1, (20, 10)),
        ((7,), 0, (7, 1)),
    ],
)
def test_gemm_shape_reads_k_and_n_from_the_layout(shape, axis, k_n):
    assert gemm_shape(shape, axis) == k_n


@settings(deadline=None, max_examples=60)
@given(
    st.floats(0, 1),
    st.integers(0, 1 << 30),
    st.sampled_from([NMPattern(2, 4), NMPattern(1, 4), NMPattern(4, 8)]),
)
def test_zeros_strewn_at_random_are_never_taken_for_a_pattern(share, seed, pattern):
    rng = np.random.default_rng(seed)
    values = (rng.random((64, 64)) < share).astype(np.int8)
    assert judge(check(values, pattern), pattern) in ("dense", "by chance")


@pytest.mark.parametrize("pattern", [NMPattern(2, 4), NMPattern(1, 4), NMPattern(4, 8)], ids=str)
def test_a_pattern_is_told_from_a_near_miss(pattern):
    values = np.tile(np.arange(pattern.group) < pattern.keep, (64, 64)).astype(np.int8)
    assert judge(check(values, pattern), pattern) == "sparse"
    values[5, pattern.group - 1] = 1
    assert judge(check(values, pattern), pattern) == "near miss"
    values[:, : math.ceil(values.shape[1] * 0.1)] = 1
    assert judge(check(values, pattern), pattern) == "near miss"


def test_an_empty_tensor_proves_nothing():
    assert judge(check(np.zeros((64, 64), np.int8), TWO_FOUR), TWO_FOUR) == "by chance"
    assert judge(check(np.eye(64, dtype=np.int8), TWO_FOUR), TWO_FOUR) == "by chance"
