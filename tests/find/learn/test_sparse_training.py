"""Training survivors: the pattern holds at every step, whatever moves, and the start is what came
in."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.find.learn.mask_parametrization import detach, original_weight, showing
from nmsparse_deploy.find.learn.sparse_training import Adapters, FixedMask, SrSte, SSte, shrunk
from nmsparse_deploy.find.learn.step_context import StepContext
from nmsparse_deploy.find.refine.base import PrunedModel
from nmsparse_deploy.find.refine.finetune import FinetuneLearner, refine
from nmsparse_deploy.masks import mask_follows, project
from nmsparse_deploy.pattern import TWO_FOUR, NMPattern
from nmsparse_deploy.prove.group_counter import check
from nmsparse_deploy.recipe import Finetune
from tests.fixtures.toy_learner import Toy, interrupted

WAYS = ["fixed", "sr-ste", "s-ste", "adapters"]
SHORT = {
    "steps": 20,
    "evaluate_every": 5,
    "checkpoint_every": 5,
    "warmup": 0,
    "refresh": 2,
    "rate": 1e-2,
}
seeds = st.integers(0, 2**31)


class Sparse(Toy):
    """The toy with its dense outputs as targets, and only what a magnitude mask keeps in its
    weights."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed=seed)
        with torch.no_grad():
            self.targets = [self.module(x) for x in self.inputs]
            self.dense = {
                site.name: self.module.get_parameter(path).clone()
                for path, site in self.sites.items()
            }
            self.masks = self.magnitude()
            for path, site in self.sites.items():
                self.module.get_parameter(path).mul_(self.masks[site.name])


def tune(how, toy=None, checkpoints=None, **changes):
    toy = toy or Sparse()
    whole = PrunedModel(toy, toy.masks, toy.dense.__getitem__, 0, checkpoints, lambda *_: None)
    return refine(whole, Finetune(how=how, **(SHORT | changes)))


@pytest.mark.parametrize("how", WAYS)
def test_the_pattern_holds_at_every_step_and_the_loss_falls(how, monkeypatch):
    toy, seen = Sparse(), []

    def look(self, context, after_step=FinetuneLearner.after_step):
        after_step(self, context)
        for mask in self.masks.values():
            with showing(toy.module, "hard"):
                shown = toy.module.get_submodule(mask.site.path.split(".")[0]).weight
            assert check(shown.contiguous(), TWO_FOUR).bad == 0
            soft = mask.parametrization.soft(
                mask.values, original_weight(toy.module, mask.site), context, "w"
            )
            assert check(soft.contiguous(), TWO_FOUR).bad == 0
        learnt = self.finish()
        assert all(mask_follows(learnt[name].mask, TWO_FOUR) for name in toy.masks)
        seen.append(context.step)

    monkeypatch.setattr(FinetuneLearner, "after_step", look)
    outcome = tune(how, toy)
    assert seen == list(range(20))
    assert outcome.facts.best < 0.9 * outcome.facts.prior and outcome.facts.best_step > 0
    changed = any((outcome.masks[name].mask != toy.masks[name]).any() for name in toy.masks)
    assert changed == (how in ("sr-ste", "s-ste"))
    assert {"0.bias", "2.bias"} < outcome.masks.keys()


@pytest.mark.parametrize("how", WAYS)
def test_it_starts_at_what_came_in(how):
    toy = Sparse()
    came = toy.weights()
    before = float(torch.stack([toy.score(i) for i in toy.held_out]).detach().mean())
    outcome = tune(how, toy, rate=1e-30)
    assert outcome.facts.prior == pytest.approx(before, rel=1e-4)
    for path, site in toy.sites.items():
        assert torch.equal(outcome.masks[site.name].mask, toy.masks[site.name])
        weight = torch.where(outcome.masks[site.name].mask, outcome.masks[site.name].weight, 0.0)
        torch.testing.assert_close(weight, came[path], rtol=1e-5, atol=1e-7)
        assert how == "s-ste" or torch.equal(weight, came[path])


def test_a_fixed_mask_has_no_gradient_and_no_state_where_it_prunes(monkeypatch):
    toy, seen = Sparse(), []

    def look(self, context, after_step=FinetuneLearner.after_step):
        after_step(self, context)
        for mask in self.masks.values():
            state = seen[0].state[mask.values]
            for value in (mask.values, state["exp_avg"], state["exp_avg_sq"]):
                assert (value[~mask.parametrization.mask] == 0).all() and (
                    value[mask.parametrization.mask] != 0
                ).any()

    def prepare(self, subject, priors, original=FinetuneLearner.prepare):
        seen.append(original(self, subject, priors))
        return seen[0]

    monkeypatch.setattr(FinetuneLearner, "after_step", look)
    monkeypatch.setattr(FinetuneLearner, "prepare", prepare)
    tune("fixed", toy)


