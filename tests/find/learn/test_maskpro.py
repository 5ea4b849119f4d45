"""MaskPro: forward passes only, an unbiased estimate, and a magnitude that lets small models
move."""

from __future__ import annotations

import math

import pytest
import torch

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.find.learn.loop import fit
from nmsparse_deploy.find.learn.mask_parametrization import detach, showing
from nmsparse_deploy.find.learn.plackett_luce import as_mask, score
from nmsparse_deploy.find.learn.step_context import StepContext
from nmsparse_deploy.find.methods import maskpro
from nmsparse_deploy.find.methods.maskpro import PolicyGradient, magnitude_for, stays
from nmsparse_deploy.pattern import TWO_FOUR, NMPattern
from nmsparse_deploy.recipe import MaskPro
from tests.fixtures.toy_learner import Toy, interrupted

SHORT = MaskPro(steps=12, evaluate_every=4, checkpoint_every=4, flips=20)


def learn(spec=SHORT, toy=None, checkpoints=None):
    toy = toy or Toy()
    return fit(toy, PolicyGradient(spec), toy.corrupted(), spec, 0, checkpoints)


def test_a_corrupted_prior_is_repaired_without_gradients(monkeypatch):
    """By experiment the loss falls to about a third of the prior's in 1,500 steps on 128 groups
    (bar 0.6 after 900)."""
    toy, seen = Toy(), []
    monkeypatch.setattr(
        Toy,
        "score",
        lambda self, number, score=Toy.score: (
            seen.append(torch.is_grad_enabled()),
            score(self, number),
        )[1],
    )
    before = toy.weights()
    outcome = learn(MaskPro(steps=900, flips=10, step_size=0.05, evaluate_every=100), toy)
    assert outcome.facts.best < 0.6 * outcome.facts.prior and outcome.facts.learner["moved"] > 0.05
    assert not any(seen)  # no graph of the model was ever built
    assert all(torch.equal(value, before[name]) for name, value in toy.weights().items())


def prepared(spec=SHORT, seed=0):
    toy = Toy(seed=seed)
    learner = PolicyGradient(spec)
    optimiser = learner.prepare(toy, toy.corrupted())
    return toy, learner, optimiser


def test_it_starts_at_the_prior():
    toy, learner, _ = prepared()
    prior = toy.corrupted()
    assert all(torch.equal(learner.finish()[name].mask, prior[name]) for name in prior)
    assert learner.facts()["moved"] == 0
    detach(toy.module)


def test_the_gradient_is_residual_times_score():
    toy, learner, _ = prepared(SHORT.model_copy(update={"rate": 50.0}))
    context = StepContext(seed=3, step=7, steps=12)
    learner.tracked = torch.tensor(
        [0.01 * (1 - 0.99**5), 0.0, 5.0], dtype=torch.float64
    )  # a tracked residual of 0.01
    loss = learner.loss_terms(toy, 2, context)["loss"]
    loss.backward()
    with torch.no_grad():
        drawn = float(loss)
        with showing(toy.module, "hard"):  # still the prior
            start = float(toy.score(2))
        for mask in learner.masks.values():
            groups = mask.values.reshape(-1, 4)
            order = mask.parametrization.order(mask.values, context, mask.site.name)
            assert (
                as_mask(order, 4).reshape(mask.values.shape) != mask.parametrization.prior
            ).any()
            expected = (drawn - start - 0.01) * score(groups, order).reshape(mask.values.shape)
            torch.testing.assert_close(mask.values.grad, expected, rtol=1e-4, atol=1e-7)
    detach(toy.module)


def test_the_tracker_is_used_before_it_is_updated():
    """0.99 old + 0.01 new of the mean residual of a step, and every micro-batch sees the old one."""
    toy, learner, _ = prepared(SHORT.model_copy(update={"rate": 50.0}))
    residuals = []
    for step in range(3):
        before = learner.tracked.clone()
        for part in range(2):
            learner.loss_terms(toy, part, StepContext(0, step, 3, part, 2))
            assert torch.equal(learner.tracked, before)
        residuals.append(float(torch.stack(learner.residuals).mean()))
        learner.after_step(StepContext(0, step, 3, 1, 2))
    smoothed = 0.0
    for residual in residuals:
        smoothed = 0.99 * smoothed + 0.01 * residual
    assert float(learner.tracked[0]) == pytest.approx(smoothed) and float(learner.tracked[2]) == 3
    detach(toy.module)


def test_the_first_step_waits_for_a_scale():
    toy, learner, _ = prepared()
    learner.loss_terms(toy, 0, StepContext())["loss"].backward()
    assert all(float(mask.values.grad.abs().max()) == 0 for mask in learner.masks.values())
    learner.after_step(StepContext())
    learner.loss_terms(toy, 0, StepContext(step=1))["loss"].backward()
    assert all(float(mask.values.grad.abs().max()) > 0 for mask in learner.masks.values())
    detach(toy.module)


@pytest.mark.parametrize(
    ("magnitude", "expected"), [(1, 0.42), (3, 0.87), (5, 0.980), (8, 0.9990), (10, 0.99986)]
)
def test_how_sure_a_magnitude_is(magnitude, expected):
    assert stays(magnitude, TWO_FOUR) == pytest.approx(
        expected, abs=5e-3 if magnitude < 5 else 5e-5 if magnitude > 9 else 5e-4
    )


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "4:8"])
def test_the_magnitude_flips_as_many_groups_as_asked(pattern):
    groups, n_m = 20_000, NMPattern.parse(pattern)
    magnitude = magnitude_for([(groups, n_m)], 300)
    parametrization = maskpro.DrawnMask(type("Site", (), {"pattern": n_m}))
    start = torch.zeros(groups, n_m.group)
    start[:, : n_m.keep] = 1
    drawn = as_mask(parametrization.order(magnitude * start, StepContext(seed=1), "w"), n_m.group)
    assert int((drawn != start.bool()).any(-1).sum()) == pytest.approx(300, abs=5 * math.sqrt(300))
    assert magnitude_for([(1_000_000, TWO_FOUR)], 142) == pytest.approx(
        10, abs=0.1
    )  # the published C at this size
    assert magnitude_for([(10, TWO_FOUR)], 300) == pytest.approx(0, abs=1e-6)


def test_a_magnitude_that_is_too_large_says_that_nothing_moved():
    outcome = learn(MaskPro(steps=5, magnitude=30.0, evaluate_every=5))
    assert outcome.facts.learner["moved"] == 0 and outcome.facts.best == outcome.facts.prior


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path):
    whole = learn()
    again = interrupted(learn, PolicyGradient, 6, tmp_path)
    assert again.facts.history == whole.facts.history
    assert all(torch.equal(again.masks[name].mask, one.mask) for name, one in whole.masks.items())


def test_a_loss_that_is_not_a_number_is_said():
    toy = Toy()
    toy.poisoned = True
    with pytest.raises(NmsparseError, match="not finite at step 1 of 12"):
        learn(toy=toy)
