"""Run a diffusion model: one prediction for noised samples, and whole samples through diffusers'
own scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from nmsparse_deploy.models.denoising import INPUT, prediction, sample_size
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.system.progress import Progress, silent

BATCH = 16


@torch.inference_mode()
def predict(model: LoadedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return what the model says about noised samples, fp32 on the CPU; a predicted variance is
    left out."""
    parameter = next(model.module.parameters())
    parts = []
    for start in range(0, len(inputs[INPUT]), BATCH):
        batch = {
            name: value[start : start + BATCH].to(parameter.device)
            for name, value in inputs.items()
        }
        ready = {
            name: value.to(parameter.dtype)
            if value.is_floating_point() and name != "timestep"
            else value
            for name, value in batch.items()
        }
        parts.append(prediction(model.module(**ready), ready[INPUT]).float().cpu())
    return torch.cat(parts)


def starting_noise(model: LoadedModel, count: int, seed: int = 0) -> torch.Tensor:
    """Return where samples begin, `[count, channels, height, width]`; the same for every model of
    this shape."""
    module: Any = model.module
    shape = (count, module.config.in_channels, *sample_size(module))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def draw(
    model: LoadedModel,
    noise: torch.Tensor,
    given: Mapping[str, torch.Tensor],
    null: Mapping[str, torch.Tensor],
    steps: int,
    guidance: float,
    progress: Progress = silent,
    seed: int = 0,
) -> torch.Tensor:
    """Draw samples in the model's space, from `noise` under conditions `given` `[samples, ...]`.

    With `null` conditions (of one sample) and `guidance` g other than 1, every step goes by
    `e_null + g (e - e_null)`. Schedulers that add noise on the way draw it from `seed`, so two
    models see the same.
    """
    scheduler = type(model.processor.scheduler).from_config(model.processor.scheduler.config)
    takes = inspect.signature(scheduler.step).parameters
    extra = {"generator": torch.Generator().manual_seed(seed)} if "generator" in takes else {}
    scheduler.set_timesteps(steps)
    state = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    guided = bool(null) and guidance != 1
    for number, timestep in enumerate(scheduler.timesteps):
        progress(f"drawing {len(noise)} samples", number, len(scheduler.timesteps))
        seen = (
            scheduler.scale_model_input(state, timestep)
            if hasattr(scheduler, "scale_model_input")
            else state
        )
        asked = {INPUT: seen, "timestep": timestep.expand(len(seen)), **given}
        predicted = predict(model, asked)
        if guided:
            plain = {name: null[name].expand(value.shape) for name, value in given.items()}
            without = predict(model, {**asked, **plain})
            predicted = without + guidance * (predicted - without)
        state = scheduler.step(predicted, timestep, state, **extra).prev_sample
    return state