def weights(seed, pattern=TWO_FOUR):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(6, 4 * pattern.group, generator=generator)
    mask = project(
        torch.rand(dense.shape, generator=generator), pattern
    )  # has nothing to do with magnitudes
    return dense, torch.where(mask, 1.3 * dense, 0.0), mask


@given(seeds)
def test_sr_ste_decay_shrinks_pruned_weights_and_leaves_kept_ones_alone(seed):
    dense, sparse, mask = weights(seed)
    parametrization = SrSte(TWO_FOUR, dense, 10, 100, 0.1)
    values = parametrization.start(sparse, mask).requires_grad_()
    parametrization.penalty(values).backward()
    torch.testing.assert_close(values.grad, torch.where(mask, 0.0, 0.1 * values.detach()))
    after = values.detach() - values.grad
    assert torch.equal(after[mask], values.detach()[mask])
    assert (after[~mask].abs() <= values.detach()[~mask].abs()).all() and (after != values).any()


@given(seeds)
def test_sr_ste_hands_the_gradient_to_all_weights(seed):
    dense, sparse, mask = weights(seed)
    parametrization = SrSte(TWO_FOUR, dense, 10, 100, 0.1)
    values = parametrization.start(sparse, mask).requires_grad_()
    shown = parametrization.soft(values, sparse, StepContext(), "w")
    assert torch.equal(shown, sparse)
    upstream = torch.randn(shown.shape, generator=torch.Generator().manual_seed(seed))
    shown.backward(upstream)
    assert torch.equal(values.grad, upstream)


@given(seeds, st.sampled_from(["2:4", "1:4", "4:8"]))
def test_a_moving_mask_starts_as_it_came_although_it_keeps_the_largest(seed, text):
    pattern = NMPattern.parse(text)
    dense, sparse, mask = weights(seed, pattern)
    for parametrization in (SrSte(pattern, dense, 1, 100, 0.0), SSte(pattern, dense, 100)):
        values = parametrization.start(sparse, mask)
        assert torch.equal(parametrization.hard(values, sparse), mask)
        torch.testing.assert_close(
            torch.where(mask, parametrization.kept(values, sparse), 0.0),
            sparse,
            rtol=1e-5,
            atol=1e-6,
        )
        parametrization.after_step(values, StepContext(step=0, steps=200))
        assert torch.equal(parametrization.hard(values, sparse), mask)
        assert (values[~mask] != 0).any()  # something is left that can come back


@given(seeds, st.sampled_from(["2:4", "1:4", "4:8"]))
@settings(max_examples=8)
def test_the_s_ste_projection_is_continuous(seed, text):
    """It never moves an entry by more than twice the largest change of its group; the plain choice
    jumps."""
    pattern = NMPattern.parse(text)
    dense, _, _ = weights(seed, pattern)
    start, end = dense, torch.randn(dense.shape, generator=torch.Generator().manual_seed(seed + 1))
    path = [torch.lerp(start, end, share) for share in torch.linspace(0, 1, 100)]
    jumps = []
    for a, b in pairwise(path):
        moved = (a - b).abs().unflatten(1, (-1, pattern.group)).amax(-1)
        jumped = (
            (shrunk(a, pattern) - shrunk(b, pattern))
            .abs()
            .unflatten(1, (-1, pattern.group))
            .amax(-1)
        )
        assert (jumped <= 2 * moved + 1e-6).all()
        hard = [torch.where(project(x.abs(), pattern), x, 0.0) for x in (a, b)]
        jumps.append(
            ((hard[0] - hard[1]).abs().unflatten(1, (-1, pattern.group)).amax(-1) - 2 * moved).max()
        )
    assert max(jumps) > 0
    assert (
        (shrunk(dense, pattern) != 0).unflatten(1, (-1, pattern.group)).sum(-1) <= pattern.keep
    ).all()


