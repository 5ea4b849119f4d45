"""Noise by the scheduler's law, at steps spread over the whole schedule, in both branches of the
guidance."""

from __future__ import annotations

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmsparse_deploy import models
from nmsparse_deploy.data.calibration_sample import draw
from nmsparse_deploy.data.images import calibration_images
from nmsparse_deploy.data.latents import class_numbers, noised
from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.models.denoising import Noising
from nmsparse_deploy.models.preprocess import Preprocess
from nmsparse_deploy.recipe import Calibration
from tests.fixtures import small_diffusion as small
from tests.fixtures.small_vision import labelled

KINDS = ("epsilon", "v_prediction", "sample")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("diffusion")


@pytest.fixture(scope="module")
def dit(folder):
    return models.load(str(small.family("DiT", folder / "dit")))


@pytest.fixture(scope="module")
def pictures(folder):
    return str(labelled(folder / "pictures"))


def clean(count=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 4, 4, generator=generator), torch.randn(
        count, 3, 4, 4, generator=generator
    )


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_diffusers_adds_the_same_noise(name, schedule):
    scheduler = getattr(diffusers, name)(beta_schedule=schedule)
    x, noise = clean()
    step = torch.tensor([0, 1, 400, 998, 999])
    wanted = diffusers.DDPMScheduler.from_config(scheduler.config).add_noise(x, noise, step)
    assert torch.allclose(Noising.of(scheduler).mixed(x, noise, step), wanted, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_diffusers_lets_the_same_noise_flow(shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    x, noise = clean()
    law, step = Noising.of(scheduler), torch.tensor([0, 1, 400, 998, 999])
    assert torch.allclose(
        law.mixed(x, noise, step), scheduler.scale_noise(x, law.timesteps[step], noise), atol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_hits_the_target_is_led_to_the_clean_picture(kind):
    """The witness is diffusers' own step: from a perfect answer it recovers what the noise was
    added to."""
    scheduler = diffusers.DDPMScheduler(prediction_type=kind, clip_sample=False)
    x, noise = clean(1)
    law, step = Noising.of(scheduler), torch.tensor([300])
    found = scheduler.step(
        law.target(x, noise, step), 300, law.mixed(x, noise, step)
    ).pred_original_sample
    assert torch.allclose(found, x, atol=1e-4)


def test_a_flow_that_hits_the_target_ends_at_the_clean_picture():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    x, noise = clean(1)
    law = Noising.of(scheduler)
    scheduler.set_timesteps(4)
    state = noise
    for timestep in scheduler.timesteps:
        state = scheduler.step(law.target(x, noise, torch.tensor([0])), timestep, state).prev_sample
    assert torch.allclose(state, x, atol=1e-5)


@settings(max_examples=25)
@given(count=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_every_stretch_of_the_schedule_is_seen_once_and_half_the_samples_are_unconditional(
    dit, count, seed
):
    x, labels = torch.zeros(count, 3, 4, 4), torch.arange(count) % 3
    found = noised(dit, x, {"class_labels": labels}, {"class_labels": torch.tensor(3)}, seed, "x")
    for place, step in enumerate(sorted(found.step.tolist())):
        assert place * 1000 // count <= step <= (place + 1) * 1000 // count
    assert int(found.unconditional.sum()) == (count + 1) // 2
    wanted = torch.where(found.unconditional, torch.tensor(3), labels)
    assert torch.equal(found.inputs["class_labels"], wanted) and torch.equal(
        found.inputs["timestep"], found.step
    )


def test_steps_are_uniform_over_seeds(dit):
    """Mean and spread of the uniform law: within five standard errors."""
    steps = torch.cat(
        [noised(dit, torch.zeros(2, 3, 4, 4), {}, {}, seed, "x").step for seed in range(300)]
    ).double()
    assert abs(float(steps.mean()) - 499.5) < 5 * 289 / len(steps) ** 0.5
    assert 270 < float(steps.std()) < 308


def test_a_sample_is_the_same_for_the_same_seed_and_another_for_another(dit, pictures):
    spec = Calibration(data=pictures, samples=6)
    one, same, other = (draw(dit, spec.model_copy(update={"seed": seed})) for seed in (0, 0, 1))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert all(torch.equal(one.inputs[name], same.inputs[name]) for name in one.inputs)
    told = one.to_json()
    assert told["samples"] == 6 and len(told["timesteps"]) == 6 and told["unconditional"] == 3
    assert set(one.record()) == {"image_sha256", "timestep", "unconditional"}


def test_classes_are_numbered_over_the_whole_source(pictures):
    sample = calibration_images(pictures, Preprocess((8, 8), 8), "x", 7, 0)
    names = ["blue", "green", "red"]
    assert class_numbers(sample, 3).tolist() == [names.index(label) for label in sample.labels]
    with pytest.raises(UsageError, match="3 classes, and this model knows 2"):
        class_numbers(sample, 2)


def test_pictures_without_classes_cannot_condition(dit, tmp_path):
    flat = labelled(tmp_path / "all") / "train" / "red"
    with pytest.raises(UsageError, match="no classes"):
        draw(dit, Calibration(data=str(flat), samples=2))


def test_an_autoencoder_stands_between_pictures_and_model(folder, pictures):
    loaded = models.load(str(small.pipeline(folder / "pipeline")))
    sample = draw(loaded, Calibration(data=pictures, samples=4))
    assert sample.clean.shape == (4, 4, 16, 16) and loaded.processor.preprocess.size == (32, 32)
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "pipeline/vae").eval()
    with torch.no_grad():
        wanted = (
            vae.encode(sample.images.inputs["hidden_states"]).latent_dist.mode()
            * vae.config.scaling_factor
        )
    assert torch.allclose(sample.clean, wanted, atol=1e-5)
    assert loaded.processor.decode(sample.clean).shape == (4, 3, 32, 32)
    assert sample.to_json()["autoencoder"] == "vae"


def test_prepared_latents_are_noised_with_their_text(folder, tmp_path):
    loaded = models.load(str(small.family("PixArt", folder / "pixart")))
    file = small.latents(tmp_path / "latents.safetensors")
    sample = draw(loaded, Calibration(data=str(file), samples=6))
    plain = sample.inputs["encoder_hidden_states"][sample.unconditional]
    assert (
        len(sample) == 6
        and (plain == sample.null["encoder_hidden_states"]).all()
        and len(plain) == 3
    )
    assert not torch.equal(sample.inputs["hidden_states"], sample.clean)


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {"encoder_hidden_states": None, "null.encoder_hidden_states": None},
            "takes latents with encoder_hidden_states",
        ),
        ({"null.encoder_hidden_states": torch.zeros(5, 24)}, "not shaped as one sample"),
        (
            {"null.encoder_hidden_states": None, "null.other": torch.zeros(2)},
            "branch without condition",
        ),
        ({"encoder_hidden_states": torch.zeros(2, 12, 24)}, "as many samples each"),
        ({"latents": torch.zeros(6, 3, 16, 16)}, "4 channels"),
        ({"encoder_hidden_states": torch.zeros(6, 12, 20)}, "20 wide; the model takes 24"),
    ],
)
def test_latents_that_do_not_fit_are_one_sentence(folder, tmp_path, changes, said):
    loaded = models.load(str(small.family("PixArt", tmp_path / "pixart")))
    file = small.latents(tmp_path / "latents.safetensors", **changes)
    with pytest.raises(UsageError, match=said):
        draw(loaded, Calibration(data=str(file), samples=4))


def test_a_model_that_reads_text_asks_for_latents(tmp_path, pictures):
    loaded = models.load(str(small.family("PixArt", tmp_path / "pixart")))
    with pytest.raises(UsageError, match="no autoencoder") as caught:
        draw(loaded, Calibration(data=pictures, samples=4))
    assert "latents" in caught.value.hint
