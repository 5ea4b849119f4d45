"""Every registered method on every pattern and dtype, and the mathematics of the sweep."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.find.calibration.layer_stats import LayerStats
from nmsparse_deploy.find.methods import group_obs, group_obs_ordered
from nmsparse_deploy.find.methods.base import Method, relative_error
from nmsparse_deploy.find.methods.hessian import dampen, inverse_factor
from nmsparse_deploy.find.methods.sparsegpt import freezer, prune_layer
from nmsparse_deploy.find.methods.sweep import sweep
from nmsparse_deploy.masks import mask_follows, project
from nmsparse_deploy.pattern import TWO_FOUR, NMPattern
from nmsparse_deploy.prove.group_counter import check
from nmsparse_deploy.registry import METHODS

METHODS_HERE = [name for name in METHODS.names() if METHODS[name].package is None]
"""Those that need no other library; the others have tests of their own."""

PATTERNS = [NMPattern.parse(text) for text in ("2:4", "1:4", "4:8", "2:8")]
seeds = st.integers(0, 2**31)


def layer(
    seed: int, rows: int = 12, width: int = 32, tokens: int = 96
) -> tuple[torch.Tensor, LayerStats]:
    """A random weight and the statistics of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    x = torch.randn(tokens, width, generator=generator) @ torch.randn(
        width, width, generator=generator
    )
    gram = x.T @ x
    return weight, LayerStats(tokens, gram.diagonal().clone(), gram)


