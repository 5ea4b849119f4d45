"""Losses against their definitions, and whole models as subjects: every family has something to
learn from."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.find.learn import losses
from nmsparse_deploy.find.learn.loop import fit
from nmsparse_deploy.find.learn.mask_parametrization import MaskSite, learnable_masks
from nmsparse_deploy.find.learn.step_context import StepContext
from nmsparse_deploy.find.learn.subjects import BatchSubject, split
from nmsparse_deploy.find.methods.maskllm import LEARNED
from nmsparse_deploy.find.plan.make_plan import make_plan
from nmsparse_deploy.masks import project
from nmsparse_deploy.models.discovery import discover
from nmsparse_deploy.models.objective import Objective
from nmsparse_deploy.pattern import TWO_FOUR
from tests.fixtures import pico
from tests.fixtures.toy_learner import settings

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": 5,
}


def test_losses_are_what_they_say(monkeypatch):
    """Worked through in pieces, like in one."""
    monkeypatch.setattr(losses, "PIECE", 7)
    monkeypatch.setattr(losses, "STRIP", 4)
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(3, 9, 11, generator=generator) for _ in range(2))
    ids = torch.randint(11, (3, 9), generator=generator)
    logits.requires_grad_()
    wanted = cross_entropy(logits[:, :-1].reshape(-1, 11), ids[:, 1:].reshape(-1))
    assert torch.allclose(losses.next_token(logits, ids), wanted)
    p, q = (teacher / 2).softmax(-1), (logits / 2).softmax(-1)
    kl = 4 * (p * (p / q).log()).sum(-1).mean()
    found = losses.divergence(logits, teacher, 2.0)
    assert torch.allclose(found, kl) and float(
        losses.divergence(teacher, teacher, 1.0)
    ) == pytest.approx(0, abs=1e-6)
    one, two = (torch.autograd.grad(loss, logits)[0] for loss in (found, kl))
    assert torch.allclose(one, two, atol=1e-6)
    assert losses.divergence(logits.where(logits < 1, torch.nan), teacher, 1.0).isnan(), (
        "a loss that is none is not hidden"
    )


def test_a_target_that_vanishes_is_judged_by_the_usual_one():
    generator = torch.Generator().manual_seed(0)
    target, output = torch.randn(4, 8, generator=generator), torch.randn(4, 8, generator=generator)
    size, error = target.square().sum(-1), (output - target).square().sum(-1)
    assert torch.allclose(losses.relative_error(output, target), (error / size).mean())
    target[2] = 0.0
    size, error = target.square().sum(-1), (output - target).square().sum(-1)
    size[2] = size.mean()
    assert torch.allclose(losses.relative_error(output, target), (error / size).mean())
    assert float(losses.relative_error(torch.zeros(2, 3), torch.zeros(2, 3))) == 0.0


def test_batches_that_judge_are_never_trained_on():
    for count in range(1, 30):
        training, held_out = split(count, 0.1)
        assert (
            len(held_out) >= 1
            and not set(training) & set(held_out)
            and len(training) + len(held_out) == count
        )


def subject(module, batches, kind, **changes):
    plan = make_plan(
        discover(module, {k: v for k, v in batches[0].items() if k != "labels"}), TWO_FOUR
    )
    sites = {
        row.target.name: MaskSite(row.target.name, row.target.name, row.target.axis, TWO_FOUR)
        for row in plan.pruned()
    }
    return BatchSubject(module, sites, batches, Objective(kind), settings(**changes), torch.float32)


def pictures(labels=False):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "pixel_values": torch.randn(4, 3, 16, 16, generator=generator),
            **({"labels": torch.randint(5, (4,), generator=generator)} if labels else {}),
        }
        for _ in range(10)
    ]


def words():
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(pico.VOCABULARY, (2, 16), generator=generator),
            "use_cache": False,
        }
        for _ in range(10)
    ]


def classifier():
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SMALL)).eval()


CASES = {
    "language model": (pico.llama, words, "cross-entropy", {"task", "distill"}, {}),
    "no teacher": (pico.llama, words, "cross-entropy", {"task"}, {"distill": 0.0}),
    "no task": (pico.llama, words, "cross-entropy", {"distill"}, {"task": 0.0}),
    "classifier": (classifier, pictures, "kl", {"distill"}, {}),
    "labelled": (classifier, lambda: pictures(labels=True), "kl", {"task", "distill"}, {}),
    "features": (
        lambda: ViTModel(ViTConfig(**SMALL), add_pooling_layer=False).eval(),
        pictures,
        "hidden",
        {"distill"},
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_family_learns(name):
    make, data, kind, terms, changes = CASES[name]
    module = make()
    found = subject(module, data(), kind, steps=6, step_size=20.0, evaluate_every=2, **changes)
    before = {key: value.clone() for key, value in module.named_parameters()}
    assert found.loss_terms(0, StepContext()).keys() == terms
    if "distill" in terms:
        assert float(found.loss_terms(0, StepContext())["distill"].detach()) == pytest.approx(
            0, abs=1e-5
        )  # dense is its own teacher
    priors = {
        site.name: project(module.get_parameter(path).detach().abs(), TWO_FOUR)
        for path, site in found.sites.items()
    }
    outcome = fit(found, LEARNED.make(found.spec), priors, found.spec, 0)
    assert outcome.facts.best <= outcome.facts.prior and not learnable_masks(module)
    assert any(
        row["hard"] != outcome.facts.prior for row in outcome.facts.history
    )  # the masks moved
    assert all(torch.equal(value, before[key]) for key, value in module.named_parameters())


def test_pictures_without_labels_need_a_teacher():
    with pytest.raises(UsageError, match="nothing to learn from"):
        subject(classifier(), pictures(), "kl", distill=0.0).loss_terms(0, StepContext())
