"""Pictures with labels and augmentation: classes are the model's, what is seen follows from seed
and step, masks learn."""

from __future__ import annotations

import pytest
import torch
from transformers import ViTForImageClassification

from nmsparse_deploy.data.images import calibration_images
from nmsparse_deploy.errors import MissingExtra, UsageError
from nmsparse_deploy.find.learn import augment
from nmsparse_deploy.find.learn.augment import Augmentation, seeded
from nmsparse_deploy.find.learn.images import believable, class_numbers
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.models.preprocess import Preprocess
from nmsparse_deploy.recipe import Augment, Prune, Recipe, validate
from tests import ROOT
from tests.fixtures import small_vision as small

PREPROCESS = Preprocess((32, 32), 32)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return small.labelled(tmp_path_factory.mktemp("learned") / "colours")


@pytest.fixture(scope="session")
def classifier(tmp_path_factory, pictures):
    """Two blocks that know the three colours."""
    folder = small.classifier(tmp_path_factory.mktemp("learned") / "vit")
    model = ViTForImageClassification.from_pretrained(folder)
    sample = drawn(pictures, 36)
    labels, (batch,) = class_numbers(sample, model, 3), sample.batches(36)
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(25):
        loss = torch.nn.functional.cross_entropy(model(**batch).logits, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval().save_pretrained(folder)
    return folder


def drawn(pictures, count):
    return calibration_images(str(pictures), PREPROCESS, "pixel_values", count, 0)


def spec(pictures, **learn) -> Prune:
    calibration = {"data": str(pictures), "samples": 24, "batch": 4}
    learn = {
        "objective": "global",
        "steps": 6,
        "evaluate_every": 2,
        "step_size": 20.0,
        "priors": ["magnitude"],
        "holdout": 0.34,
        **learn,
    }
    return validate(Prune, {"method": "maskllm", "calibration": calibration, "learn": learn})


def test_classes_are_the_model_s(pictures, tmp_path):
    sample = drawn(pictures, 12)
    named = ViTForImageClassification.from_pretrained(small.classifier(tmp_path / "vit"))
    found = class_numbers(sample, named, 3)
    assert [small.CLASSES[number] for number in found.tolist()] == list(sample.labels)
    assert torch.equal(
        class_numbers(sample, torch.nn.Linear(1, 1), 3), found
    )  # in the order of the folders
    named.config.label2id = {"red": 5, "green": 7, "blue": 6}
    assert set(class_numbers(sample, named, 8).tolist()) == {5, 6, 7}
    with pytest.raises(UsageError, match="3 classes, the model 10"):
        class_numbers(sample, torch.nn.Linear(1, 1), 10)
    with pytest.raises(UsageError, match="no folders"):
        class_numbers(drawn(small.photos(tmp_path / "photos", 8), 6), named, 3)


def test_masks_are_learned_from_labels(classifier, pictures, tmp_path):
    run = prune(str(classifier), spec(pictures, labels=True, distill=0.0), tmp_path / "run")
    [told] = run.read_json("refinements.json")
    assert told["dense_accuracy"] > believable(3) and told["best"] <= told["prior"]
    assert any(row["hard"] != told["prior"] for row in told["history"])
    weights, dense = (
        ViTForImageClassification.from_pretrained(folder).state_dict()
        for folder in (run / "model", classifier)
    )
    assert all(
        torch.equal(value[value != 0], dense[name][value != 0]) for name, value in weights.items()
    )
    assert any((value == 0).float().mean() > 0.49 for value in weights.values())


def test_labels_that_are_not_the_model_s_are_refused(pictures, tmp_path):
    untrained = small.classifier(tmp_path / "vit")
    model = ViTForImageClassification.from_pretrained(untrained)
    with torch.no_grad():
        model.classifier.weight.zero_()  # always the first class
        model.classifier.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    model.save_pretrained(untrained)
    with pytest.raises(UsageError, match="hardly better than chance"):
        prune(str(untrained), spec(pictures, labels=True), tmp_path / "run")


@pytest.mark.parametrize(
    ("learn", "sentence"),
    [
        ({"labels": True, "objective": "block"}, "whole model"),
        ({"augment": {}, "objective": "block"}, "whole model"),
    ],
)
def test_blocks_have_no_labels(learn, sentence, classifier, pictures, tmp_path):
    with pytest.raises(UsageError, match=sentence):
        prune(str(classifier), spec(pictures, **learn), tmp_path / "run")


def test_text_has_no_labels(llama_dir, texts, tmp_path):
    section = spec(texts["calibration"], labels=True).model_dump()
    section["calibration"] |= {"length": 32}
    with pytest.raises(UsageError, match="are for images"):
        prune(str(llama_dir), validate(Prune, section), tmp_path / "run")


def test_a_seed_decides_and_nothing_is_left_behind():
    import random

    import numpy as np

    def draws():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    torch.manual_seed(3)
    before = torch.get_rng_state()
    found = []
    for seed in (1, 1, 2):
        with seeded(seed):
            found.append(draws())
    assert found[0] == found[1] != found[2] and torch.equal(torch.get_rng_state(), before)


def test_without_timm_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.data", None)
    with pytest.raises(MissingExtra, match="timm"):
        Augmentation(Augment(), PREPROCESS, 3)


def test_one_channel_is_refused():
    pytest.importorskip("timm")
    with pytest.raises(UsageError, match="colour"):
        Augmentation(Augment(), Preprocess((28, 28), None, (0.5,), (0.5,)), 10)


def test_augmented_pictures_follow_from_the_seed(pictures):
    pytest.importorskip("timm")
    augmentation = Augmentation(Augment(), PREPROCESS, 3)
    sample = drawn(pictures, 8)
    shown, labels = [sample.image(place) for place in range(8)], torch.arange(8) % 3
    one, two, other = (augmentation(shown, labels, seed) for seed in (5, 5, 6))
    assert one[0].shape == (8, 3, 32, 32) and one[1].shape == (8, 3)
    assert (
        torch.equal(one[0], two[0])
        and torch.equal(one[1], two[1])
        and not torch.equal(one[0], other[0])
    )
    assert torch.allclose(one[1].sum(1), torch.ones(8))
    assert augmentation(shown, None, 5)[1] is None
    single = augmentation(shown[:1], labels[:1], 5)  # timm mixes pairs
    assert single[1].argmax(1).item() == 0 and float(single[1].max()) == pytest.approx(
        1 - 0.1 + 0.1 / 3
    )


def test_augmented_runs_resume_to_the_same_bits(classifier, pictures, tmp_path, monkeypatch):
    pytest.importorskip("timm")

    class Killed(Exception):
        pass

    recipe = spec(pictures, labels=True, augment={}, checkpoint_every=2)
    whole = prune(str(classifier), recipe, tmp_path / "whole")
    call, calls = augment.Augmentation.__call__, []

    def counted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise Killed
        return call(self, *arguments)

    monkeypatch.setattr(augment.Augmentation, "__call__", counted)
    with pytest.raises(Killed):
        prune(str(classifier), recipe, tmp_path / "run")
    again = prune(str(classifier), recipe, tmp_path / "run")
    histories = [run.read_json("refinements.json")[0]["history"] for run in (whole, again)]
    assert histories[0] == histories[1] and len(calls) > 5
    assert (again / "masks.safetensors").read_bytes() == (whole / "masks.safetensors").read_bytes()


def test_the_recipe_of_maskllm_4v_says_what_it_says():

    learn = Recipe.load(ROOT / "recipes/maskllm4v-paper.yaml").prune.learn
    assert learn.labels and learn.task == 1.0 and learn.distill == 0.0
    given = learn.augment
    assert (given.mixup, given.cutmix, given.smoothing, given.erasing) == (
        0.8,
        1.0,
        0.1,
        0.15,
    ) and "m8" in given.policy
