"""ISC, RIA, ALPS and two-dimensional magnitude against plain computations of their formulas."""

from __future__ import annotations

from itertools import combinations, permutations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.find.calibration.layer_stats import LayerStats
from nmsparse_deploy.find.methods import alps, isc, magnitude_2d, ria, sparsegpt
from nmsparse_deploy.find.methods.base import Method
from nmsparse_deploy.find.methods.hessian import dampen
from nmsparse_deploy.masks import mask_follows, project
from nmsparse_deploy.pattern import TWO_FOUR, NMPattern
from tests.find.methods.test_methods import energy, exact_refit, layer, seeds

FOUR_EIGHT, ONE_FOUR = NMPattern(4, 8), NMPattern(1, 4)
SQUARE = [NMPattern.parse(text) for text in ("1:2", "1:4", "2:4", "3:4", "2:8", "4:8", "6:8")]


def scaled(stats: LayerStats, factor: float) -> LayerStats:
    """The statistics of the same inputs, all of them multiplied by `factor`."""
    return LayerStats(stats.tokens, stats.square_sum * factor**2, stats.gram * factor**2)


def unit(stats: LayerStats, damping: float = 0.01) -> tuple[torch.Tensor, torch.Tensor]:
    """The damped Gram scaled to unit diagonal, in fp64, and the scale."""
    hessian = dampen(stats.gram, damping).double()
    scale = hessian.diagonal().sqrt()
    return hessian / scale.outer(scale), scale


# --- ISC
# -------------------------------------------------------------------------------------------------------------


@given(seeds, st.sampled_from([TWO_FOUR, ONE_FOUR, FOUR_EIGHT]))
def test_isc_on_one_group_is_the_formula(seed, pattern):
    """Explicit inverses of what is not yet frozen, one column at a time, in fp64."""
    weight, stats = layer(seed, rows=1, width=pattern.group)
    hessian, w = dampen(stats.gram, 0.01).double(), weight[0].double()
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(pattern.group)]
    scores = torch.stack(
        [w[j] ** 2 * (hessian[j, j] + 1 / inverse[0, 0]) for j, inverse in enumerate(inverses)]
    )
    order = scores.sort(descending=True).values
    assume(order[pattern.keep - 1] > order[pattern.keep] * 1.001)
    kept = scores >= order[pattern.keep - 1]
    for j, inverse in enumerate(inverses):
        if not kept[j]:
            w[j:] -= w[j] / inverse[0, 0] * inverse[:, 0]
    result = isc.prune_layer(weight, stats, pattern)
    assert torch.equal(result.mask[0], kept)
    torch.testing.assert_close(result.weight[0].double(), w * kept, rtol=1e-2, atol=1e-3)


@given(seeds)
def test_isc_is_sparsegpt_where_nothing_correlates(seed):
    weight, stats = layer(seed)
    gram = torch.diag(stats.gram.diagonal())
    plain = LayerStats(96, gram.diagonal(), gram)
    one, two = (m.prune_layer(weight, plain, TWO_FOUR) for m in (isc, sparsegpt))
    assert torch.equal(one.mask, two.mask) and torch.equal(one.weight, two.weight)


@given(seeds, st.integers(-5, 5))
@settings(max_examples=10)
def test_the_scale_of_the_activations_changes_no_mask(seed, power):
    """Powers of two scale without rounding, so the equality is exact."""
    weight, stats = layer(seed)
    for name in ("alps", "isc", "ria"):
        one, two = (
            Method.load(name).prune_layer(weight, s, TWO_FOUR)
            for s in (stats, scaled(stats, 4.0**power))
        )
        assert torch.equal(one.mask, two.mask)


def test_the_scale_of_the_activations_changes_the_mask_of_the_released_isc():
    """Its terms have different units: this is the defect that the name stands for."""
    weight, stats = layer(1, rows=64)
    masks = [
        Method.load("isc-released").prune_layer(weight, scaled(stats, 4.0**power), TWO_FOUR).mask
        for power in (-3, 0, 3)
    ]
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_a_given_mask_wins_over_prices():
    weight, stats = layer(2)
    mask = project(weight.abs(), TWO_FOUR)
    one, two = (m.prune_layer(weight, stats, TWO_FOUR, mask=mask) for m in (isc, sparsegpt))
    assert torch.equal(one.mask, mask) and torch.equal(one.weight, two.weight)


