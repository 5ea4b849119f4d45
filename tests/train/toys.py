"""A small subject on which masks are learned in a second."""

from __future__ import annotations

import torch
from torch import nn

from nmsparse_deploy.pattern import TWO_FOUR, project
from nmsparse_deploy.recipe import Prune, validate
from nmsparse_deploy.train.learner import Learnt
from nmsparse_deploy.train.masked import Site

NAME = "model.weight"


class Planted:
    """A linear layer whose outputs were made by a masked copy: the mask that made them is the one to find.

    `truth` and `prior` are bool rows by site; in the prior half of the groups are drawn anew.
    """

    def __init__(self, seed: int = 0, batches: int = 24) -> None:
        torch.manual_seed(seed)
        self.module = nn.Linear(32, 32)
        self.sites = {"weight": Site(NAME, "weight", 1, TWO_FOUR)}
        weight = self.module.weight.detach()
        mask, other = (project(torch.rand(weight.shape), TWO_FOUR) for _ in range(2))
        wrong = torch.rand(weight.shape[0], weight.shape[1] // TWO_FOUR.group, 1) < 0.5
        groups = torch.where(wrong, other.unflatten(1, (-1, TWO_FOUR.group)), mask.unflatten(1, (-1, TWO_FOUR.group)))
        self.truth, self.prior = mask, {NAME: groups.flatten(1)}
        self.inputs = torch.randn(batches, 64, 32)
        self.outputs = torch.nn.functional.linear(self.inputs, weight * mask, self.module.bias.detach())
        self.samples = 64
        self.training, self.held_out = range(batches - 4), range(batches - 4, batches)

    def loss_terms(self, number: int) -> dict[str, torch.Tensor]:
        return {"error": self.score(number)}

    def score(self, number: int) -> torch.Tensor:
        return (self.module(self.inputs[number]) - self.outputs[number]).square().mean()

    def right(self, learnt: dict[str, Learnt]) -> float:
        """Share of the groups that are as planted."""
        return float((learnt[NAME].mask == self.truth).reshape(-1, TWO_FOUR.group).all(-1).float().mean())


def settings(method: str = "maskllm", **changes):
    """The `learn` section of a recipe."""
    return validate(Prune, {"method": method, "learn": changes}).learn.settled("block")