def energy(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(((weight.double() @ hessian.double()) * weight.double()).sum())


def exact_refit(weight: torch.Tensor, mask: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """The least-squares optimum on a mask, row by row: the independent witness."""
    weight, hessian = weight.double(), hessian.double()
    best = torch.zeros_like(weight)
    for row in range(len(weight)):
        kept = mask[row].nonzero().flatten()
        best[row, kept] = torch.linalg.solve(hessian[kept][:, kept], (hessian[kept] @ weight[row]))
    return best


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", METHODS_HERE)
def test_every_method_is_exact(name, pattern, dtype):
    method = Method.load(name)
    weight, stats = layer(3)
    result = method.prune_layer(weight.to(dtype).float(), stats, pattern)
    assert result.mask.dtype == torch.bool and mask_follows(result.mask, pattern)
    assert (result.weight is not None) == method.facts.updates_weights
    kept = weight if result.weight is None else result.weight
    baked = torch.where(result.mask, kept.to(dtype), 0)
    assert check(baked, pattern).bad == 0 and check(baked, pattern).negative_zeros == 0


@pytest.mark.parametrize("name", METHODS_HERE)
def test_every_method_survives_odd_layers(name):
    """Dead, duplicated and all-zero columns and rows, ties, one token, one group."""
    method = Method.load(name)
    weight, stats = layer(5)
    weight[:, 3] = weight[:, 2]
    weight[4] = 0.0
    weight[5] = 1.0
    for gram in (_kill(stats.gram, [0, 7]), torch.outer(weight[0], weight[0]), torch.zeros(32, 32)):
        odd = LayerStats(96, gram.diagonal().clone(), gram)
        result = method.prune_layer(weight, odd, TWO_FOUR)
        assert mask_follows(result.mask, TWO_FOUR)
        assert result.weight is None or torch.isfinite(result.weight).all()
    tiny = method.prune_layer(
        weight[:, :4], LayerStats(96, stats.square_sum[:4], stats.gram[:4, :4]), TWO_FOUR
    )
    assert mask_follows(tiny.mask, TWO_FOUR)


def _kill(gram: torch.Tensor, columns: list[int]) -> torch.Tensor:
    dead = gram.clone()
    dead[columns] = 0
    dead[:, columns] = 0
    return dead


@given(seeds)
def test_wanda_is_optimal_for_a_diagonal_gram(seed):
    weight, stats = layer(seed, rows=3, width=8)
    diagonal = stats.gram.diagonal()
    mask = Method.load("wanda").prune_layer(weight, stats, TWO_FOUR).mask
    scores = weight.square() * diagonal
    assert torch.equal(mask, project(scores, TWO_FOUR))


@given(seeds)
def test_inverse_factor(seed):
    """Property 1: UᵀU = H⁻¹, trailing blocks factor trailing inverses, d² is the trailing inverse's
    corner."""
    _, stats = layer(seed, width=16)
    hessian = dampen(stats.gram, 0.01)
    factor = inverse_factor(stats.gram, 0.01).double()
    assert torch.equal(factor, factor.triu())
    for start in (0, 5, 12):
        block = factor[start:, start:]
        inverse = torch.linalg.inv(hessian[start:, start:])
        torch.testing.assert_close(
            block.T @ block, inverse, rtol=1e-4, atol=1e-6 * float(inverse.abs().max())
        )


@given(seeds, st.integers(0, 15))
def test_single_weight_removal(seed, column):
    """Property 2: forcing one weight to zero costs w²/[H⁻¹]_pp, and the best answer is constrained
    least squares."""
    weight, stats = layer(seed, rows=1, width=16)
    hessian = dampen(stats.gram, 0.01)
    inverse = torch.linalg.inv(hessian)
    w = weight.double()
    update = w - w[0, column] / inverse[column, column] * inverse[column]
    mask = torch.ones(1, 16, dtype=torch.bool)
    mask[0, column] = False
    torch.testing.assert_close(update, exact_refit(weight, mask, hessian), rtol=1e-5, atol=1e-6)
    cost = float(w[0, column] ** 2 / inverse[column, column])
    assert energy(update - w, hessian) == pytest.approx(cost, rel=1e-6)


@given(seeds, st.sampled_from(PATTERNS))
def test_block_size_does_not_matter(seed, pattern):
    """Property 3."""
    weight, stats = layer(seed)
    factor = inverse_factor(stats.gram, 0.01)
    reference, mask, loss = sweep(weight, factor, pattern, freezer(pattern), block_size=32)
    for columns in (1, 8, 16):
        other, other_mask, other_loss = sweep(
            weight, factor, pattern, freezer(pattern), block_size=columns
        )
        assert torch.equal(mask, other_mask)
        torch.testing.assert_close(reference, other, rtol=1e-4, atol=1e-4)
        assert loss == pytest.approx(other_loss, rel=1e-4)


@given(seeds, st.sampled_from(PATTERNS))
def test_reported_loss_is_the_damped_error(seed, pattern):
    """Property 4, and 12: the damped error is the plain one plus λ times the distance moved."""
    weight, stats = layer(seed)
    pruned, _, loss = sweep(weight, inverse_factor(stats.gram, 0.01), pattern, freezer(pattern))
    hessian = dampen(stats.gram, 0.01)
    assert loss == pytest.approx(energy(weight - pruned, hessian), rel=1e-3)
    strength = 0.01 * float(stats.gram.diagonal().double().mean())
    plain = energy(weight - pruned, stats.gram) + strength * float(
        (weight - pruned).double().square().sum()
    )
    assert loss == pytest.approx(plain, rel=1e-3)


@given(seeds, st.sampled_from(PATTERNS))
def test_group_obs_costs_add_up(seed, pattern):
    """Property 9: the chosen costs sum to the final error, whatever the length of the lazy
    batch."""
    weight, stats = layer(seed)
    factor, hessian = inverse_factor(stats.gram, 0.01), dampen(stats.gram, 0.01)
    first, mask, loss = sweep(
        weight, factor, pattern, group_obs.enumerating(pattern), block_size=32
    )
    assert loss == pytest.approx(energy(weight - first, hessian), rel=1e-3)
    other, other_mask, _ = sweep(
        weight, factor, pattern, group_obs.enumerating(pattern), block_size=8
    )
    assert torch.equal(mask, other_mask)
    torch.testing.assert_close(first, other, rtol=1e-3, atol=1e-3)


@given(seeds)
def test_group_obs_is_exact_on_one_group(seed):
    """On a layer of a single group it finds the best mask and the best weights of all, by brute
    force."""
    weight, stats = layer(seed, rows=5, width=4)
    hessian = dampen(stats.gram, 0.01)
    result = group_obs.prune_layer(weight, stats, TWO_FOUR)
    for row in range(5):
        best = min(
            energy(
                weight[row : row + 1] - exact_refit(weight[row : row + 1], mask, hessian), hessian
            )
            for mask in (
                torch.tensor([[i in pair for i in range(4)]]) for pair in combinations(range(4), 2)
            )
        )
        mine = energy(weight[row : row + 1] - result.weight[row : row + 1], hessian)
        assert mine == pytest.approx(best, rel=1e-3, abs=1e-6)


@given(seeds)
def test_group_obs_ways_agree(seed):
    """Enumeration and the per-row systems give the same weights for the same mask."""
    weight, stats = layer(seed)
    result = group_obs.prune_layer(weight, stats, TWO_FOUR)
    again = group_obs.prune_layer(weight, stats, TWO_FOUR, mask=result.mask)
    assert torch.equal(again.mask, result.mask)
    torch.testing.assert_close(again.weight, result.weight, rtol=1e-3, atol=1e-3)


@given(seeds, st.sampled_from(PATTERNS))
def test_groups_in_order_of_damage_stay_whole(seed, pattern):
    weight, stats = layer(seed, rows=5)
    order = group_obs_ordered.by_damage(weight, stats.gram.diagonal(), pattern)
    groups = order.view(-1, pattern.group)
    assert torch.equal(groups % pattern.group, torch.arange(pattern.group).expand_as(groups))
    assert torch.equal(order.sort().values, torch.arange(32))
    lost = torch.where(
        project(weight.square() * stats.gram.diagonal(), pattern),
        0.0,
        weight.square() * stats.gram.diagonal(),
    )
    damage = lost.sum(0).view(-1, pattern.group).sum(1)[groups[:, 0] // pattern.group]
    assert (damage.diff() <= 1e-5 * damage[0]).all()


def test_the_order_of_damage_pays_on_average_and_a_given_mask_is_kept():
    ratios = []
    for seed in range(8):
        weight, stats = layer(seed, rows=32, width=96, tokens=384)
        plain, ordered = (
            Method.load(name).prune_layer(weight, stats, TWO_FOUR)
            for name in ("group-obs", "group-obs-ordered")
        )
        errors = [relative_error(weight, result.weight, stats.gram) for result in (plain, ordered)]
        ratios.append(errors[1] / errors[0])
        again = group_obs_ordered.prune_layer(weight, stats, TWO_FOUR, plain.mask)
        assert torch.equal(again.mask, plain.mask)
    assert sum(ratios) / len(ratios) < 0.985


def test_group_obs_usually_beats_sparsegpt():
    """Statistical, not a theorem: lower layer error in most of twenty random correlated layers."""
    wins = 0
    for seed in range(20):
        weight, stats = layer(seed, rows=32, width=64, tokens=256)
        hessian = dampen(stats.gram, 0.01)
        one, two = (m(weight, stats, TWO_FOUR).weight for m in (group_obs.prune_layer, prune_layer))
        wins += energy(weight - one, hessian) < energy(weight - two, hessian)
    assert wins >= 15


@given(seeds)
def test_between_no_update_and_the_exact_optimum(seed):
    """Property 5."""
    weight, stats = layer(seed)
    hessian = dampen(stats.gram, 0.01)
    pruned, mask, _ = sweep(weight, inverse_factor(stats.gram, 0.01), TWO_FOUR, freezer(TWO_FOUR))
    best = energy(weight - exact_refit(weight, mask, hessian), hessian)
    swept = energy(weight - pruned, hessian)
    untouched = energy(torch.where(mask, 0, weight), hessian)
    assert best <= swept * (1 + 1e-4) and swept <= untouched * (1 + 1e-4)


@given(seeds)
def test_column_order_decides_what_the_sweep_reaches(seed):
    """Property 6: pruned columns first gives the exact optimum; pruned columns last gives no update
    at all."""
    weight, stats = layer(seed)
    hessian = dampen(stats.gram, 0.01)
    factor = inverse_factor(stats.gram, 0.01)
    first = torch.zeros(12, 32, dtype=torch.bool)
    first[:, 16:] = True
    swept, _, _ = sweep(weight, factor, TWO_FOUR, freezer(TWO_FOUR), mask=first)
    torch.testing.assert_close(
        swept.double(), exact_refit(weight, first, hessian), rtol=1e-3, atol=1e-3
    )
    swept, _, _ = sweep(weight, factor, TWO_FOUR, freezer(TWO_FOUR), mask=~first)
    torch.testing.assert_close(swept, torch.where(~first, weight, 0))


@given(seeds)
def test_diagonal_gram_makes_sparsegpt_wanda(seed):
    """Property 7."""
    weight, stats = layer(seed)
    gram = torch.diag(stats.gram.diagonal())
    plain = LayerStats(96, gram.diagonal(), gram)
    result = prune_layer(weight, plain, TWO_FOUR, damping=1e-9)
    wanda = Method.load("wanda").prune_layer(weight, plain, TWO_FOUR).mask
    assert torch.equal(result.mask, wanda)
    torch.testing.assert_close(result.weight, torch.where(wanda, weight, 0))


@given(seeds)
def test_channel_scaling_changes_nothing(seed):
    """Property 8: scaling an input by c and its weights by 1/c leaves mask and function alone.

    Powers of two scale without rounding, so the equality is exact.
    """
    weight, stats = layer(seed, tokens=512)
    assume(
        float(torch.linalg.eigvalsh(stats.gram)[0]) > 1
    )  # no need of damping, which is not scaled
    scale = torch.exp2(
        torch.randint(-2, 3, (32,), generator=torch.Generator().manual_seed(seed)).float()
    )
    gram = stats.gram * scale[:, None] * scale[None]
    scaled = LayerStats(512, gram.diagonal().clone(), gram)
    for name in ("wanda", "sparsegpt"):
        method = Method.load(name)
        extra = {"damping": 0.0} if name == "sparsegpt" else {}
        one = method.prune_layer(weight, stats, TWO_FOUR, **extra)
        two = method.prune_layer(weight / scale, scaled, TWO_FOUR, **extra)
        assert torch.equal(one.mask, two.mask)
        if one.weight is not None:
            assert torch.equal(one.weight, two.weight * scale)


def test_bad_grams_climb_the_ladder_or_fail_loudly():
    weight, stats = layer(0)
    bad = stats.gram - 1.5 * torch.eye(32) * float(torch.linalg.eigvalsh(stats.gram)[0] + 1)
    assert torch.isfinite(inverse_factor(bad, 0.0001)).all()
    assert torch.isfinite(inverse_factor(bad, 0.0)).all()
    stats.gram[0, 0] = float("nan")
    with pytest.raises(NmsparseError, match="NaN"):
        prune_layer(weight, stats, TWO_FOUR)


def test_relative_error_of_nothing_and_everything():
    weight, stats = layer(1)
    assert relative_error(weight, weight, stats.gram) == 0.0
    assert relative_error(weight, torch.zeros_like(weight), stats.gram) == pytest.approx(1.0)
    assert relative_error(torch.zeros(2, 4), torch.zeros(2, 4), torch.eye(4)) == 0.0