# --- RIA
# -------------------------------------------------------------------------------------------------------------


@given(seeds)
def test_ria_is_its_formula(seed):
    weight, stats = layer(seed, rows=3, width=8)
    got = ria.scores(weight, stats)
    for i in range(3):
        for j in range(8):
            size = abs(float(weight[i, j]))
            column, row = (sum(abs(float(x)) for x in line) for line in (weight[:, j], weight[i]))
            norm = (float(stats.square_sum[j]) / stats.tokens) ** 0.5
            assert float(got[i, j]) == pytest.approx(
                (size / column + size / row) * norm**0.5, rel=1e-4
            )


def test_ria_of_dead_columns_and_zero_rows():
    weight, stats = layer(0)
    weight[:, 1] = 0.0
    weight[2] = 0.0
    stats.square_sum[6] = 0.0
    scores = ria.scores(weight, stats)
    assert (
        torch.isfinite(scores).all() and (scores[2] == 0).all() and (scores[:, [1, 6]] == 0).all()
    )
    assert mask_follows(Method.load("ria").prune_layer(weight, stats, TWO_FOUR).mask, TWO_FOUR)


# --- ALPS
# ------------------------------------------------------------------------------------------------------------


@given(seeds, st.sampled_from([TWO_FOUR, ONE_FOUR, FOUR_EIGHT]))
@settings(max_examples=15)
def test_every_iterate_follows_the_pattern(seed, pattern):
    """Property 18."""
    weight, stats = layer(seed)
    hessian, scale = (x.float() for x in unit(stats))
    count = 0
    for mask, sparse in alps.admm(weight * scale, hessian, pattern):
        assert (
            mask_follows(mask, pattern)
            and (sparse[~mask] == 0).all()
            and torch.isfinite(sparse).all()
        )
        count += 1
    assert 3 < count <= alps.ITERATIONS + 1


@given(seeds)
@settings(max_examples=15)
def test_the_first_iterations_are_those_of_the_paper(seed):
    """`B`, `D`, `V` with an explicit inverse in fp64, up to the first look at `ρ`."""
    weight, stats = layer(seed, rows=4, width=16)
    hessian, scale = unit(stats)
    w, rho = weight.double() * scale, alps.RHO
    inverse = torch.linalg.inv(hessian + rho * torch.eye(16))
    free, sparse, dual = w, w, torch.zeros_like(w)
    steps = alps.admm((weight * scale.float()), hessian.float(), TWO_FOUR)
    for number in range(alps.EVERY + 1):
        if number:
            free = (w @ hessian - dual + rho * sparse) @ inverse
        point = free + dual / rho
        sparse = torch.where(project(point.abs(), TWO_FOUR), point, 0.0)
        dual = dual + rho * (free - sparse)
        mask, got = next(steps)
        order = point.abs().unflatten(1, (-1, 4)).sort(-1).values
        assume(float((order[..., 2] - order[..., 1]).min()) > 1e-4)
        assert torch.equal(mask, sparse != 0)
        torch.testing.assert_close(got.double(), sparse, rtol=1e-3, atol=1e-3)


def test_alps_finds_a_better_support_than_the_sweep():
    """Statistical: with exact weights on either mask, the lower error in most of twenty random
    correlated layers."""
    wins = 0
    for seed in range(20):
        weight, stats = layer(seed, rows=8, width=64, tokens=256)
        hessian = dampen(stats.gram, 0.01)
        searched = alps.prune_layer(weight, stats, TWO_FOUR)
        swept = exact_refit(weight, sparsegpt.prune_layer(weight, stats, TWO_FOUR).mask, hessian)
        wins += energy(weight - searched.weight, hessian) <= energy(weight - swept, hessian)
    assert wins >= 17


@given(seeds, st.sampled_from([TWO_FOUR, ONE_FOUR]))
@settings(max_examples=10)
def test_alps_weights_are_nearly_the_best_on_its_mask(seed, pattern):
    weight, stats = layer(seed, rows=4)
    hessian = dampen(stats.gram, 0.01)
    result = alps.prune_layer(weight, stats, pattern)
    best = energy(weight - exact_refit(weight, result.mask, hessian), hessian)
    assert energy(weight - result.weight, hessian) <= best * 1.1


