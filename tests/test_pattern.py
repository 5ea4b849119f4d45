"""The projection and the pattern's own laws."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.masks import mask_follows, project
from nmsparse_deploy.pattern import TWO_FOUR, NMPattern
from nmsparse_deploy.prove.group_counter import check, group_origin

PATTERNS = [
    NMPattern.parse(text) for text in ("1:2", "1:4", "2:4", "3:4", "4:8", "2:8", "2:3", "8:16")
]


@given(
    st.sampled_from(PATTERNS),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 2**31),
    st.sampled_from([0, 1]),
)
def test_projection_keeps_exactly_n_and_the_best_sum(pattern, rows, groups, seed, axis):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(
        -3, 4, (rows, groups * pattern.group), generator=generator
    ).float()  # many ties
    scores = scores.T.contiguous() if axis == 0 else scores
    mask = project(scores, pattern, axis=axis)
    assert mask.dtype == torch.bool and mask_follows(mask, pattern, axis=axis)
    lines, kept = (scores.T, mask.T) if axis == 0 else (scores, mask)
    for line, chosen in zip(
        lines.unflatten(-1, (-1, pattern.group)).flatten(0, 1),
        kept.unflatten(-1, (-1, pattern.group)).flatten(0, 1),
    ):
        best = max(
            combinations(range(pattern.group), pattern.keep),
            key=lambda places: (sum(float(line[i]) for i in places), [-i for i in places]),
        )
        assert (
            tuple(chosen.nonzero().flatten().tolist()) == best
        )  # the best sum; among equals the lowest indices


def test_ties_keep_the_lowest_index():
    assert project(torch.ones(1, 8), TWO_FOUR)[0].tolist() == [True, True, False, False] * 2


def test_minus_zero_ties_with_zero():
    assert project(torch.tensor([[0.0, -0.0, 0.0, -0.0]]), TWO_FOUR)[0].tolist() == [
        True,
        True,
        False,
        False,
    ]


def test_projection_refuses_nan_and_ragged_axes():
    with pytest.raises(ValueError, match="NaN"):
        project(torch.tensor([[1.0, float("nan"), 0.0, 2.0]]), TWO_FOUR)
    with pytest.raises(ValueError, match="not divisible"):
        project(torch.ones(2, 6), TWO_FOUR)
    with pytest.raises(ValueError, match="not divisible"):
        check(torch.ones(2, 6), TWO_FOUR)


def test_n_counts_what_is_kept():
    assert NMPattern.parse("1:4").zeros == 3
    assert project(torch.arange(4.0)[None], NMPattern(1, 4)).sum() == 1


@pytest.mark.parametrize(
    "text", ["", "2", "4:2", "0:4", "4:4", "2:4:8", "a:b", "-1:4", "2/4", "2.0:4"]
)
def test_bad_patterns_are_usage_errors(text):
    with pytest.raises(UsageError):
        NMPattern.parse(text)


@given(st.sampled_from(PATTERNS), st.sampled_from(PATTERNS), st.integers(0, 2**31))
def test_implies_agrees_with_the_check(a, b, seed):
    """If a implies b no tensor with a breaks b; the worst tensor shows the opposite."""
    length = a.group * b.group
    scores = torch.rand(4, length, generator=torch.Generator().manual_seed(seed))
    scores[0] = torch.arange(length)  # kept values crowd at the end of each group, and at its start
    scores[1] = -torch.arange(length)
    kept = project(scores, a).float()
    if a.implies(b):
        assert check(kept, b).bad == 0
    elif a.group % b.group == 0:
        assert check(kept[:2], b).bad > 0


def test_four_of_eight_is_not_two_of_four():
    assert not NMPattern(4, 8).implies(TWO_FOUR)
    assert (
        NMPattern(2, 8).implies(TWO_FOUR)
        and NMPattern(1, 4).implies(TWO_FOUR)
        and TWO_FOUR.implies(NMPattern(4, 8))
    )
    mask = project(torch.rand(512, 8, generator=torch.Generator().manual_seed(0)), NMPattern(4, 8))
    assert 0.3 < check(mask.float(), TWO_FOUR).bad / 512 < 0.7  # 34 of 70 patterns of eight


@pytest.mark.parametrize("shape,axis", [((4, 8), 1), ((8, 6), 0), ((3, 8, 2, 2), 1)])
def test_a_planted_violation_is_found_where_it_is(shape, axis):
    values = project(
        torch.rand(shape, generator=torch.Generator().manual_seed(1)), TWO_FOUR, axis=axis
    ).float()
    spot = tuple(n - 1 for n in shape)
    moved = values.movedim(axis, -1)
    moved[tuple(s for i, s in enumerate(spot) if i != axis)][-4:] = 1.0
    count = check(values, TWO_FOUR, axis=axis)
    assert count.bad == 1
    expected = tuple(s - 3 if i == axis else s for i, s in enumerate(spot))
    assert group_origin(count.first_bad, shape, axis, TWO_FOUR) == expected
