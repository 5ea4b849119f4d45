"""Diffusion transformers: the loss is its definition, timesteps are uniform, and masks of a two-block model are learned."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.methods.maskllm import LEARNED
from nmsparse_deploy.pattern import TWO_FOUR, project
from nmsparse_deploy.train.diffusion import Diffusion
from nmsparse_deploy.train.loop import fit
from nmsparse_deploy.train.losses import denoising
from nmsparse_deploy.train.masked import Site, masks
from nmsparse_deploy.train.moment import Moment
from tests.train.toy import settings

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
        self.time, self.label = nn.Linear(1, WIDTH), nn.Embedding(CLASSES, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, hidden_states, timestep=None, class_labels=None):
        condition = self.time(timestep.float().unsqueeze(1) / STEPS) + self.label(class_labels)
        x = self.embed(hidden_states.flatten(2).transpose(1, 2))
        for block in self.blocks:
            x = block(x, condition)
        x = self.out(x).transpose(1, 2).unflatten(2, (SIZE, SIZE))
        return SimpleNamespace(sample=x)


class Scheduler:
    """A linear schedule, with what diffusers' schedulers offer."""

    def __init__(self, prediction_type="epsilon"):
        self.config = SimpleNamespace(num_train_timesteps=STEPS, prediction_type=prediction_type)
        self.alphas = torch.linspace(0.999, 0.01, STEPS)

    def _roots(self, times):
        kept = self.alphas[times].view(-1, 1, 1, 1)
        return kept.sqrt(), (1 - kept).sqrt()

    def add_noise(self, latents, noise, times):
        signal, other = self._roots(times)
        return signal * latents + other * noise

    def get_velocity(self, latents, noise, times):
        signal, other = self._roots(times)
        return signal * noise - other * latents


def model():
    torch.manual_seed(0)
    return TinyDiT().eval()


def data(samples=24):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(samples, CHANNELS, SIZE, SIZE, generator=generator),
            torch.randint(CLASSES, (samples,), generator=generator))


def subject(kind="epsilon", size=4, **changes):
    module = model()
    sites = {name: Site(name, name, 1, TWO_FOUR) for name, value in module.named_parameters()
             if name.startswith("blocks") and name.endswith(("up.weight", "down.weight"))}
    return Diffusion(module, sites, *data(), Scheduler(kind), size, settings(**{"holdout": 0.34, **changes}))


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@torch.no_grad()
def test_the_loss_is_its_definition(kind):
    module, (latents, labels), scheduler = model(), data(5), Scheduler(kind)
    times, noise = torch.tensor([0, 7, 50, 98, 99]), torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
    wanted = []
    for x, y, t, e in zip(latents, labels, times, noise):
        kept = scheduler.alphas[t]
        output = module((kept.sqrt() * x + (1 - kept).sqrt() * e)[None], timestep=t[None], class_labels=y[None]).sample[0, :CHANNELS]
        target = {"epsilon": e, "sample": x, "v_prediction": kept.sqrt() * e - (1 - kept).sqrt() * x}[kind]
        wanted.append((output - target).square().mean())
    found = denoising(module, latents, labels, scheduler, times, noise)
    assert torch.allclose(found, torch.stack(wanted).mean(), rtol=1e-5)


def test_timesteps_are_uniform_and_new_at_every_moment():
    """Chi-square over ten bins of ten timesteps: nine degrees of freedom, exceeded by 33.7 once in ten thousand."""
    found, seen = subject(size=24, holdout=0.5), []
    add = found.scheduler.add_noise
    found.scheduler.add_noise = lambda latents, noise, times: (seen.append((times, noise)), add(latents, noise, times))[1]
    with torch.no_grad():
        for step in range(100):
            found.loss_terms(0, Moment(step=step, steps=100))
    counts = torch.bincount(torch.cat([times for times, _ in seen]) // 10, minlength=10).double()
    expected = counts.sum() / 10
    assert int(counts.sum()) == 2400 and float(((counts - expected) ** 2 / expected).sum()) < 33.7
    assert not torch.equal(seen[0][1], seen[1][1])
    first = seen[0]
    with torch.no_grad():
        found.loss_terms(0, Moment(step=0, steps=100))
        found.loss_terms(0, Moment(step=0, steps=100, rank=1))
    assert torch.equal(seen[-2][0], first[0]) and torch.equal(seen[-2][1], first[1])
    assert not torch.equal(seen[-1][1], first[1])


def test_held_out_timesteps_are_spread_over_all_and_stay():
    found, seen = subject(), []
    add = found.scheduler.add_noise
    found.scheduler.add_noise = lambda latents, noise, times: (seen.append(times), add(latents, noise, times))[1]
    with torch.no_grad():
        scores = [[float(found.score(number)) for number in found.held_out] for _ in range(2)]
    assert scores[0] == scores[1]
    times = torch.cat(seen[: len(found.held_out)])
    assert times.tolist() == [place * STEPS // 8 for place in range(8)]


@pytest.mark.parametrize(("task", "distill"), [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_masks_of_two_blocks_are_learned(task, distill):
    found = subject(task=task, distill=distill, steps=8, step_size=20.0, evaluate_every=2, batch=8)
    module = found.module
    before = {name: value.clone() for name, value in module.named_parameters()}
    priors = {name: project(module.get_parameter(name).detach().abs(), TWO_FOUR) for name in found.sites}
    outcome = fit(found, LEARNED.make(found.spec), priors, found.spec)
    assert outcome.facts["best"] <= outcome.facts["prior"] and not masks(module)
    assert any(row["hard"] != outcome.facts["prior"] for row in outcome.facts["history"])
    assert all(torch.equal(value, before[name]) for name, value in module.named_parameters())


def test_what_cannot_be_learned_from_is_said():
    for kind, changes, sentence in (("flow", {}, "predicts 'flow'"), ("epsilon", {"task": 0.0, "distill": 0.0}, "nothing to learn")):
        with pytest.raises(UsageError, match=sentence):
            subject(kind, **changes).loss_terms(0, Moment())
    latents, labels = data()
    with pytest.raises(UsageError, match="24 latents and 23 classes"):
        Diffusion(model(), {}, latents, labels[1:], Scheduler(), 4, settings())
