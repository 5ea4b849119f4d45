"""Refinements of one layer: masks by swaps, by group descent and by mean error, weights by ADMM,
biases.

And what every registered refinement must hold: the pattern, odd layers, the whole prune stage, the
same bits on resume.
"""

from __future__ import annotations

from itertools import combinations, pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from safetensors.torch import load_file
from torch import nn

from nmsparse_deploy.find.calibration.layer_stats import LayerStats
from nmsparse_deploy.find.methods.base import LayerResult, Method
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.find.refine import admm, bias, dsnot, group_descent, swap
from nmsparse_deploy.find.refine.base import BlockPair, PrunedLayer
from nmsparse_deploy.masks import MaskSet, mask_follows, project
from nmsparse_deploy.pattern import TWO_FOUR, NMPattern
from nmsparse_deploy.prove.group_counter import check
from nmsparse_deploy.recipe import Admm, AnyStep, Bias, Dsnot, GroupDescent, Prune, Swap, validate
from nmsparse_deploy.registry import REFINEMENTS
from tests.find.test_prune import Stop, mask_bytes, spec, stop_at
from tests.fixtures import pico

PATTERNS = [NMPattern.parse(text) for text in ("2:4", "1:4", "4:8", "2:8")]
LAYER_STEPS = [name for name in REFINEMENTS.names() if REFINEMENTS[name].level == "layer"]
seeds = st.integers(0, 2**31)
patterns = st.sampled_from(PATTERNS)


def settings_of(name: str, **changes):
    """The step as a recipe would make it."""
    return TypeAdapter(AnyStep).validate_python({"name": name, **changes})


