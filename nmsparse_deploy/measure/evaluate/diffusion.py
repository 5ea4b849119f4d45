"""What pruning cost a diffusion model: its predictions at every part of the schedule, and samples from the same noise.

A small error at one step says little about the sample at the end of the trajectory (EcoDiff, arXiv:2412.02852), so both
are told: the error by timestep on held-out pictures, with and without condition, and how far whole samples move.
"""

from __future__ import annotations

from typing import Any

import torch

from nmsparse_deploy.data.images import check_images_disjoint, evaluation_images
from nmsparse_deploy.data.latents import NoisedSample, of_pictures, prepared_latents
from nmsparse_deploy.data.tensor_inputs import ENDING
from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.measure.evaluate.arms import DENSE, PRUNED, Results, to_json
from nmsparse_deploy.measure.evaluate.denoise import BATCH, draw, predict, starting_noise
from nmsparse_deploy.measure.evaluate.features import torch_runner
from nmsparse_deploy.measure.evaluate.frechet import frechet_distance
from nmsparse_deploy.measure.evaluate.png import as_pictures, by_timestep_plot, png, sheet
from nmsparse_deploy.measure.evaluate.result import EvalResult, bootstrap_error, mean_result, paired_difference
from nmsparse_deploy.models import load as load_model
from nmsparse_deploy.models.denoising import LABELS, conditions
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.recipe import AUTO, Evaluate
from nmsparse_deploy.system.progress import Progress, silent

DATA = "fashion-mnist"
PARTS = 10
"""Stretches of the schedule in the table by timestep."""
SHOWN = 10
"""Samples that are drawn into the picture."""
SEED = 1
"""Of noise and steps; calibration starts at 0."""
RESAMPLED = 40
"""Resamples behind the standard error of a Frechet distance."""


def evaluate_diffusion(dense: LoadedModel, pruned: LoadedModel, spec: Evaluate, calibration: torch.Tensor | None,
                       progress: Progress = silent) -> dict[str, Any]:
    """Every metric, dense first; the content of an `evaluate.json`.

    `calibration` are the content hashes of the run's calibration samples. Raises `NmsparseError` when one of the
    evaluation is among them.
    """
    models = {DENSE: dense, PRUNED: pruned}
    sample = held_out(dense, DATA if spec.data == AUTO else spec.data, spec.images, progress)
    compared = None
    if calibration is not None:
        compared = check_images_disjoint(calibration, sample.hashes)
    results: Results = {label: [] for label in models}
    rows = _predictions(models, sample, results, progress)
    drawn = {label: _samples(model, dense, sample, spec, progress) for label, model in models.items()}
    _moved(drawn, spec, dense, results)
    images = _plots(rows) + (pictures(dense, {label: found[:SHOWN] for label, found in drawn.items()}, spec)
                             if spec.drawn else [])
    missing = _features(dense, drawn, sample, spec, results, progress)
    errors = {label: found[0] for label, found in results.items()}
    return {"results": to_json(results), "timesteps": rows, "images": images, "samples": {"noised": sample.to_json()},
            "difference": {"metric": errors[PRUNED].metric, **paired_difference(errors[DENSE], errors[PRUNED])},
            "held_out": {"images_compared": compared, "overlaps": 0}, "not_checked": missing}


def held_out(model: LoadedModel, source: str, count: int, progress: Progress = silent) -> NoisedSample:
    """Evenly spaced test pictures, or latents from a file, noised with a seed of their own."""
    if source.endswith(ENDING):
        return prepared_latents(model, source, count, SEED)
    if model.processor.preprocess is None:
        raise UsageError(f"'{model.source}' denoises latents, and no autoencoder came with it.",
                         f"--data FILE{ENDING} with latents")
    chosen = evaluation_images(source, "test", model.processor.preprocess, model.input_name, count, progress)
    return of_pictures(model, chosen, SEED, progress)


def _predictions(models: dict[str, LoadedModel], sample: NoisedSample, results: Results,
                 progress: Progress) -> list[dict[str, Any]]:
    """Squared errors on the noised pictures; returns them by stretch of the schedule."""
    title = sample.images.title if sample.images else sample.source
    found = {}
    for label, model in models.items():
        progress(f"denoising {len(sample)} held-out samples, {label}", 0, 0)
        found[label] = predict(model, sample.inputs)
    protocol = {"data": title, "data_fingerprint": sample.fingerprint, "samples": len(sample), "steps":
                "uniform over the schedule", "unconditional": int(sample.unconditional.sum()),
                "predicts": sample.denoising.noising.predicts}
    errors = {label: (told - sample.target).square().flatten(1).mean(1) for label, told in found.items()}
    shift = relative(found[PRUNED], found[DENSE])
    for label, values in errors.items():
        results[label].append(mean_result(f"denoising_mse@{title}", values.tolist(), _where(models[label]), protocol))
    results[PRUNED].append(mean_result(f"prediction_shift@{title}", shift.tolist(), _where(models[PRUNED]),
                                       {**protocol, "against": DENSE, "unit": "squared distance over squared norm"}))
    return by_timestep(sample, {**errors, "shift": shift})


