"""Diffusion transformers: the loss is its definition, timesteps are uniform, and masks of a
two-block model are learned."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nmsparse_deploy.data.latents import NoisedSample
from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.find.learn.diffusion import DiffusionSubject
from nmsparse_deploy.find.learn.loop import fit
from nmsparse_deploy.find.learn.mask_parametrization import MaskSite, learnable_masks
from nmsparse_deploy.find.learn.step_context import StepContext, digest
from nmsparse_deploy.find.methods.maskllm import LEARNED
from nmsparse_deploy.masks import project
from nmsparse_deploy.models.denoising import Denoising
from nmsparse_deploy.pattern import TWO_FOUR
from tests.fixtures.toy_learner import settings

diffusers = pytest.importorskip("diffusers")

STEPS, CHANNELS, SIZE, WIDTH, CLASSES = 100, 4, 4, 32, 3


class Block(nn.Module):
    """Attention over positions and an MLP, both modulated by the conditioning."""

    def __init__(self):
        super().__init__()
        self.modulate = nn.Linear(WIDTH, 2 * WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x, condition):
        scale, shift = self.modulate(condition).unsqueeze(1).chunk(2, -1)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.down(torch.nn.functional.gelu(self.up(x * (1 + scale) + shift)))


class TinyDiT(nn.Module):
    """Called as diffusers' transformers are; noise and variances come out, twice the channels."""

    def __init__(self, channels=2 * CHANNELS):
        super().__init__()
        self.embed, self.out = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, channels)
        self.time, self.label = nn.Linear(1, WIDTH), nn.Embedding(CLASSES + 1, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, hidden_states, timestep=None, class_labels=None):
        condition = self.time(timestep.float().unsqueeze(1) / STEPS) + self.label(class_labels)
        x = self.embed(hidden_states.flatten(2).transpose(1, 2))
        for block in self.blocks:
            x = block(x, condition)
        x = self.out(x).transpose(1, 2).unflatten(2, (SIZE, SIZE))
        return SimpleNamespace(sample=x)


def model():
    torch.manual_seed(0)
    return TinyDiT().eval()


def sample(kind="epsilon", samples=24, null=True):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(samples, CHANNELS, SIZE, SIZE, generator=generator)
    labels = {"class_labels": torch.randint(CLASSES, (samples,), generator=generator)}
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=STEPS, prediction_type=kind)
    nothing = {"class_labels": torch.tensor(CLASSES)} if null else {}
    empty = torch.zeros(0)
    return NoisedSample(
        {},
        latents,
        empty,
        empty,
        labels,
        nothing,
        empty,
        "latents",
        0,
        Denoising(scheduler, False, None),
    )


def subject(kind="epsilon", size=4, null=True, samples=24, **changes):
    module = model()
    sites = {
        name: MaskSite(name, name, 1, TWO_FOUR)
        for name, value in module.named_parameters()
        if name.startswith("blocks") and name.endswith(("up.weight", "down.weight"))
    }
    return DiffusionSubject(
        module,
        sites,
        sample(kind, samples, null),
        size,
        settings(**{"holdout": 0.34, **changes}),
        torch.float32,
    )


def asked(module):
    """What the model is called with, call by call."""
    seen = []
    module.register_forward_pre_hook(lambda _m, _a, named: seen.append(named), with_kwargs=True)
    return seen


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@torch.no_grad()
def test_the_score_is_its_definition(kind):
    """Sample by sample, with the schedule's formulas written out; every second one without its
    class."""
    found = subject(kind, samples=6, size=3, holdout=0.9)
    kept_of = diffusers.DDPMScheduler(num_train_timesteps=STEPS).alphas_cumprod
    for number in found.held_out:
        noise = torch.randn(
            3,
            CHANNELS,
            SIZE,
            SIZE,
            generator=torch.Generator().manual_seed(digest("held-out noise", number)),
        )
        wanted = []
        for place, (x, e) in enumerate(zip(found.clean[number], noise)):
            place += 3 * found.held_out.index(number)
            t = torch.tensor(place * STEPS // (3 * len(found.held_out)))
            label = (
                torch.tensor(CLASSES)
                if place % 2
                else found.given["class_labels"][number][place % 3]
            )
            kept = kept_of[t]
            output = found.module(
                (kept.sqrt() * x + (1 - kept).sqrt() * e)[None],
                timestep=t[None],
                class_labels=label[None],
            ).sample[0, :CHANNELS]
            target = {
                "epsilon": e,
                "sample": x,
                "v_prediction": kept.sqrt() * e - (1 - kept).sqrt() * x,
            }[kind]
            wanted.append((output - target).square().mean())
        assert torch.allclose(found.score(number), torch.stack(wanted).mean(), rtol=1e-4)


def test_steps_are_uniform_and_new_at_every_moment_and_half_go_without_a_class():
    """Chi-square over ten bins of ten steps: nine degrees of freedom, exceeded by 33.7 once in ten
    thousand."""
    found = subject(size=24, holdout=0.5, distill=0.0)
    seen = asked(found.module)
    with torch.no_grad():
        for step in range(100):
            found.loss_terms(0, StepContext(step=step, steps=100))
    counts = torch.bincount(
        torch.cat([one["timestep"] for one in seen]) // 10, minlength=10
    ).double()
    expected = counts.sum() / 10
    assert int(counts.sum()) == 2400 and float(((counts - expected) ** 2 / expected).sum()) < 33.7
    alone = torch.cat([one["class_labels"] for one in seen]) == CLASSES
    assert 0.45 < alone.float().mean() < 0.55
    assert not torch.equal(seen[0]["hidden_states"], seen[1]["hidden_states"])
    with torch.no_grad():
        found.loss_terms(0, StepContext(step=0, steps=100))
        found.loss_terms(0, StepContext(step=0, steps=100, rank=1))
    assert all(torch.equal(seen[-2][name], value) for name, value in seen[0].items())
    assert not torch.equal(seen[-1]["hidden_states"], seen[0]["hidden_states"])


def test_held_out_steps_are_spread_over_all_and_stay():
    found = subject()
    seen = asked(found.module)
    with torch.no_grad():
        scores = [[float(found.score(number)) for number in found.held_out] for _ in range(2)]
    assert scores[0] == scores[1]
    times = torch.cat([one["timestep"] for one in seen[: len(found.held_out)]])
    assert times.tolist() == [place * STEPS // 8 for place in range(8)]


def test_without_a_null_class_every_sample_keeps_its_own():
    found = subject(null=False, distill=0.0)
    seen = asked(found.module)
    with torch.no_grad():
        found.loss_terms(1, StepContext())
    assert torch.equal(seen[0]["class_labels"], found.given["class_labels"][1])


@pytest.mark.parametrize(("task", "distill"), [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_masks_of_two_blocks_are_learned(task, distill):
    found = subject(task=task, distill=distill, steps=8, step_size=20.0, evaluate_every=2, batch=8)
    module = found.module
    before = {name: value.clone() for name, value in module.named_parameters()}
    priors = {
        name: project(module.get_parameter(name).detach().abs(), TWO_FOUR) for name in found.sites
    }
    outcome = fit(found, LEARNED.make(found.spec), priors, found.spec, 0)
    assert outcome.facts.best <= outcome.facts.prior and not learnable_masks(module)
    assert any(row["hard"] != outcome.facts.prior for row in outcome.facts.history)
    assert all(torch.equal(value, before[name]) for name, value in module.named_parameters())


def test_what_cannot_be_learned_from_is_said():
    with pytest.raises(UsageError, match="nothing to learn"):
        subject(task=0.0, distill=0.0).loss_terms(0, StepContext())
