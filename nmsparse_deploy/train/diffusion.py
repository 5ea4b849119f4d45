"""A diffusion transformer as a subject: it learns to denoise latents at timesteps drawn uniformly.

    x_t = √ᾱ_t x₀ + √(1-ᾱ_t) ε,   t ~ U{0, …, T-1},   ε ~ N(0, 1)

The task is `losses.denoising`; the teacher is the dense model on the same noisy latents. A mask that is judged at one
timestep is judged wrongly (errors add up along a trajectory), so held-out latents are scored at timesteps spread evenly
over all of them, with noise that stays the same from judgement to judgement.

Ho et al., Denoising Diffusion Probabilistic Models, NeurIPS 2020, arXiv:2006.11239; Peebles and Xie, Scalable Diffusion
Models with Transformers (DiT), ICCV 2023, arXiv:2212.09748.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..steps import Training
from .losses import denoising, denoising_error, predicted
from .masked import Site, showing
from .moment import Moment, digest
from .subjects import split


class Diffusion:
    """Latents `[samples, channels, height, width]` with their classes `[samples]`, `size` at a time.

    `module` is called as `module(hidden_states, timestep=, class_labels=)`; `scheduler` knows `add_noise` and has a
    `config`, as those of diffusers do.
    """

    varies = True

    def __init__(self, module: nn.Module, sites: Mapping[str, Site], latents: torch.Tensor, labels: torch.Tensor,
                 scheduler: Any, size: int, spec: Training, compute: torch.dtype = torch.float32) -> None:
        if len(latents) != len(labels):
            raise UsageError(f"There are {len(latents)} latents and {len(labels)} classes.")
        self.module, self.sites, self.scheduler, self.spec, self.compute = module, sites, scheduler, spec, compute
        self.latents, self.labels = latents.split(size), labels.split(size)
        self.training, self.held_out = split(len(self.latents), spec.holdout)
        self.samples = len(self.latents[0])
        self.timesteps = int(scheduler.config.num_train_timesteps)

    def loss_terms(self, number: int, moment: Moment) -> dict[str, torch.Tensor]:
        generator = moment.generator("diffusion")
        times = torch.randint(self.timesteps, (len(self.labels[number]),), generator=generator)
        noise = torch.randn(self.latents[number].shape, generator=generator)
        if not self.spec.task and not self.spec.distill:
            raise UsageError("There is nothing to learn from: learn.task and learn.distill are 0.")
        latents, labels, times, noise = self._placed(number, times, noise)
        noisy = self.scheduler.add_noise(latents, noise, times)
        terms: dict[str, torch.Tensor] = {}
        with self._autocast(latents):
            output = predicted(self.module, noisy, labels, times)
            if self.spec.task:
                terms["task"] = self.spec.task * denoising_error(output, latents, self.scheduler, times, noise)
            if self.spec.distill:
                with torch.no_grad(), showing(self.module, "dense"):
                    teacher = predicted(self.module, noisy, labels, times)
                terms["distill"] = self.spec.distill * (output.float() - teacher.float()).square().mean()
        return terms

    def score(self, number: int) -> torch.Tensor:
        """The denoising loss of a held-out batch at timesteps spread over all held-out samples."""
        count = len(self.labels[number])
        first = sum(len(self.labels[other]) for other in self.held_out if other < number)
        every = sum(len(self.labels[other]) for other in self.held_out)
        times = (first + torch.arange(count)) * self.timesteps // every
        generator = torch.Generator().manual_seed(digest("held-out noise", number))
        noise = torch.randn(self.latents[number].shape, generator=generator)
        latents, labels, times, noise = self._placed(number, times, noise)
        with self._autocast(latents):
            return denoising(self.module, latents, labels, self.scheduler, times, noise)

    def _autocast(self, latents: torch.Tensor) -> AbstractContextManager[Any]:
        return torch.autocast(latents.device.type, self.compute, enabled=self.compute != torch.float32)

    def _placed(self, number: int, times: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
        device = next(self.module.parameters()).device
        latents = self.latents[number]
        return tuple(x.to(device) for x in (latents, self.labels[number], times, noise.to(latents.dtype)))
