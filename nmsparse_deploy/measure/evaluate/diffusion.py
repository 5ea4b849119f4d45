"""What pruning cost a diffusion model: its predictions at every part of the schedule, and samples
from the same noise.

A small error at one step says little about the sample at the end of the trajectory (EcoDiff,
arXiv:2412.02852), so both are told: the error by timestep on held-out images, with and without
condition, and how far whole samples move.
"""

from __future__ import annotations

import torch

from nmsparse_deploy.data.images import check_images_disjoint, evaluation_images
from nmsparse_deploy.data.latents import NoisedSample, noised_images, prepared_latents
from nmsparse_deploy.data.tensor_inputs import ENDING
from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.measure.evaluate.arms import DENSE, PRUNED
from nmsparse_deploy.measure.evaluate.denoise import BATCH, draw, predict, starting_noise
from nmsparse_deploy.measure.evaluate.features import torch_runner
from nmsparse_deploy.measure.evaluate.frechet import frechet_distance
from nmsparse_deploy.measure.evaluate.png import as_images, by_timestep_plot, png, sheet
from nmsparse_deploy.measure.evaluate.result import (
    DrawnImage,
    EvalResult,
    Evaluation,
    NotChecked,
    Protocol,
    Results,
    bootstrap_error,
    mean_result,
    paired_difference,
)
from nmsparse_deploy.models import load as load_model
from nmsparse_deploy.models.denoising import LABELS, conditions
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.recipe import AUTO, Evaluate
from nmsparse_deploy.system.progress import Progress, silent

DATA = "fashion-mnist"
PARTS = 10
"""Parts of the schedule in the table by timestep."""
SHOWN = 10
"""Samples of each model on the sheet."""
SEED = 1
"""Of noise and steps; calibration starts at 0."""
RESAMPLED = 40
"""Resamples behind the standard error of a Frechet distance."""


def evaluate_diffusion(
    dense: LoadedModel,
    pruned: LoadedModel,
    spec: Evaluate,
    calibration: torch.Tensor | None,
    progress: Progress = silent,
) -> Evaluation:
    """Measure every metric, dense first.

    `calibration` are the content hashes of the run's calibration samples. Raises `NmsparseError`
    when one of the evaluation is among them.
    """
    models = {DENSE: dense, PRUNED: pruned}
    sample = held_out(dense, DATA if spec.data == AUTO else spec.data, spec.images, progress)
    compared = None if calibration is None else check_images_disjoint(calibration, sample.hashes)
    results: Results = {label: [] for label in models}
    rows = _predictions(models, sample, results, progress)
    given, noise = asked(dense, sample, spec.drawn), starting_noise(dense, spec.drawn)
    drawn = {
        label: draw(model, noise, given, sample.null, spec.steps, spec.guidance, progress)
        if spec.drawn
        else noise
        for label, model in models.items()
    }
    _moved(drawn, spec, dense, results)
    images = [_plot(rows)]
    if spec.drawn and dense.processor.preprocess is not None:
        images.append(
            _sheet(dense, {label: samples[:SHOWN] for label, samples in drawn.items()}, spec)
        )
    missing = _features(dense, drawn, sample, spec, results, progress)
    return Evaluation(
        {**results},
        {"images_compared": compared, "overlaps": 0},
        timesteps=rows,
        images=images,
        difference=paired_difference(results[DENSE][0], results[PRUNED][0]),
        samples={"noised": sample.to_json()},
        not_checked=missing,
    )


def held_out(
    model: LoadedModel, source: str, count: int, progress: Progress = silent
) -> NoisedSample:
    """Take evenly spaced test images, or latents from a file, noised with a seed of their own."""
    if source.endswith(ENDING):
        return prepared_latents(model, source, count, SEED)
    if model.processor.preprocess is None:
        raise UsageError(
            f"'{model.source}' denoises latents, and no autoencoder came with it.",
            f"--data FILE{ENDING} with latents",
        )
    chosen = evaluation_images(
        source, "test", model.processor.preprocess, model.input_name, count, progress
    )
    return noised_images(model, chosen, SEED, progress)


def _predictions(
    models: dict[str, LoadedModel], sample: NoisedSample, results: Results, progress: Progress
) -> list[dict[str, float]]:
    """Measure squared errors on the noised images; returns them by part of the schedule."""
    title = sample.images.title if sample.images else sample.source
    predictions = {}
    for label, model in models.items():
        progress(f"denoising {len(sample)} held-out samples, {label}", 0, 0)
        predictions[label] = predict(model, sample.inputs)
    protocol = {
        "data": title,
        "data_fingerprint": sample.fingerprint,
        "samples": len(sample),
        "steps": "uniform over the schedule",
        "unconditional": int(sample.unconditional.sum()),
        "predicts": sample.denoising.noising.predicts,
    }
    errors = {
        label: (predicted - sample.target).square().flatten(1).mean(1)
        for label, predicted in predictions.items()
    }
    shift = relative(predictions[PRUNED], predictions[DENSE])
    for label, values in errors.items():
        results[label].append(
            mean_result(f"denoising_mse@{title}", values.tolist(), _where(models[label]), protocol)
        )
    results[PRUNED].append(
        mean_result(
            f"prediction_shift@{title}",
            shift.tolist(),
            _where(models[PRUNED]),
            {**protocol, "against": DENSE, "unit": "squared distance over squared norm"},
        )
    )
    return by_timestep(sample, {**errors, "shift": shift})


