"""What a pruned diffusion model is judged by: Frechet distance, samples from the same noise, error
by timestep."""

from __future__ import annotations

import base64
import copy

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nmsparse_deploy as nms
from nmsparse_deploy import models
from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.measure.evaluate.denoise import draw, predict, starting_noise
from nmsparse_deploy.measure.evaluate.diffusion import by_timestep, evaluate_diffusion, held_out
from nmsparse_deploy.measure.evaluate.frechet import frechet_distance
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.prove.group_counter import check
from nmsparse_deploy.recipe import Evaluate, Prune, validate
from tests.fixtures import small_diffusion as small
from tests.fixtures import small_vision as vision

QUICK = {"images": 6, "drawn": 3, "steps": 3, "guidance": 2.0}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return str(vision.labelled(tmp_path_factory.mktemp("pictures") / "all"))


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    return models.load(str(small.family("DiT", tmp_path_factory.mktemp("dit") / "dit")))


# --- Frechet distance
# -------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), width=st.integers(1, 6))
def test_the_distance_is_that_of_its_gaussians(seed, width):
    """Zero to itself, the squared shift for moved samples, symmetric, and blind to a rotation of
    both."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(40, width, generator=generator).double() * scale for scale in (1.0, 2.0))
    shift = torch.randn(width, generator=generator).double()
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator).double())[0]
    assert frechet_distance(a, a) < 1e-6
    assert frechet_distance(a, a + shift) == pytest.approx(float(shift.square().sum()), abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6, abs=1e-8)
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(
        frechet_distance(a, b), rel=1e-6, abs=1e-8
    )


def test_independent_features_add_up_the_closed_form_of_one():
    """d² = (m - m')² + (s - s')² for one feature; samples with an exactly diagonal covariance add
    these up."""
    signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]).double()
    spread = (4 / 3) ** 0.5  # the unbiased covariance of four such signs
    a, b = signs * torch.tensor([1.0, 3]), signs * torch.tensor([2.0, 0.5]) + torch.tensor([1.0, 0])
    assert frechet_distance(a, b) == pytest.approx(1 + spread**2 * (1**2 + 2.5**2), rel=1e-9)


def test_one_sample_has_no_spread():
    with pytest.raises(UsageError, match="two samples"):
        frechet_distance(torch.zeros(1, 2), torch.zeros(3, 2))


# --- samples
# ----------------------------------------------------------------------------------------------------------


def test_samples_are_those_of_diffusers_own_pipeline(tmp_path):
    folder = small.pipeline(tmp_path / "pipeline", classes=1000)
    model, stock = models.load(str(folder)), diffusers.DiTPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    labels, null = torch.tensor([1, 2]), {"class_labels": torch.tensor(1000)}
    for guidance in (1.0, 3.0):
        wanted = stock(
            [1, 2],
            guidance,
            torch.Generator().manual_seed(0),
            num_inference_steps=4,
            output_type="pt",
        )
        found = draw(model, starting_noise(model, 2), {"class_labels": labels}, null, 4, guidance)
        assert torch.allclose(
            model.processor.decode(found) / 2 + 0.5, torch.as_tensor(wanted.images), atol=1e-4
        )


def test_guidance_of_one_needs_no_second_branch(dit):
    noise, given = starting_noise(dit, 2), {"class_labels": torch.tensor([0, 2])}
    one = draw(dit, noise, given, {"class_labels": torch.tensor(3)}, 3, 1.0)
    assert torch.equal(one, draw(dit, noise, given, {}, 3, 5.0))
    assert not torch.equal(one, draw(dit, noise, given, {"class_labels": torch.tensor(3)}, 3, 2.0))


def test_a_scheduler_that_adds_noise_adds_the_same_to_both(dit):
    other = copy.copy(dit)
    other.processor = type(dit.processor)(
        diffusers.DDPMScheduler(), False, dit.processor.preprocess
    )
    noise, given = starting_noise(dit, 2), {"class_labels": torch.tensor([0, 2])}
    assert torch.equal(draw(other, noise, given, {}, 3, 1.0), draw(other, noise, given, {}, 3, 1.0))


def test_the_dense_model_is_at_no_distance_from_itself(dit, pictures):
    found = evaluate_diffusion(
        dit, dit, validate(Evaluate, {"data": pictures, **QUICK}), None
    ).to_json()
    values = {row["metric"].partition("@")[0]: row for row in found["results"]["pruned"]}
    assert values["prediction_shift"]["value"] == values["sample_shift"]["value"] == 0
    assert (
        found["difference"]["difference"] == 0
        and found["not_checked"][0]["place"] == "feature distance"
    )
    assert sum(row["samples"] for row in found["timesteps"]) == 6
    for image in found["images"]:
        assert base64.b64decode(image["png_base64"]).startswith(b"\x89PNG")


def test_the_error_is_told_where_in_the_schedule_it_is(dit, pictures):
    sample = held_out(dit, pictures, 12)
    rows = by_timestep(sample, {"step": sample.step.double()})
    assert all(row["from"] <= row["step"] < row["to"] for row in rows) and len(rows) == 10
    assert predict(dit, sample.inputs).shape == sample.target.shape


# --- a run
# ------------------------------------------------------------------------------------------------------------


def spec(data, method="sparsegpt", **changes):
    return validate(
        Prune,
        {
            "method": method,
            "compute": "fp32",
            **changes,
            "calibration": {"data": data, "samples": 8, "batch": 4},
        },
    )


def test_a_run_is_pruned_evaluated_and_reported(tmp_path, pictures):
    source = str(small.pipeline(tmp_path / "pipeline"))
    run = prune(source, spec(pictures), tmp_path / "run")
    calibration = run.manifest().stages["prune"].calibration
    assert calibration["unconditional"] == 4 and calibration["scheduler"] == "DDIMScheduler"
    module = diffusers.DiTTransformer2DModel.from_pretrained(run / "model")
    masks = MaskSet.load(run / "masks.safetensors").masks
    assert len(masks) == 12 and all(
        check(module.get_parameter(name).data, TWO_FOUR).bad == 0 for name in masks
    )
    found = nms.evaluate(run, validate(Evaluate, {"data": pictures, **QUICK}))
    assert found["held_out"]["images_compared"] == 6
    metrics = {row["metric"].partition("@")[0]: row["value"] for row in found["results"]["pruned"]}
    assert metrics["prediction_shift"] > 0 and metrics["sample_shift"] > 0
    page = nms.report(run).read_text()
    assert "samples from the same noise" in page and "denoising_mse" in page


def test_pictures_that_were_calibrated_on_are_no_evaluation(tmp_path, pictures):
    source = str(small.family("DiT", tmp_path / "dit"))
    run = prune(source, spec(pictures, "wanda"), tmp_path / "run")
    with pytest.raises(NmsparseError, match="calibrated on"):
        nms.evaluate(run, validate(Evaluate, {"data": f"{pictures}/train", **QUICK, "images": 36}))


def test_the_features_of_a_vision_model_compare_drawn_with_real_pictures(tmp_path, dit, pictures):
    viewer = str(vision.classifier(tmp_path / "viewer"))
    found = evaluate_diffusion(
        dit,
        dit,
        validate(Evaluate, {"data": pictures, **QUICK, "drawn": 8, "features": viewer}),
        None,
    ).to_json()
    named = {row["metric"]: row["value"] for row in found["results"]["pruned"]}
    assert named["frechet_viewer_64d@dense-samples"] < 1e-6 and named["frechet_viewer_64d@all"] > 0
    assert found["not_checked"] == []


@pytest.mark.parametrize(
    "method, learn", [("maskllm", {"objective": "block"}), ("maskllm", {"objective": "global"})]
)
def test_masks_are_learned_through_denoising(tmp_path, pictures, method, learn):
    source = str(small.family("DiT", tmp_path / "dit"))
    quick = {
        "steps": 3,
        "evaluate_every": 2,
        "checkpoint_every": 2,
        "priors": ["magnitude"],
        **learn,
    }
    run = prune(source, spec(pictures, method, learn=quick), tmp_path / "run")
    assert all(report.ok for report in nms.verify(run))


def test_a_model_that_reads_text_is_judged_on_other_latents_than_it_was_calibrated_on(tmp_path):
    source = str(small.family("PixArt", tmp_path / "pixart"))
    (seen, fresh) = (
        small.latents(tmp_path / "seen.safetensors"),
        small.latents(
            tmp_path / "fresh.safetensors",
            latents=torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(9)),
        ),
    )
    run = prune(source, spec(str(seen), "wanda"), tmp_path / "run")
    assert run.manifest().stages["prune"].calibration["unconditional"] == 3
    with pytest.raises(NmsparseError, match="calibrated on"):
        nms.evaluate(run, validate(Evaluate, {"data": str(seen), **QUICK}))
    found = nms.evaluate(run, validate(Evaluate, {"data": str(fresh), **QUICK}))
    assert found["held_out"]["images_compared"] == 6 and len(found["images"]) == 1
    assert {row["metric"].partition("@")[0] for row in found["results"]["pruned"]} == {
        "denoising_mse",
        "prediction_shift",
        "sample_shift",
    }