def problem(
    seed: int,
    pattern: NMPattern = TWO_FOUR,
    rows: int = 6,
    width: int = 16,
    tokens: int = 64,
    method: str | None = None,
) -> tuple[PrunedLayer, torch.Tensor]:
    """A layer under a random mask (or a method's), and its inputs: correlated, with means that are
    not zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    x = torch.randn(tokens, width, generator=generator) @ torch.randn(
        width, width, generator=generator
    )
    x = x + 3 * torch.randn(width, generator=generator)
    gram = x.T @ x
    stats = LayerStats(tokens, gram.diagonal().clone(), gram, gram.clone(), x.sum(0))
    start = LayerResult(project(torch.rand(weight.shape, generator=generator), pattern))
    if method is not None:
        start = Method.load(method).prune_layer(weight, stats, pattern)
    return PrunedLayer(weight, stats, pattern, 1, weight.shape, start), x


def losses(layer: PrunedLayer, mask: torch.Tensor) -> torch.Tensor:
    """Error of every row from the definition: `e G eᵀ` of what the mask takes away."""
    lost = torch.where(mask, 0.0, layer.dense).double()
    return ((lost @ layer.stats.gram.double()) * lost).sum(1)


def every_mask(pattern: NMPattern) -> list[torch.Tensor]:
    """All masks of one group."""
    return [
        torch.tensor([i in kept for i in range(pattern.group)])
        for kept in combinations(range(pattern.group), pattern.keep)
    ]


# --- swaps and group descent
# -----------------------------------------------------------------------------------------


@given(seeds, patterns)
def test_the_price_of_a_swap_is_the_change_of_the_loss(seed, pattern):
    """Property 11: formula (2) for every pair of every group, against the loss computed anew."""
    layer, _ = problem(seed, pattern, rows=2)
    w, gram = swap.precise(layer)
    mask, group = layer.result.mask, pattern.group
    c = torch.where(mask, 0.0, w) @ gram
    before = losses(layer, mask)
    for first in range(0, w.shape[1], group):
        here = slice(first, first + group)
        got = swap.change(w[:, here], c[:, here], mask[:, here], mask[:, here], gram[here, here])
        for row, p, u in product(range(2), range(group), range(group)):
            if not mask[row, first + p] or mask[row, first + u]:
                assert got[row, p, u] == torch.inf
                continue
            other = mask.clone()
            other[row, first + p], other[row, first + u] = False, True
            assert float(got[row, p, u]) == pytest.approx(
                float((losses(layer, other) - before)[row]), rel=1e-6, abs=1e-8 * float(before[row])
            )


@given(seeds, patterns, st.sampled_from(["group-descent", "swap"]))
def test_the_error_never_rises(seed, pattern, name):
    layer, _ = problem(seed, pattern)
    limit = {"group-descent": "sweeps", "swap": "steps"}[name]
    masks = [layer.result.mask]
    masks += [
        REFINEMENTS.load(name)(layer, settings_of(name, **{limit: n})).mask
        for n in (1, 2, 3, 5, 50)
    ]
    values = [losses(layer, mask) for mask in masks]
    assert all((after <= before * (1 + 1e-9)).all() for before, after in pairwise(values))


@given(seeds, patterns)
def test_descent_ends_where_no_other_pattern_of_a_group_is_better(seed, pattern):
    layer, _ = problem(seed, pattern)
    mask = group_descent.refine(layer, GroupDescent(sweeps=100)).mask
    reached, start = losses(layer, mask), losses(layer, layer.result.mask)
    for first, choice in product(range(0, 16, pattern.group), every_mask(pattern)):
        other = mask.clone()
        other[:, first : first + pattern.group] = choice
        assert (losses(layer, other) >= reached - 2 * swap.WORTH * start).all()


@given(seeds, st.sampled_from(["swap", "group-descent"]))
def test_swaps_end_where_no_swap_is_better(seed, name):
    """Also for group descent on a pattern that is too wide to enumerate."""
    pattern = NMPattern(2, 4) if name == "swap" else NMPattern(5, 10)
    layer, _ = problem(seed, pattern, rows=3, width=20)
    mask = REFINEMENTS.load(name)(layer, settings_of(name)).mask
    reached, start = losses(layer, mask), losses(layer, layer.result.mask)
    assert mask_follows(mask, pattern) and (reached <= start).all()
    for first, p, u in product(
        range(0, 20, pattern.group), range(pattern.group), range(pattern.group)
    ):
        other = mask.clone()
        rows = mask[:, first + p] & ~mask[:, first + u]
        other[rows, first + p], other[rows, first + u] = False, True
        assert (losses(layer, other) >= reached - 2 * swap.WORTH * start).all()


@given(seeds)
def test_one_group_alone_ends_at_the_best_mask_of_all(seed):
    layer, _ = problem(seed, TWO_FOUR, rows=8, width=4)
    got = losses(layer, group_descent.refine(layer, GroupDescent(sweeps=1)).mask)
    best = torch.stack([losses(layer, mask.expand(8, 4)) for mask in every_mask(TWO_FOUR)]).amin(0)
    assert (got <= best + 2 * swap.WORTH * losses(layer, layer.result.mask)).all()


@given(seeds, st.sampled_from(["group-descent", "swap"]), st.sampled_from([0.5, 0.9, 1.0]))
def test_protected_weights_stay(seed, name, share):
    layer, x = problem(seed, rows=5, width=32)
    mask = REFINEMENTS.load(name)(layer, settings_of(name, protect=share)).mask
    scores = layer.dense.abs() * x.square().mean(0).sqrt()
    for row in range(5):
        kept = layer.result.mask[row].nonzero().flatten()
        strongest = kept[scores[row, kept].argsort(descending=True)][: round(share * len(kept))]
        assert mask[row, strongest].all()
    assert share < 1 or torch.equal(mask, layer.result.mask)


def test_frozen_masks_come_back_to_the_original_weights():
    """From a method that has moved the weights, these three return to the original ones."""
    layer, _ = problem(0, method="sparsegpt")
    for name in ("group-descent", "swap", "dsnot"):
        assert REFINEMENTS.load(name)(layer, settings_of(name)).weight is None
        assert REFINEMENTS[name].changes == "mask"


def test_long_rows_and_many_rows_are_cut_without_a_trace(monkeypatch):
    """Blocks of columns and pieces of rows are a matter of memory only."""
    layer, _ = problem(3, rows=9, width=32)
    whole = swap.refine(layer, Swap()).mask, group_descent.refine(layer, GroupDescent()).mask
    monkeypatch.setattr(swap, "CELLS", 1)
    monkeypatch.setattr(group_descent, "BLOCK_SIZE", 8)
    assert torch.equal(whole[0], swap.refine(layer, Swap()).mask)
    assert torch.equal(whole[1], group_descent.refine(layer, GroupDescent()).mask)


# --- DSnoT
# -----------------------------------------------------------------------------------------------------------


@given(seeds, patterns)
def test_the_mean_error_of_every_row_shrinks(seed, pattern):
    """At every cycle each row keeps the pattern and has a mean error that is no larger, measured on
    the inputs."""
    layer, x = problem(seed, pattern)
    masks = [layer.result.mask] + [dsnot.balance(layer, n, 0.1) for n in (1, 2, 3, 50)]
    errors = [
        (torch.where(mask, 0.0, layer.dense).double() @ x.double().mean(0)).abs() for mask in masks
    ]
    for before, after in pairwise(errors):
        assert (after <= before + 1e-4).all()
    assert all(mask_follows(mask, pattern) for mask in masks)
    for before, after in pairwise(masks[:4]):  # one swap per row and cycle, inside one group
        moved = (before != after).unflatten(1, (-1, pattern.group)).sum(2)
        assert set(moved.flatten().tolist()) <= {0, 2} and (moved.sum(1) <= 2).all()
    settled = errors[0] < 0.1
    assert torch.equal(masks[-1][settled], masks[0][settled])


def test_dsnot_takes_most_of_the_mean_error_away():
    layer, x = problem(1, rows=64, width=64, tokens=256, method="wanda")
    before, after = (
        float((torch.where(mask, 0.0, layer.dense) @ x.mean(0)).abs().mean())
        for mask in (layer.result.mask, dsnot.refine(layer, Dsnot()).mask)
    )
    assert after < 0.3 * before


def by_hand(
    shares: list[float], variances: list[float], kept: list[bool], pattern: NMPattern
) -> list[bool]:
    """DSnoT on one row whose inputs all have mean 1, so that a weight is its share of the mean."""
    weight, square = torch.tensor([shares]), torch.tensor(variances) + 1
    stats = LayerStats(10, 10 * square, None, None, torch.full_like(square, 10.0))
    layer = PrunedLayer(weight, stats, pattern, 1, weight.shape, LayerResult(torch.tensor([kept])))
    return dsnot.refine(layer, Dsnot()).mask[0].tolist()


def test_dsnot_regrows_by_share_over_variance():
    """ε = 2.5: the smaller but steadier share returns, the only one of the other sign leaves, and
    no pair is left."""
    assert by_hand([1.0, 1.5, -0.1, 3.0], [1, 4, 1, 1], [False, False, True, True], TWO_FOUR) == [
        True,
        False,
        False,
        True,
    ]


def test_dsnot_stops_where_the_sign_flips():
    """ε goes from 1.5 to -0.7; the second group could bring it to 0.1, but the row is done."""
    assert by_hand(
        [2.0, -0.2, -0.5, 0.3], [1] * 4, [False, True, False, True], NMPattern(1, 2)
    ) == [True, False, False, True]


# --- ADMM
# ------------------------------------------------------------------------------------------------------------


def damped(layer: PrunedLayer, damping: float) -> torch.Tensor:
    """What ADMM minimises the distance in: the Gram plus a ridge that is relative in every
    column."""
    gram = layer.stats.gram.double()
    return gram + damping * torch.diag(gram.diagonal())


def energies(lost: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    return ((lost.double() @ hessian) * lost.double()).sum(1)


def optimum(layer: PrunedLayer, mask: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """The least error of every row on a mask: `e_P (H⁻¹_PP)⁻¹ e_Pᵀ` over the pruned columns."""
    inverse, best = torch.linalg.inv(hessian), []
    for row, kept in zip(layer.dense.double(), mask):
        out = (~kept).nonzero().flatten()
        best.append(row[out] @ torch.linalg.solve(inverse[out][:, out], row[out]))
    return torch.stack(best)


@given(seeds, patterns, st.booleans())
def test_admm_comes_to_the_exact_optimum_of_its_mask(seed, pattern, gradual):
    """Property 18: twenty iterations are near, a few hundred are there; never below what is
    possible."""
    layer, _ = problem(seed, pattern, method="wanda")
    hessian = damped(layer, 0.1)
    short, long = (admm.refine(layer, Admm(steps=n, gradual=gradual)) for n in (20, 600))
    assert mask_follows(short.mask, pattern) and (short.weight[~short.mask] == 0).all()
    assert gradual or torch.equal(short.mask, layer.result.mask)
    for result, slack in ((short, 0.3), (long, 1e-2)):
        got, best = (
            energies(layer.dense - result.weight, hessian).sum(),
            optimum(layer, result.mask, hessian).sum(),
        )
        assert best * (1 - 1e-4) <= got <= best * (1 + slack)


def test_the_soft_mask_finds_the_better_support():
    """Not a theorem: in most random layers the mask chosen on the way has a lower optimum than
    Wanda's."""
    wins = 0
    for seed in range(10):
        layer, _ = problem(seed, rows=16, width=32, method="wanda")
        mask = admm.refine(layer, Admm()).mask
        wins += bool(
            optimum(layer, mask, damped(layer, 0.1)).sum()
            < optimum(layer, layer.result.mask, damped(layer, 0.1)).sum()
        )
    assert wins >= 9


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("pattern", [*PATTERNS, NMPattern(1, 2)], ids=str)
def test_soft_masks_tighten_to_the_pattern(pattern, steps):
    moving = max(1, round(admm.SOFT * steps))
    kept = [admm.level(pattern, step, moving).keep for step in range(moving)]
    assert kept[-1] == pattern.keep and kept == sorted(kept, reverse=True)
    assert moving < pattern.zeros or kept[0] == pattern.group - 1


