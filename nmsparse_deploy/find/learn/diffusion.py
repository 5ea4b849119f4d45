"""A diffusion transformer as a subject: it learns to denoise samples at steps drawn uniformly.

    x_t = a_t x_0 + b_t ε,   t uniform over the schedule,   ε ~ N(0, 1)

The task is the squared error of what the model predicts (noise, sample, velocity or flow), the
teacher the dense model on the same noised samples. Where the model knows a null condition, half of
the samples go without their own, as guided sampling runs both branches. An evaluation at one step
would be misleading (errors add up along a trajectory), so held-out samples are scored at steps
spread evenly over all, with the same noise in every evaluation.

Ho et al., Denoising Diffusion Probabilistic Models, NeurIPS 2020, arXiv:2006.11239; Peebles and
Xie, Scalable Diffusion Models with Transformers (DiT), ICCV 2023, arXiv:2212.09748.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from nmsparse_deploy.data.latents import NoisedSample, mixed_inputs
from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.find.learn.losses import squared_error
from nmsparse_deploy.find.learn.mask_parametrization import MaskSite, showing
from nmsparse_deploy.find.learn.step_context import StepContext, digest
from nmsparse_deploy.find.learn.subjects import split
from nmsparse_deploy.models.denoising import INPUT, prediction
from nmsparse_deploy.recipe import Training
from nmsparse_deploy.system.hardware import autocast_for


class DiffusionSubject:
    """The clean samples and conditions of `sample`, `size` at a time, under noise that is drawn
    anew in every step."""

    varies = True

    def __init__(
        self,
        module: nn.Module,
        sites: Mapping[str, MaskSite],
        sample: NoisedSample,
        size: int,
        spec: Training,
        compute: torch.dtype,
    ) -> None:
        self.module, self.sites, self.spec, self.compute = module, sites, spec, compute
        self.noising, self.null = sample.denoising.noising, sample.null
        self.clean = sample.clean.float().split(size)
        self.given = {name: value.split(size) for name, value in sample.given.items()}
        self.training, self.held_out = split(len(self.clean), spec.holdout)
        self.samples = len(self.clean[0])

    def loss_terms(self, number: int, context: StepContext) -> dict[str, torch.Tensor]:
        """Return the denoising error, and the distance to the dense model on the same noised
        samples."""
        if not self.spec.task and not self.spec.distill:
            raise UsageError("There is nothing to learn from: learn.task and learn.distill are 0.")
        generator, count = context.generator("diffusion"), len(self.clean[number])
        step = torch.randint(len(self.noising), (count,), generator=generator)
        alone = torch.rand(count, generator=generator) < 1 / 2
        noise = torch.randn(self.clean[number].shape, generator=generator)
        inputs, target = self._posed(number, step, noise, alone)
        output = self._predicted(inputs)
        terms: dict[str, torch.Tensor] = {}
        if self.spec.task:
            terms["task"] = self.spec.task * squared_error(output, target)
        if self.spec.distill:
            with torch.no_grad(), showing(self.module, "dense"):
                teacher = self._predicted(inputs)
            terms["distill"] = self.spec.distill * squared_error(output, teacher)
        return terms

    def score(self, number: int) -> torch.Tensor:
        """Return the error of a held-out batch; all of them together are spread over the schedule,
        in both branches."""
        count = len(self.clean[number])
        first = sum(len(self.clean[other]) for other in self.held_out if other < number)
        every = sum(len(self.clean[other]) for other in self.held_out)
        places = first + torch.arange(count)
        generator = torch.Generator().manual_seed(digest("held-out noise", number))
        noise = torch.randn(self.clean[number].shape, generator=generator)
        inputs, target = self._posed(
            number, places * len(self.noising) // every, noise, places % 2 == 1
        )
        return squared_error(self._predicted(inputs), target)

    def _posed(
        self, number: int, step: torch.Tensor, noise: torch.Tensor, alone: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return the inputs of the model, and what a perfect model would answer."""
        parameter, clean = next(self.module.parameters()), self.clean[number]
        given = {name: parts[number] for name, parts in self.given.items()}
        inputs = mixed_inputs(
            self.noising, clean, noise, step, given, self.null, alone, parameter.dtype
        )
        target = self.noising.target(clean, noise, step)
        return {name: value.to(parameter.device) for name, value in inputs.items()}, target.to(
            parameter.device
        )

    def _predicted(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        with autocast_for(self.compute, inputs[INPUT].device):
            return prediction(self.module(**inputs), inputs[INPUT])