def by_timestep(sample: NoisedSample, values: dict[str, torch.Tensor]) -> list[dict[str, float]]:
    """Return the mean of each of `values` `[samples]` in each part of the schedule that has
    samples."""
    steps = len(sample.denoising.noising)
    part = sample.step * PARTS // steps
    rows = []
    for number in range(PARTS):
        mine = part == number
        if mine.any():
            rows.append(
                {
                    "from": number * steps // PARTS,
                    "to": (number + 1) * steps // PARTS,
                    "samples": int(mine.sum()),
                    **{name: float(value[mine].mean()) for name, value in values.items()},
                }
            )
    return rows


def _plot(rows: list[dict[str, float]]) -> DrawnImage:
    plot = by_timestep_plot(rows, [DENSE, PRUNED, "shift"], "squared error")
    return DrawnImage(
        "error of the prediction by timestep: dense and pruned against the truth, and pruned against "
        "dense as a share of the prediction (shift)",
        png(plot),
    )


def relative(other: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Return `‖y - d‖² / ‖d‖²` of each sample."""
    dense = dense.flatten(1)
    return (other.flatten(1) - dense).square().sum(1) / dense.square().sum(1).clamp(min=1e-30)


def _where(model: LoadedModel) -> str:
    return next(model.module.parameters()).device.type


# --- whole samples
# ----------------------------------------------------------------------------------------------------


def asked(model: LoadedModel, sample: NoisedSample, count: int) -> dict[str, torch.Tensor]:
    """Return conditions of `count` samples: the classes in turn, or the texts of the held-out
    samples in turn."""
    classes = conditions(model.module).get(LABELS)
    if classes:
        return {LABELS: torch.arange(count) % classes}
    return {name: value[torch.arange(count) % len(value)] for name, value in sample.given.items()}


def _moved(
    drawn: dict[str, torch.Tensor], spec: Evaluate, dense: LoadedModel, results: Results
) -> None:
    if spec.drawn:
        protocol = {
            "steps": spec.steps,
            "guidance": spec.guidance,
            "against": DENSE,
            "scheduler": type(dense.processor.scheduler).__name__,
            "unit": "squared distance over squared norm",
        }
        results[PRUNED].append(
            mean_result(
                f"sample_shift@{spec.steps}steps",
                relative(drawn[PRUNED], drawn[DENSE]).tolist(),
                _where(dense),
                protocol,
            )
        )


def _sheet(model: LoadedModel, drawn: dict[str, torch.Tensor], spec: Evaluate) -> DrawnImage:
    """Draw a row of samples for each model."""
    rows = [model.processor.decode(samples) for samples in drawn.values()]
    title = (
        f"samples from the same noise ({spec.steps} steps, guidance {spec.guidance:g}): "
        + ", ".join(f"row {number} {label}" for number, label in enumerate(drawn, 1))
    )
    return DrawnImage(title, png(sheet(rows)))


# --- features
# ---------------------------------------------------------------------------------------------------------


def _features(
    dense: LoadedModel,
    drawn: dict[str, torch.Tensor],
    sample: NoisedSample,
    spec: Evaluate,
    results: Results,
    progress: Progress,
) -> list[NotChecked]:
    """Measure Frechet distances to the held-out images on features of a vision model; returns what
    it could not."""
    if not spec.features:
        return [
            NotChecked(
                "feature distance", "no vision model was named for its features (--features)"
            )
        ]
    if sample.images is None or spec.drawn < 2:
        return [
            NotChecked(
                "feature distance", "it takes held-out images and at least two drawn samples"
            )
        ]
    viewer = load_model(spec.features)
    real = _seen(
        viewer,
        dense.processor.decode(dense.processor.encode(sample.images.inputs[dense.input_name])),
        progress,
    )
    features = {
        label: _seen(viewer, dense.processor.decode(samples), progress)
        for label, samples in drawn.items()
    }
    name = f"frechet_{viewer.name}_{real.shape[1]}d"
    protocol = {
        "features": f"pooled output of {viewer.name}, {real.shape[1]} numbers; not FID",
        "drawn": spec.drawn,
        "real": len(real),
        "steps": spec.steps,
        "guidance": spec.guidance,
    }
    for label, seen in features.items():
        results[label].append(
            _distance(f"{name}@{sample.images.title}", seen, real, _where(dense), protocol)
        )
    results[PRUNED].append(
        _distance(
            f"{name}@dense-samples", features[PRUNED], features[DENSE], _where(dense), protocol
        )
    )
    return []


def _distance(
    metric: str, drawn: torch.Tensor, real: torch.Tensor, where: str, protocol: Protocol
) -> EvalResult:
    error = bootstrap_error(
        lambda index: frechet_distance(drawn[index], real), len(drawn), RESAMPLED
    )
    return EvalResult(metric, frechet_distance(drawn, real), error, len(drawn), where, protocol)


def _seen(viewer: LoadedModel, images: torch.Tensor, progress: Progress) -> torch.Tensor:
    """Return pooled features of images in -1 to 1, each prepared as the viewer wants it."""
    run, parts = torch_runner(viewer), []
    ready = [viewer.processor(image) for image in as_images(images)]
    for start in range(0, len(ready), BATCH):
        progress(f"features of {viewer.name}", start, len(ready))
        pooled = run({viewer.input_name: torch.stack(ready[start : start + BATCH])}).pooled
        if pooled is None:
            raise UsageError(
                f"'{viewer.source}' gives no pooled features.", "name another vision model"
            )
        parts.append(pooled)
    return torch.cat(parts)
