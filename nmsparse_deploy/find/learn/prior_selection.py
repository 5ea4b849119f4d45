"""Masks as they are: what a subject loses under given ones, and which of several is the best."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nmsparse_deploy.find.learn.learner import Subject
from nmsparse_deploy.find.learn.mask_parametrization import MaskParametrization, attach, detach
from nmsparse_deploy.find.learn.step_context import StepContext

Masks = Mapping[str, torch.Tensor]
"""Bool rows by `MaskSite.name`."""


class GivenMask(MaskParametrization):
    """A given mask that stays."""

    def start(self, rows: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
        return prior.float()

    def soft(
        self, values: torch.Tensor, rows: torch.Tensor, context: StepContext, name: str
    ) -> torch.Tensor:
        return rows * values

    def hard(self, values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return values.bool()


@torch.no_grad()
def held_out_loss(subject: Subject, masks: Masks) -> float:
    """Return the mean score of the held-out batches under fixed masks; the module is left as it
    was."""
    try:
        attach(subject.module, subject.sites, lambda site: GivenMask(), masks)
        scores = [subject.score(number).double() for number in subject.held_out]
        return float(torch.stack(scores).mean())
    finally:
        detach(subject.module)


def best_prior(subject: Subject, priors: Mapping[str, Masks]) -> tuple[str, dict[str, float]]:
    """Return the name of the best of some masks, the first among equals, and the loss under
    each."""
    losses = {name: held_out_loss(subject, masks) for name, masks in priors.items()}
    return min(losses, key=lambda name: losses[name]), losses
