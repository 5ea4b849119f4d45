"""A learnable mask on a module's weight, put there with `torch.nn.utils.parametrize`.

The weight itself stays where it is, frozen and untouched, as `parametrizations.NAME.original`; what the module sees is
computed from it and from trained values, which are ordinary parameters of the module. One mask has three faces:

* soft: the relaxed or sampled mask of the present moment, differentiable in the trained values
* hard: the mask that would be handed over now, always computed anew from the values
* dense: the original weight, so that the same module is its own teacher
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils import parametrize

from nmsparse_deploy.find.learn.step_context import Moment
from nmsparse_deploy.models.base import from_rows, to_rows
from nmsparse_deploy.pattern import NMPattern

Mode = Literal["soft", "hard", "dense"]


@dataclass(frozen=True)
class Site:
    """A weight that gets a mask. `name` is unique in the whole model, `path` is its name in the module at hand.

    `slices` are the numbers of rows that belong together where several matrices are stored as one (fused q/k/v).
    """

    name: str
    path: str
    axis: int
    pattern: NMPattern
    slices: tuple[int, ...] = ()


class Law:
    """How the mask of one weight follows from trained values.

    Matrices are rows `[R, K]` with the groups along K. `rows` is the original weight in its own dtype, which a law
    raises to fp32 where it computes with it; the values are fp32, in any shape the law likes.
    """

    def start(self, rows: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
        """The trained values before the first step; `hard` of them has to be the bool mask `prior` everywhere."""
        raise NotImplementedError

    def soft(self, values: torch.Tensor, rows: torch.Tensor, moment: Moment, name: str) -> torch.Tensor:
        """What stands for `rows` while training, differentiable in `values`. Random numbers come from
        `moment.generator(name)` alone, so that a recomputed forward pass sees the same ones."""
        raise NotImplementedError

    def hard(self, values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The bool mask that the values stand for."""
        raise NotImplementedError

    def kept(self, values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The weights under the hard mask; the original ones unless the law trains weights."""
        return rows


class LearnableMask(nn.Module):
    """The parametrisation of one weight. `values` are fp32 and stay so."""

    def __init__(self, site: Site, law: Law, weight: torch.Tensor, prior: torch.Tensor) -> None:
        super().__init__()
        self.site = site
        self.law = law
        rows = to_rows(weight.detach(), site.axis)
        self.values = nn.Parameter(law.start(rows, prior.to(rows.device)).float().contiguous())
        self.mode: Mode = "hard"
        self.moment = Moment()
        self.order: list[str] = []
        """Of the layer's parameters, which the parametrisation changes."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if self.mode == "dense":
            return weight
        with torch.autocast(weight.device.type, enabled=False):  # bf16 cannot rank candidates
            rows = to_rows(weight, self.site.axis)
            if self.mode == "hard":
                seen = torch.where(self.law.hard(self.values, rows), self.law.kept(self.values, rows), 0.0)
            else:
                seen = self.law.soft(self.values, rows, self.moment, self.site.name)
            return from_rows(seen, weight.shape, self.site.axis).to(weight.dtype)



LawOf = Callable[[Site], Law]
"""The law of a weight; patterns may differ from weight to weight."""


def attach(module: nn.Module, sites: Mapping[str, Site], law: LawOf,
           priors: Mapping[str, torch.Tensor]) -> dict[str, LearnableMask]:
    """Freeze `module` and put a mask on the weight of every site; `priors` are bool rows by `Site.name`."""
    module.requires_grad_(False)
    attached = {}
    for path, site in sites.items():
        owner, _, name = path.rpartition(".")
        layer = module.get_submodule(owner)
        weight = layer.get_parameter(name)
        mask = LearnableMask(site, law(site), weight, priors[site.name])
        mask.order = list(layer._parameters)
        parametrize.register_parametrization(layer, name, mask, unsafe=True)
        attached[path] = mask
    return attached


def detach(module: nn.Module) -> None:
    """Take every learnable mask off again; the original tensors, not copies of them, are the weights again."""
    for layer in list(module.modules()):
        listed: Any = getattr(layer, "parametrizations", {})
        order: list[str] = []
        for name in list(listed):
            if isinstance(mask := listed[name][0], LearnableMask):
                order = order or mask.order  # the first one's, which saw all of them
                parametrize.remove_parametrizations(layer, name, leave_parametrized=False)
        for key in order:
            layer._parameters[key] = layer._parameters.pop(key)


def masks(module: nn.Module) -> list[LearnableMask]:
    return [child for child in module.modules() if isinstance(child, LearnableMask)]


def original(module: nn.Module, site: Site) -> torch.Tensor:
    """The untouched weight under a site's mask."""
    owner, _, name = site.path.rpartition(".")
    layer: Any = module.get_submodule(owner)
    return layer.parametrizations[name].original


@contextmanager
def showing(module: nn.Module, mode: Mode) -> Iterator[None]:
    """Every mask of `module` shows another face inside the block."""
    found = masks(module)
    before = [mask.mode for mask in found]
    for mask in found:
        mask.mode = mode
    try:
        yield
    finally:
        for mask, old in zip(found, before):
            mask.mode = old


def move_to(module: nn.Module, moment: Moment) -> None:
    """Tell every mask where the run is. From here on it shows its soft face: blocks that are computed again in the
    backward pass have to see the same."""
    for mask in masks(module):
        mask.mode, mask.moment = "soft", moment