def test_alps_starts_where_it_is_told():
    weight, stats = layer(3)
    mask = project(torch.rand(weight.shape), TWO_FOUR)
    assert torch.equal(alps.prune_layer(weight, stats, TWO_FOUR, mask, iterations=0).mask, mask)
    hessian, scale = (x.float() for x in unit(stats))
    assert torch.equal(next(alps.admm(weight * scale, hessian, TWO_FOUR, mask))[0], mask)


def test_alps_says_when_activations_overflow():
    weight, stats = layer(4)
    stats.gram[0, 0] = float("inf")
    with pytest.raises(NmsparseError, match="Inf"):
        alps.prune_layer(weight, stats, TWO_FOUR)


# --- two-dimensional magnitude
# ---------------------------------------------------------------------------------------


def prune_2d(weight: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    return magnitude_2d.prune_layer(weight, LayerStats.none(), pattern).mask


@pytest.mark.parametrize("spare", [0, 1])
@pytest.mark.parametrize("pattern", SQUARE, ids=str)
def test_both_directions_are_exact(pattern, spare):
    """Rows beyond the last whole tile follow the pattern along the row, by magnitude."""
    weight = torch.randn(3 * pattern.group + spare, 5 * pattern.group)
    weight[0] = 0.0
    weight[:, 1] = 1.0
    mask, whole = prune_2d(weight, pattern), 3 * pattern.group
    assert mask.shape == weight.shape and mask_follows(mask, pattern)
    assert mask_follows(mask[:whole], pattern, axis=0)
    assert torch.equal(mask[whole:], project(weight[whole:].abs(), pattern))


def test_fewer_rows_than_a_tile_are_plain_magnitude():
    weight = torch.randn(3, 16)
    assert torch.equal(prune_2d(weight, TWO_FOUR), project(weight.abs(), TWO_FOUR))


@given(seeds)
@settings(max_examples=10)
def test_two_of_four_tiles_are_optimal(seed):
    """All ways to place two in each column of a tile, filtered by its rows: ninety."""
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))
    mask, pairs = prune_2d(weight, TWO_FOUR), list(combinations(range(4), 2))
    choices = [
        (a, b, c, d)
        for a in pairs
        for b in pairs
        for c in pairs
        for d in pairs
        if all((a + b + c + d).count(row) == 2 for row in range(4))
    ]
    assert len(choices) == 90
    for i in (0, 4):
        for j in (0, 4):
            tile = weight[i : i + 4, j : j + 4].abs().tolist()
            best = max(
                sum(tile[row][column] for column, rows in enumerate(choice) for row in rows)
                for choice in choices
            )
            assert float((weight.abs() * mask)[i : i + 4, j : j + 4].sum()) == pytest.approx(
                best, rel=1e-5
            )


@given(seeds)
@settings(max_examples=20)
def test_one_of_four_is_the_best_assignment(seed):
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))
    mask = prune_2d(weight, ONE_FOUR)
    assert (mask.sum(0) == 1).all() and (mask.sum(1) == 1).all()
    best = max(sum(abs(float(weight[i, p[i]])) for i in range(4)) for p in permutations(range(4)))
    assert float((weight.abs() * mask).sum()) == pytest.approx(best, rel=1e-5)


@given(seeds, st.sampled_from([FOUR_EIGHT, NMPattern(2, 8), NMPattern(6, 8)]))
@settings(max_examples=10)
def test_no_swap_of_two_places_improves_a_wide_tile(seed, pattern):
    """A kept (i, k) and (j, l) against a pruned (i, l) and (j, k): what keeps all sums."""
    scores = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(seed)).abs()
    mask, s = magnitude_2d.transposable(scores, pattern)[0], scores[0]
    gain = (
        s[:, None, None, :] + s[None, :, :, None] - s[:, None, :, None] - s[None, :, None, :]
    )  # [i, j, k, l]
    legal = (
        mask[:, None, :, None]
        & mask[None, :, None, :]
        & ~mask[:, None, None, :]
        & ~mask[None, :, :, None]
    )
    assert legal.any() and float(gain[legal].max()) <= 1e-6


def test_dealing_comes_close_to_the_optimum():
    """Where both are possible: within two per cent of the sum of the best tiles."""
    scores = torch.randn(500, 4, 4, generator=torch.Generator().manual_seed(0)).abs()
    best, dealt = (
        float((scores * f(scores, TWO_FOUR)).sum())
        for f in (magnitude_2d.transposable, magnitude_2d.exchanged)
    )
    assert best * 0.98 < dealt <= best * (1 + 1e-6)
