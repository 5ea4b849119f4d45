"""Subjects small enough to learn in a second: layers whose outputs were made by hidden masks, which are to be found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from nmsparse_deploy.models.base import from_rows
from nmsparse_deploy.pattern import TWO_FOUR, NMPattern, project
from nmsparse_deploy.recipe import Prune, validate
from nmsparse_deploy.rundir import RunDir
from nmsparse_deploy.train.checkpoint import Checkpoints
from nmsparse_deploy.train.learner import Learner, Learnt
from nmsparse_deploy.train.loop import Outcome
from nmsparse_deploy.train.losses import relative_error
from nmsparse_deploy.train.masked import Site
from nmsparse_deploy.train.moment import Moment

NAME = "model.weight"
"""The one weight of `Planted`."""


class Subject:
    """What both have in common; `poisoned` makes every loss NaN."""

    varies = False
    poisoned = False

    def loss_terms(self, number: int, moment: Moment) -> dict[str, torch.Tensor]:
        return {"error": self.score(number) * (float("nan") if self.poisoned else 1)}

    def score(self, number: int) -> torch.Tensor:
        raise NotImplementedError


class Planted(Subject):
    """A linear layer whose outputs were made by a masked copy: the mask that made them is the one to find.

    `truth` and `prior` are bool rows by site; in the prior half of the groups are drawn anew.
    """

    samples = 64

    def __init__(self, seed: int = 0, batches: int = 24) -> None:
        torch.manual_seed(seed)
        self.module = nn.Linear(32, 32)
        self.sites = {"weight": Site(NAME, "weight", 1, TWO_FOUR)}
        weight = self.module.weight.detach()
        mask, other = (project(torch.rand(weight.shape), TWO_FOUR) for _ in range(2))
        wrong = torch.rand(weight.shape[0], weight.shape[1] // TWO_FOUR.group, 1) < 0.5
        groups = torch.where(wrong, other.unflatten(1, (-1, TWO_FOUR.group)), mask.unflatten(1, (-1, TWO_FOUR.group)))
        self.truth, self.prior = mask, {NAME: groups.flatten(1)}
        self.inputs = torch.randn(batches, self.samples, 32)
        self.outputs = torch.nn.functional.linear(self.inputs, weight * mask, self.module.bias.detach())
        self.training, self.held_out = range(batches - 4), range(batches - 4, batches)

    def score(self, number: int) -> torch.Tensor:
        return (self.module(self.inputs[number]) - self.outputs[number]).square().mean()

    def right(self, learnt: dict[str, Learnt]) -> float:
        """Share of the groups that are as planted."""
        return float((learnt[NAME].mask == self.truth).reshape(-1, TWO_FOUR.group).all(-1).float().mean())


class Toy(Subject):
    """Two layers, any pattern."""

    samples = 16

    def __init__(self, pattern: NMPattern = TWO_FOUR, width: int = 16, batches: int = 12, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.module = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)).eval()
        self.sites = {f"{i}.weight": Site(f"toy.{i}.weight", f"{i}.weight", 1, pattern) for i in (0, 2)}
        self.planted = {site.name: project(torch.rand(width, width, generator=generator), pattern)
                        for site in self.sites.values()}
        self.inputs = [torch.randn(self.samples, width, generator=generator) for _ in range(batches)]
        with torch.no_grad():
            masked = {path: self.module.get_parameter(path) * from_rows(self.planted[site.name], (width, width), 1)
                      for path, site in self.sites.items()}
            self.targets = [torch.func.functional_call(self.module, masked, (x,)) for x in self.inputs]
        self.training, self.held_out = range(batches - 2), range(batches - 2, batches)

    def score(self, number: int) -> torch.Tensor:
        return relative_error(self.module(self.inputs[number]), self.targets[number])

    def magnitude(self) -> dict[str, torch.Tensor]:
        return {site.name: project(self.module.get_parameter(path).detach().abs(), site.pattern)
                for path, site in self.sites.items()}

    def corrupted(self, share: float = 0.3, seed: int = 5) -> dict[str, torch.Tensor]:
        """The planted masks with a share of the groups replaced by random ones."""
        generator, found = torch.Generator().manual_seed(seed), {}
        for site in self.sites.values():
            planted = self.planted[site.name].unflatten(1, (-1, site.pattern.group))
            other = project(torch.rand(planted.shape, generator=generator), site.pattern)
            swap = torch.rand(planted.shape[:2], generator=generator) < share
            found[site.name] = torch.where(swap.unsqueeze(-1), other, planted).flatten(1)
        return found

    def agreement(self, masks: dict[str, torch.Tensor]) -> float:
        """Share of groups that have the planted mask."""
        same = [(masks[site.name] == self.planted[site.name]).unflatten(1, (-1, site.pattern.group)).all(-1)
                for site in self.sites.values()]
        return float(torch.cat([one.flatten() for one in same]).double().mean())

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in self.module.state_dict().items()}


def settings(method: str = "maskllm", **changes):
    """The `learn` section of a recipe."""
    return validate(Prune, {"method": method, "learn": changes}).learn.settled("block")


class Killed(Exception):
    pass


def interrupted(learn: Callable[..., Outcome], learner: type[Learner], step: int, folder: Path) -> Outcome:
    """What `learn(checkpoints=...)` comes to when it is killed after `step` and started again."""
    run = RunDir.create(folder / "run", {}, "f", False)
    original = learner.after_step

    def stop(self, moment):
        if moment.step == step:
            raise Killed
        original(self, moment)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(learner, "after_step", stop)
        learn(checkpoints=Checkpoints(run, "toy.safetensors"))
    return learn(checkpoints=Checkpoints(run, "toy.safetensors"))
