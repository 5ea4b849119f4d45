"""Sampling without replacement and its score, against the enumerated Plackett-Luce law."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmsparse_deploy.find.learn.plackett_luce import as_mask, log_probability, sample, score

SIZES = [(1, 4), (2, 4), (3, 5), (2, 6)]
seeds = st.integers(0, 2**31)


def logits(seed: int, group: int, spread: float = 1.5) -> torch.Tensor:
    return spread * torch.randn(
        group, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def orders(keep: int, group: int) -> torch.Tensor:
    return torch.tensor(list(permutations(range(group), keep)))


def law(pi: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """The probability of an ordered draw, straight from the definition."""
    left, probability = set(range(len(pi))), torch.ones((), dtype=pi.dtype)
    for drawn in order:
        probability = probability * pi[drawn].exp() / sum(pi[i].exp() for i in left)
        left.remove(drawn)
    return probability


@given(seeds, st.sampled_from(SIZES))
@settings(deadline=None, max_examples=25)
def test_log_probability_is_the_law(seed, size):
    keep, group = size
    pi, every = logits(seed, group), orders(keep, group)
    found = log_probability(pi.expand(len(every), group), every).exp()
    expected = torch.stack([law(pi, tuple(order)) for order in every.tolist()])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert float(found.sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(
    "pi",
    [[0.3, -0.2, 1.1, 0.0], [4.0, 3.0, 0.0, -2.0], [6.0, 6.0, 0.0, 0.0, 0.0]],
    ids=["random", "skewed", "a sure prior"],
)
def test_frequencies_follow_the_law(pi, dtype):
    pi, keep, count = torch.tensor(pi, dtype=torch.float64), 2, 50_000
    drawn = sample(pi.to(dtype).expand(count, len(pi)), keep, torch.Generator().manual_seed(3))
    seen = Counter(map(tuple, drawn.tolist()))
    for order in permutations(range(len(pi)), keep):
        p = float(law(pi, order))
        assert abs(seen[order] / count - p) < 4.5 * (p * (1 - p) / count) ** 0.5 + 2e-5
    sets = Counter(tuple(sorted(order)) for order in map(tuple, drawn.tolist()))
    assert set(sets) <= set(combinations(range(len(pi)), keep))


@given(seeds, st.sampled_from(SIZES))
@settings(deadline=None, max_examples=25)
def test_score_is_the_gradient_of_log_probability(seed, size):
    keep, group = size
    every = orders(keep, group)
    pi = logits(seed, group).expand(len(every), group).clone().requires_grad_()
    log_probability(pi, every).sum().backward()
    torch.testing.assert_close(score(pi.detach(), every), pi.grad, rtol=0, atol=1e-12)


@given(seeds, st.sampled_from(SIZES))
@settings(deadline=None, max_examples=25)
def test_expected_score_is_zero(seed, size):
    keep, group = size
    every = orders(keep, group)
    pi = logits(seed, group).expand(len(every), group)
    expected = (log_probability(pi, every).exp().unsqueeze(-1) * score(pi, every)).sum(0)
    assert float(expected.abs().max()) < 1e-12


@given(seeds, st.sampled_from(SIZES), st.floats(-3, 3))
@settings(deadline=None, max_examples=25)
def test_estimator_is_unbiased_with_any_constant_baseline(seed, size, baseline):
    """`E[(f - b) score]` is the gradient of `E[f]` for a random table `f` of masks (sets, not
    orders)."""
    keep, group = size
    every = orders(keep, group)
    table = {
        some: float(torch.randn((), generator=torch.Generator().manual_seed(seed + n)))
        for n, some in enumerate(combinations(range(group), keep))
    }
    f = torch.tensor([table[tuple(sorted(order))] for order in every.tolist()], dtype=torch.float64)
    pi = logits(seed, group).requires_grad_()
    expectation = sum(law(pi, tuple(order)) * value for order, value in zip(every.tolist(), f))
    expectation.backward()
    with torch.no_grad():
        rows = pi.expand(len(every), group)
        weights = log_probability(rows, every).exp() * (f - baseline)
        estimate = (weights.unsqueeze(-1) * score(rows, every)).sum(0)
    torch.testing.assert_close(estimate, pi.grad, rtol=0, atol=1e-12)


def test_extreme_logits_stay_finite():
    """`C = 10` and beyond, where `1 / (1 - p)` overflows."""
    pi = torch.tensor([[200.0, 150.0, 0.0, -200.0]])
    order = sample(pi, 2, torch.Generator().manual_seed(0))
    assert order.tolist() == [[0, 1]]
    assert torch.isfinite(score(pi, torch.tensor([[3, 2]]))).all()
    assert torch.isfinite(log_probability(pi, torch.tensor([[3, 2]]))).all()


def test_a_seed_decides_the_draw():
    pi = torch.zeros(50, 7, 4)
    first, again, other = (sample(pi, 2, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    mask = as_mask(first, 4)
    assert mask.shape == pi.shape and (mask.sum(-1) == 2).all()