# --- biases
# ----------------------------------------------------------------------------------------------------------


def with_bias(seed: int, method: str) -> tuple[PrunedLayer, torch.Tensor, BlockPair]:
    """One biased and one plain layer that share inputs, as a block."""
    layer, x = problem(seed, method=method)
    module = nn.ModuleDict({"biased": nn.Linear(16, 6), "plain": nn.Linear(16, 6, bias=False)})
    for child in module.values():
        child.weight.data.copy_(layer.dense)
    block = BlockPair(
        module,
        module,
        {"biased.weight": layer, "plain.weight": layer},
        [x],
        None,
        lambda m, i, h: h,
    )
    return layer, x, block


@given(seeds, st.sampled_from(["wanda", "sparsegpt"]))
def test_a_corrected_bias_has_no_mean_error_and_never_more_error(seed, method):
    """Property 14, and no other bias does better."""
    layer, x, block = with_bias(seed, method)
    old = block.dense.get_parameter("biased.bias").detach().double()
    new = bias.refine(block, Bias()).others["biased.bias"].double()
    wanted = x.double() @ layer.dense.double().T + old
    without = x.double() @ layer.weight.double().T

    def error(b: torch.Tensor) -> torch.Tensor:
        return (wanted - without - b).square().sum(0)

    size = wanted.abs().max()
    assert (wanted - without - new).mean(0).abs().max() <= 1e-5 * size
    assert (error(new) <= error(old) + 1e-5 * size**2).all()
    for nudge in (0.1, -0.1):
        assert (error(new) <= error(new + nudge * size)).all()


