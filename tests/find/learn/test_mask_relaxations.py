"""The forms of a learnable mask: relaxation, prior, gradient, and noise, against autograd,
enumeration and chance."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.find.learn.mask_relaxations import (
    Annealing,
    AnnealingPoint,
    CandidateDistribution,
    StraightThroughScores,
    candidates,
    form_for,
    margin,
    relaxed,
)
from nmsparse_deploy.find.learn.step_context import LinearSchedule, StepContext
from nmsparse_deploy.masks import mask_follows, project
from nmsparse_deploy.pattern import NMPattern

PATTERNS = [
    NMPattern(2, 4),
    NMPattern(1, 4),
    NMPattern(4, 8),
    NMPattern(2, 8),
    NMPattern(3, 4),
    NMPattern(1, 2),
]
FLAT = Annealing(LinearSchedule(100, 500), LinearSchedule(1, 0.05), 0.83, noise=False)


def parametrization(pattern, compact=False, **changes):
    return CandidateDistribution(
        pattern,
        Annealing(LinearSchedule(100, 500), LinearSchedule(1, 0.05), 0.83, **changes),
        compact,
    )


def noise(seed):
    return lambda: torch.Generator().manual_seed(seed)


def reference(values, groups, table, point):
    """The formulas of the docstring, left to autograd."""
    logits = values @ table.T if point.compact else values
    arguments = point.kappa * logits
    if point.noise:
        u = torch.rand(arguments.T.shape, generator=point.noise()).T.clamp(
            1e-9, 1 - 1e-7
        )  # candidates are drawn first
        arguments = arguments + -torch.log(-torch.log(u))
    mask = (arguments / point.tau).softmax(-1) @ table
    return groups * mask, point.regulariser * (groups * mask).square().sum()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_candidates_are_all_masks_of_a_group(pattern):
    table = candidates(pattern)
    assert (
        len({tuple(row) for row in table.tolist()})
        == len(table)
        == math.comb(pattern.group, pattern.keep)
    )
    assert (table.sum(1) == pattern.keep).all() and mask_follows(table.bool(), pattern)


def test_two_of_four_in_the_order_of_the_paper():
    assert candidates(NMPattern(2, 4)).tolist() == [
        [1, 1, 0, 0],
        [1, 0, 1, 0],
        [1, 0, 0, 1],
        [0, 1, 1, 0],
        [0, 1, 0, 1],
        [0, 0, 1, 1],
    ]


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("regulariser", [0.0, 0.3])
@pytest.mark.parametrize("pattern", PATTERNS[:4], ids=str)
def test_the_gradient_is_autograd_s(pattern, regulariser, compact, seed):
    torch.manual_seed(0)
    table = candidates(pattern).double()
    groups = torch.randn(50, pattern.group, dtype=torch.float64)
    values = (
        0.05 * torch.randn(50, pattern.group if compact else len(table), dtype=torch.float64)
    ).requires_grad_()
    upstream = torch.randn_like(groups)
    point = AnnealingPoint(20.0, 0.7, regulariser, compact, None if seed is None else noise(seed))
    seen, energy = reference(values, groups, table, point)
    (wanted,) = torch.autograd.grad((seen * upstream).sum() - energy, values)
    ours = relaxed(values, groups, table, point)
    (found,) = torch.autograd.grad((ours * upstream).sum(), values)
    assert torch.allclose(ours, seen, rtol=0, atol=1e-14)
    assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()


def test_the_gradient_is_that_of_finite_differences():
    torch.manual_seed(1)
    table = candidates(NMPattern(2, 4)).double()
    groups = torch.randn(5, 4, dtype=torch.float64)
    values = (0.1 * torch.randn(5, 6, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: relaxed(v, groups, table, AnnealingPoint(3.0, 1.5, 0.0, False, noise(0))),
        values,
        eps=1e-6,
        atol=1e-7,
    )


def test_long_tensors_are_worked_through_in_pieces(monkeypatch):
    """Other pieces are other draws, but forward and backward agree on them."""
    from nmsparse_deploy.find.learn import mask_relaxations as maskparam

    monkeypatch.setattr(maskparam, "CHUNK", 60)
    table = candidates(NMPattern(2, 4)).double()
    groups, values = (
        torch.randn(37, 4, dtype=torch.float64),
        torch.zeros(37, 6, dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(
        lambda v: relaxed(v, groups, table, AnnealingPoint(2.0, 1.0, 0.0, False, noise(0))),
        values,
        atol=1e-6,
    )


@pytest.mark.parametrize("tau", [0.05, 1.0, 4.0])
def test_sampled_candidates_follow_the_softmax_at_every_temperature(tau):
    """Chi-square with five degrees of freedom; 25.7 is exceeded by chance once in ten thousand."""
    logits, count = torch.tensor([0.3, -0.2, 0.0, 0.5, -0.5, 0.1]) / 10, 20000
    # With the identity for a table, `w * m~` is `y` itself.
    y = relaxed(
        logits.repeat(count, 1),
        torch.ones(count, 6),
        torch.eye(6),
        AnnealingPoint(10.0, tau, noise=noise(5)),
    )
    observed = torch.bincount(y.argmax(-1), minlength=6).double()
    expected = count * (10 * logits.double()).softmax(0)
    assert float(((observed - expected).square() / expected).sum()) < 25.7


@given(st.sampled_from(PATTERNS), st.booleans(), st.floats(0, 1), st.integers(0, 2**31))
def test_soft_masks_keep_n_in_all(pattern, compact, progress, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.ones(6, 8 * pattern.group)
    chosen = parametrization(pattern, compact)
    values = chosen.start(rows, project(torch.rand(rows.shape, generator=generator), pattern))
    values = values + 0.05 * torch.randn(values.shape, generator=generator)
    mask = chosen.soft(values, rows, StepContext(seed, round(progress * 100), 101), "w")
    assert mask.min() >= 0 and mask.max() <= 1 + 1e-6
    assert (mask.reshape(-1, pattern.group).sum(-1) - pattern.keep).abs().max() < 1e-5


def test_a_cold_sample_is_a_candidate():
    values = 0.05 * torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    seen = relaxed(
        values,
        torch.ones(500, 4),
        candidates(NMPattern(2, 4)),
        AnnealingPoint(100.0, 1e-4, noise=noise(1)),
    )
    assert (seen.round() - seen).abs().max() < 1e-3


@pytest.mark.parametrize("above_chance", [0.1, 0.5, 0.83, 0.999])
@pytest.mark.parametrize("form", ["candidates", "compact", "scores"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_prior_is_the_hard_mask_everywhere(pattern, form, above_chance):
    chance = 1 / len(candidates(pattern))
    confidence = chance + (1 - chance) * above_chance
    rows = torch.randn(64, 8 * pattern.group, generator=torch.Generator().manual_seed(0))
    prior = project(torch.rand(rows.shape, generator=torch.Generator().manual_seed(1)), pattern)
    annealing = Annealing(LinearSchedule(100, 500), LinearSchedule(1, 0.05), confidence)
    chosen = (
        StraightThroughScores(pattern, annealing)
        if form == "scores"
        else CandidateDistribution(pattern, annealing, form == "compact")
    )
    values = chosen.start(rows, prior)
    assert torch.equal(chosen.hard(values, rows), prior)
    groups = values.reshape(-1, values.shape[-1] if form != "scores" else pattern.group)
    assert groups.sum(-1).abs().max() < 1e-5  # centred
    if form == "candidates":
        best = (values == values.max(-1, keepdim=True).values).sum(-1)
        assert (best == 1).all()
        probability = (100 * values).softmax(-1).max(-1).values
        assert (probability - confidence).abs().max() < 1e-4
    if form == "compact":
        probability = (100 * values @ candidates(pattern).T).softmax(-1).max(-1).values
        assert (probability - confidence).abs().max() < 1e-4


def test_three_sigma_of_the_paper():
    """alpha 3, sigma 0.01 and kappa 100 put the prior of 2:4 at e^3 / (e^3 + 4 + e^-3)."""
    assert margin(NMPattern(2, 4), math.exp(3) / (math.exp(3) + 4 + math.exp(-3))) == pytest.approx(
        3.0
    )


def test_confidence_below_chance_is_refused():
    with pytest.raises(UsageError, match="no more than chance"):
        margin(NMPattern(2, 4), 1 / 6)


def test_too_many_candidates_are_refused():
    assert [
        form_for(p) for p in (NMPattern(2, 4), NMPattern(1, 8), NMPattern(4, 8), NMPattern(8, 16))
    ] == ["candidates", "candidates", "compact", "scores"]
    with pytest.raises(UsageError, match="12,870 masks"):
        CandidateDistribution(NMPattern(8, 16), FLAT, True)


def test_changed_values_change_the_hard_mask():
    pattern = NMPattern(2, 4)
    rows = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    for chosen in (
        parametrization(pattern),
        parametrization(pattern, True),
        StraightThroughScores(pattern, FLAT),
    ):
        values = chosen.start(rows, project(rows.abs(), pattern))
        assert torch.equal(chosen.hard(-values, rows), ~project(rows.abs(), pattern))


def test_noise_is_new_everywhere_and_the_same_again():
    chosen, rows = parametrization(NMPattern(2, 4)), torch.ones(4, 16)
    values = torch.zeros(16, 6)
    base = StepContext(0, 3, 10, 0, 2, 0, 2)
    seen = chosen.soft(values, rows, base, "a")
    assert torch.equal(seen, chosen.soft(values, rows, base, "a"))
    others = [
        (StepContext(1, 3, 10, 0, 2, 0, 2), "a"),
        (StepContext(0, 4, 10, 0, 2, 0, 2), "a"),
        (StepContext(0, 3, 10, 1, 2, 0, 2), "a"),
        (StepContext(0, 3, 10, 0, 2, 1, 2), "a"),
        (base, "b"),
    ]
    assert not any(
        torch.equal(seen, chosen.soft(values, rows, context, name)) for context, name in others
    )


def test_straight_through_hands_the_gradient_on():
    pattern = NMPattern(2, 4)
    rows = torch.randn(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = torch.randn(6, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
    chosen = StraightThroughScores(
        pattern, Annealing(LinearSchedule(1, 1), LinearSchedule(1, 1), 0.8, regulariser=0.25)
    )
    upstream = torch.randn(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    seen = chosen.soft(values, rows, StepContext(parts=2), "w")
    mask = project(values.detach(), pattern)
    assert torch.equal(seen, rows * mask)
    (found,) = torch.autograd.grad((seen * upstream).sum(), values)
    assert torch.allclose(found.double(), rows * upstream - 0.25 * rows.square() * mask, atol=1e-6)


def test_half_precision_noise_is_finite():
    """Uniform draws of exactly 0 and 1 are possible; what is made of them is not infinite."""
    low, high = torch.tensor(0.0).clamp(1e-9, 1 - 1e-7), torch.tensor(1.0).clamp(1e-9, 1 - 1e-7)
    assert torch.isfinite(torch.stack([-(-low.log()).log(), -(-high.log()).log()])).all()
    values = torch.full((4, 6), 10.0)
    values[:, 0] = -10
    seen = relaxed(
        values,
        torch.ones(4, 4),
        candidates(NMPattern(2, 4)),
        AnnealingPoint(500.0, 0.05, noise=noise(0)),
    )
    assert torch.isfinite(seen).all()