@pytest.mark.parametrize(
    "make", [lambda d: SrSte(TWO_FOUR, d, 3, 8, 0.0), lambda d: SSte(TWO_FOUR, d, 8)]
)
def test_a_moving_mask_is_looked_at_and_then_frozen(make):
    dense, sparse, mask = weights(3)
    parametrization = make(dense)
    values = parametrization.start(sparse, mask)
    generator = torch.Generator().manual_seed(0)
    changes = []
    for step in range(12):
        values.add_(0.5 * torch.randn(values.shape, generator=generator))
        old, shown = (
            parametrization.mask,
            torch.where(parametrization.mask, parametrization.kept(values, sparse), 0.0),
        )
        parametrization.after_step(values, StepContext(step=step, steps=12))
        changes.append(bool((parametrization.mask != old).any()))
        if step == 7 and torch.equal(parametrization.mask, old):
            torch.testing.assert_close(
                torch.where(parametrization.mask, parametrization.kept(values, sparse), 0.0), shown
            )
        assert parametrization.frozen == (step >= 7)
    every = 3 if isinstance(parametrization, SrSte) else 1
    assert changes == [
        (step + 1) % every == 0 or step == 7 if step < 8 else False for step in range(12)
    ]


def test_freezing_the_threshold_folds_it_into_the_weights():
    dense, sparse, mask = weights(4)
    parametrization = SSte(TWO_FOUR, dense, 1)
    values = parametrization.start(sparse, mask) + 0.3 * dense
    expected = shrunk(values, TWO_FOUR)
    parametrization.after_step(values, StepContext(step=0, steps=5))
    assert torch.equal(
        torch.where(parametrization.mask, parametrization.kept(values, sparse), 0.0), expected
    )
    assert torch.equal(parametrization.soft(values, sparse, StepContext(), "w"), expected)


@given(seeds)
def test_adapters_merge_to_the_last_bit_and_inside_the_mask(seed):
    _, sparse, mask = weights(seed)
    parametrization = Adapters("w", 3)
    values = parametrization.start(sparse, mask)
    assert torch.equal(parametrization.soft(values, sparse, StepContext(), "w"), sparse)
    values = values + torch.randn(values.shape, generator=torch.Generator().manual_seed(seed))
    b, a = values[: len(sparse)].double(), values[len(sparse) :].double()
    merged = torch.where(mask, parametrization.kept(values, sparse), 0.0)
    assert (
        torch.equal(parametrization.soft(values, sparse, StepContext(), "w"), merged)
        and check(merged, TWO_FOUR).bad == 0
    )
    torch.testing.assert_close(
        merged.double(), torch.where(mask, sparse + b @ a.T, 0.0), rtol=1e-5, atol=1e-5
    )
    plain = (sparse + b @ a.T).float()
    assert check(plain, TWO_FOUR).bad > 0  # what the mask on the product is for


@pytest.mark.parametrize("how", WAYS)
def test_an_interrupted_run_ends_with_the_same_bits(how, tmp_path):
    whole = tune(how)
    again = interrupted(partial(tune, how), FinetuneLearner, 12, tmp_path)
    assert again.facts.history == whole.facts.history
    for name, one in whole.masks.items():
        assert torch.equal(again.masks[name].mask, one.mask) and torch.equal(
            again.masks[name].weight, one.weight
        )


def test_ruin_gives_back_what_came_in():
    toy = Sparse()
    came = toy.weights()
    outcome = tune("fixed", toy, rate=1e3)
    assert outcome.facts.best_step == 0
    for name, one in outcome.masks.items():
        path = name.removeprefix("toy.")
        assert torch.equal(torch.where(one.mask, one.weight, 0.0), came[path])


def test_a_loss_that_is_not_a_number_is_said():
    toy = Sparse()
    toy.poisoned = True
    with pytest.raises(NmsparseError, match="not finite at step 1 of 20"):
        tune("fixed", toy)


def test_norms_and_biases_are_trained_and_kept_at_their_best():
    toy = Sparse()
    came = toy.weights()
    outcome = tune("fixed", toy)
    assert not torch.equal(outcome.masks["0.bias"].weight, came["0.bias"])
    with torch.no_grad():
        for name, one in outcome.masks.items():
            toy.module.get_parameter(name.removeprefix("toy.")).copy_(
                torch.where(one.mask, one.weight, 0.0)
            )
        again = float(torch.stack([toy.score(i).double() for i in toy.held_out]).mean())
    assert again == pytest.approx(outcome.facts.best, rel=1e-6)


def test_what_is_fixed_has_nothing_to_restore():
    parametrization = FixedMask()
    assert parametrization.state() == {} and parametrization.penalty(torch.zeros(1)) is None
    learner = FinetuneLearner(lambda site: FixedMask(), 1e-3)
    toy = Sparse()
    learner.prepare(toy, toy.masks)
    assert learner.state() == {}
    detach(toy.module)