def test_layers_without_a_bias_are_counted_and_left_alone():
    _, _, block = with_bias(0, "wanda")
    done = bias.refine(block, Bias())
    assert list(done.others) == ["biased.bias"] and not done.layers
    assert (done.facts.corrected, done.facts.without) == (1, 1)


def test_a_bias_is_corrected_once_however_often_it_is_asked(texts, gpt2_dir, tmp_path):
    """In the first block, whose inputs nothing has changed yet, only biases differ; asking twice is
    asking once."""
    plain, once, twice = (
        prune(str(gpt2_dir), refined(texts, ["bias"] * n), tmp_path / str(n)) for n in range(3)
    )
    before, after, again = (
        load_file(run / "model/model.safetensors") for run in (plain, once, twice)
    )
    moved = {
        name
        for name in before
        if ".h.1." not in name and not torch.equal(before[name], after[name])
    }
    assert {name.split("h.0.")[1] for name in moved} == {
        "attn.c_attn.bias",
        "attn.c_proj.bias",
        "mlp.c_fc.bias",
        "mlp.c_proj.bias",
    }
    assert all(torch.equal(after[name], again[name]) for name in after)
    facts = once.read_json("refinements.json")
    assert [(row["name"], row["corrected"], row["without a bias"]) for row in facts] == [
        ("bias", 4, 0)
    ] * 2


