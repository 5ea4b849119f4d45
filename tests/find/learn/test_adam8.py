"""AdamW with moments of a byte: close to AdamW, fair codes, the same bits after a checkpoint, ten
bytes a number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.find.learn.adam8 import BLOCK, AdamW8, read, write
from nmsparse_deploy.find.learn.checkpoint import flat_optimiser, restore_optimiser
from nmsparse_deploy.find.learn.loop import fit
from nmsparse_deploy.find.methods.maskllm import LEARNED, bytes_per_weight
from nmsparse_deploy.pattern import TWO_FOUR
from tests.fixtures.toy_learner import Planted, settings


@given(st.integers(1, 3 * BLOCK), st.floats(-8, 8), st.integers(0, 2**31))
def test_moments_come_back(count, exponent, seed):
    """Within a code of what they were, zeros as zeros, and nothing else of `√v` as zero."""
    moment = 10**exponent * torch.randn(count, generator=torch.Generator().manual_seed(seed)) ** 3
    moment[::7] = 0
    for name, kept in (("m", moment), ("root", moment.abs())):
        state = {}
        write(state, name, kept, torch.Generator().manual_seed(seed))
        found = read(state, name, kept)
        assert (found[kept == 0] == 0).all() and (
            found - kept
        ).abs().max() <= 0.02 * kept.abs().max()
        assert ((found * kept) >= 0).all()
    assert (
        (found[kept != 0] > 0).all()
        and state["root"].dtype is torch.uint8
        and state["root"].numel() % BLOCK == 0
    )


@pytest.mark.parametrize("name", ["m", "root"])
def test_codes_are_rounded_fairly(name):
    """The mean of many roundings lies far closer than codes do."""
    moment = torch.tensor([1.0, 0.5, 0.1, 0.02]).repeat_interleave(BLOCK // 4)
    found = torch.zeros(BLOCK)
    for seed in range(400):
        state = {}
        write(state, name, moment, torch.Generator().manual_seed(seed))
        found += read(state, name, moment) / 400
    assert (found.view(4, -1).mean(1) / moment.view(4, -1)[:, 0] - 1).abs().max() < 0.01


def twins(shape=(40, 6), **changes):
    """The same values under AdamW and under AdamW8."""
    start = 0.03 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    one, two = (torch.nn.Parameter(start.clone()) for _ in range(2))
    return (one, torch.optim.AdamW([one], 1e-3, (0.9, 0.95), weight_decay=0.1)), (
        two,
        AdamW8([two], 1e-3, (0.9, 0.95), 0.1),
    )


def test_it_goes_where_adamw_goes():
    """200 noisy steps of gradients that differ in size by a thousand within a block."""
    (one, adamw), (two, ours) = twins()
    generator, size = torch.Generator().manual_seed(1), torch.logspace(-3, 0, 240).view(40, 6)
    start = one.detach().clone()
    for _ in range(200):
        gradient = size * (1 + torch.randn(one.shape, generator=generator))
        for value, optimiser in ((one, adamw), (two, ours)):
            value.grad = gradient.clone()
            optimiser.step()
    apart = (one - two).detach().norm() / (one.detach() - start).norm()
    assert float(apart) < 0.05  # by experiment


def test_the_first_step_is_adamw_s():
    (one, adamw), (two, ours) = twins()
    for value, optimiser in ((one, adamw), (two, ours)):
        value.grad = torch.linspace(-1, 1, 240).view(40, 6)
        optimiser.step()
    assert torch.allclose(one, two, atol=1e-9)


def test_a_checkpoint_keeps_every_bit():
    (_, _), (value, ours) = twins()
    other = torch.nn.Parameter(value.detach().clone())
    for seed in range(5):
        value.grad = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
        ours.step()
    with torch.no_grad():
        other.copy_(value)
    resumed = AdamW8([other], 1e-3, (0.9, 0.95), 0.1)
    restore_optimiser(resumed, [other], flat_optimiser(ours))
    for parameter, optimiser in ((value, ours), (other, resumed)):
        parameter.grad = torch.ones_like(parameter)
        optimiser.step()
    assert torch.equal(value, other)


def test_ten_bytes_a_number():
    """As predicted: value, gradient, and both moments with their scales."""
    value = torch.nn.Parameter(torch.randn(BLOCK, 6))
    ours = AdamW8([value], 1e-3, (0.9, 0.95), 0.0)
    value.grad = torch.randn_like(value)
    ours.step()
    held = [value, value.grad, *(x for x in ours.state[value].values() if x.ndim)]
    assert sum(x.numel() * x.itemsize for x in held) / value.numel() == 10.0625
    assert bytes_per_weight(settings(form="compact", moments=8), TWO_FOUR) == 10.0625 + 1
    assert bytes_per_weight(settings(moments=8), TWO_FOUR) == 1.5 * 10.0625 + 1


def test_masks_are_learned_with_it():
    subject, spec = Planted(), settings(steps=150, step_size=1.0, moments=8, evaluate_every=50)
    outcome = fit(subject, LEARNED.make(spec), subject.prior, spec, 0)
    assert outcome.facts.best < 0.2 * outcome.facts.prior


def test_other_widths_are_refused():
    with pytest.raises(UsageError, match="moments"):
        settings(moments=4)