def by_timestep(sample: NoisedSample, values: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """The mean of each of `values` `[samples]` in each stretch of the schedule that has samples."""
    steps = len(sample.denoising.noising)
    part = sample.step * PARTS // steps
    rows = []
    for number in range(PARTS):
        mine = part == number
        if mine.any():
            rows.append({"from": number * steps // PARTS, "to": (number + 1) * steps // PARTS,
                         "samples": int(mine.sum()), **{name: float(found[mine].mean())
                                                        for name, found in values.items()}})
    return rows


def _plots(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    plot = by_timestep_plot(rows, [DENSE, PRUNED, "shift"], "squared error")
    return [{"title": "error of the prediction by timestep: dense and pruned against the truth, and pruned against "
             "dense as a share of the prediction (shift)", "png_base64": png(plot)}]


def relative(other: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """`‖y - d‖² / ‖d‖²` of each sample."""
    dense = dense.flatten(1)
    return (other.flatten(1) - dense).square().sum(1) / dense.square().sum(1).clamp(min=1e-30)


def _where(model: LoadedModel) -> str:
    return next(model.module.parameters()).device.type


# --- whole samples ----------------------------------------------------------------------------------------------------

def asked(model: LoadedModel, sample: NoisedSample, count: int) -> dict[str, torch.Tensor]:
    """Conditions of `count` samples: the classes in turn, or the texts of the held-out samples in turn."""
    classes = conditions(model.module).get(LABELS)
    if classes:
        return {LABELS: torch.arange(count) % classes}
    return {name: value[torch.arange(count) % len(value)] for name, value in sample.given.items()}


def _samples(model: LoadedModel, dense: LoadedModel, sample: NoisedSample, spec: Evaluate,
             progress: Progress) -> torch.Tensor:
    given, noise = asked(dense, sample, spec.drawn), starting_noise(dense, spec.drawn)
    return draw(model, noise, given, sample.null, spec.steps, spec.guidance, progress) if spec.drawn else noise


def _moved(drawn: dict[str, torch.Tensor], spec: Evaluate, dense: LoadedModel, results: Results) -> None:
    if spec.drawn:
        protocol = {"steps": spec.steps, "guidance": spec.guidance, "against": DENSE,
                    "scheduler": type(dense.processor.scheduler).__name__, "unit": "squared distance over squared norm"}
        results[PRUNED].append(mean_result(f"sample_shift@{spec.steps}steps",
                                           relative(drawn[PRUNED], drawn[DENSE]).tolist(), _where(dense), protocol))


def pictures(model: LoadedModel, drawn: dict[str, torch.Tensor], spec: Evaluate) -> list[dict[str, str]]:
    """One sheet: a row of samples for each model."""
    if model.processor.preprocess is None:
        return []
    rows = [model.processor.decode(found) for found in drawn.values()]
    title = f"samples from the same noise ({spec.steps} steps, guidance {spec.guidance:g}): " + ", ".join(
        f"row {number} {label}" for number, label in enumerate(drawn, 1))
    return [{"title": title, "png_base64": png(sheet(rows))}]


# --- features ---------------------------------------------------------------------------------------------------------

def _features(dense: LoadedModel, drawn: dict[str, torch.Tensor], sample: NoisedSample, spec: Evaluate,
              results: Results, progress: Progress) -> list[dict[str, str]]:
    """Frechet distances to the held-out pictures on features of a vision model; what could not be told, and why."""
    if not spec.features:
        return [{"place": "feature distance", "why": "no vision model was named for its features (--features)"}]
    if sample.images is None or spec.drawn < 2:
        return [{"place": "feature distance", "why": "it takes held-out pictures and at least two drawn samples"}]
    viewer = load_model(spec.features)
    real = _seen(viewer, dense.processor.decode(dense.processor.encode(sample.images.inputs[dense.input_name])),
                 progress)
    kinds = {label: _seen(viewer, dense.processor.decode(found), progress) for label, found in drawn.items()}
    name = f"frechet_{viewer.name}_{real.shape[1]}d"
    protocol = {"features": f"pooled output of {viewer.name}, {real.shape[1]} numbers; not FID", "drawn": spec.drawn,
                "real": len(real), "steps": spec.steps, "guidance": spec.guidance}
    for label, found in kinds.items():
        results[label].append(_distance(f"{name}@{sample.images.title}", found, real, _where(dense), protocol))
    results[PRUNED].append(_distance(f"{name}@dense-samples", kinds[PRUNED], kinds[DENSE], _where(dense), protocol))
    return []


def _distance(metric: str, found: torch.Tensor, real: torch.Tensor, where: str,
              protocol: dict[str, Any]) -> EvalResult:
    error = bootstrap_error(lambda index: frechet_distance(found[index], real), len(found), RESAMPLED)
    return EvalResult(metric, frechet_distance(found, real), error, len(found), where, protocol)


def _seen(viewer: LoadedModel, images: torch.Tensor, progress: Progress) -> torch.Tensor:
    """Pooled features of pictures in -1 to 1, each prepared as the viewer wants it."""
    run, parts = torch_runner(viewer), []
    ready = [viewer.processor(picture) for picture in as_pictures(images)]
    for start in range(0, len(ready), BATCH):
        progress(f"features of {viewer.name}", start, len(ready))
        found = run({viewer.input_name: torch.stack(ready[start : start + BATCH])}).pooled
        if found is None:
            raise UsageError(f"'{viewer.source}' gives no pooled features.", "name another vision model")
        parts.append(found)
    return torch.cat(parts)