# --- every registered refinement
# -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", LAYER_STEPS)
def test_every_layer_refinement_is_exact(name, pattern, method):
    layer, _ = problem(3, pattern, rows=12, width=32, tokens=96, method=method)
    refinement = REFINEMENTS[name]
    result = REFINEMENTS.load(name)(layer, settings_of(name))
    assert result.mask.dtype == torch.bool and mask_follows(result.mask, pattern)
    assert refinement.changes != "weights" or torch.equal(result.mask, layer.result.mask)
    assert refinement.changes != "mask" or result.weight is None
    for dtype in (torch.float32, torch.bfloat16):
        kept = layer.dense if result.weight is None else result.weight
        found = check(torch.where(result.mask, kept, 0.0).to(dtype), pattern)
        assert found.bad == 0 and found.negative_zeros == 0 and found.nonfinite == 0


@pytest.mark.parametrize("name", LAYER_STEPS)
def test_every_layer_refinement_survives_odd_layers(name):
    """Property 25: dead and duplicated columns, rows of zeros and of ties, one token, no signal at
    all, one group."""
    refine, step = REFINEMENTS.load(name), settings_of(name)
    layer, x = problem(5, rows=8, width=32)
    weight = layer.dense.clone()
    weight[4], weight[5] = 0.0, 1.0
    dead, twin, single = x.clone(), x.clone(), x[:1]
    dead[:, [0, 7]] = 0.0
    twin[:, 3] = twin[:, 2]
    for inputs in (dead, twin, single, torch.zeros_like(x), torch.ones_like(x), x[:, :4]):
        gram, width = inputs.T @ inputs, inputs.shape[1]
        stats = LayerStats(len(inputs), gram.diagonal().clone(), gram, gram.clone(), inputs.sum(0))
        w = weight[:, :width]
        start = Method.load("sparsegpt").prune_layer(w, stats, TWO_FOUR)
        result = refine(PrunedLayer(w, stats, TWO_FOUR, 1, w.shape, start), step)
        assert mask_follows(result.mask, TWO_FOUR)
        assert result.weight is None or torch.isfinite(result.weight).all()


@pytest.fixture(scope="module")
def gpt2_dir(tmp_path_factory):
    """GPT-2 has biases, and weights that group along their first axis."""
    return pico.save(pico.gpt2(), tmp_path_factory.mktemp("models") / "gpt2")


def refined(texts, names) -> Prune:
    quick = {"reconstruct": {"epochs": 1}}
    return validate(
        Prune,
        {
            **spec(texts, "wanda").model_dump(),
            "refine": [{"name": name, **quick.get(name, {})} for name in names],
        },
    )


@pytest.mark.parametrize("name", REFINEMENTS.names())
def test_every_refinement_ends_verified_and_resumes_to_the_same_bits(
    name, texts, gpt2_dir, tmp_path
):
    recipe = refined(texts, [name])
    whole = prune(str(gpt2_dir), recipe, tmp_path / "whole")
    masks = MaskSet.load(whole / "masks.safetensors").masks
    weights, dense = (
        load_file(folder / "model.safetensors") for folder in (whole / "model", gpt2_dir)
    )
    for key, mask in masks.items():
        weight = weights[key]
        assert mask.axis == 0 and (weight[~mask.unpack()] == 0).all()
        assert mask_follows(mask.unpack(), mask.pattern, mask.axis)
        assert REFINEMENTS[name].changes != "mask" or torch.equal(weight, mask.apply(dense[key]))
    with pytest.raises(Stop):
        prune(str(gpt2_dir), recipe, tmp_path / "broken", progress=stop_at(1))
    resumed = prune(str(gpt2_dir), recipe, tmp_path / "broken")
    assert mask_bytes(resumed) == mask_bytes(whole)
    assert (resumed / "model/model.safetensors").read_bytes() == (
        whole / "model/model.safetensors"
    ).read_bytes()
