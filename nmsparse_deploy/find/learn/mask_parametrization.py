"""A learnable mask on a module's weight, put there with `torch.nn.utils.parametrize`.

The weight itself stays where it is, frozen and untouched, as `parametrizations.NAME.original`; what
the module sees is computed from it and from trained values, which are ordinary parameters of the
module. One mask has three modes:

* soft: the relaxed or sampled mask of the present step, differentiable in the trained values
* hard: the mask that would be handed over now, always computed anew from the values
* dense: the original weight, so that the same module is its own teacher
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from nmsparse_deploy.find.learn.step_context import StepContext
from nmsparse_deploy.models.base import from_rows, to_rows
from nmsparse_deploy.pattern import NMPattern

Mode = Literal["soft", "hard", "dense"]


@dataclass(frozen=True)
class MaskSite:
    """A weight that gets a mask. `name` is unique in the whole model, `path` is its name in the
    module at hand.

    `slices` are the numbers of rows that belong together where several matrices are stored as one
    (fused q/k/v).
    """

    name: str
    path: str
    axis: int
    pattern: NMPattern
    slices: tuple[int, ...] = ()


class MaskParametrization:
    """The rule by which the mask of one weight follows from trained values.

    Matrices are rows `[R, K]` with the groups along K. `rows` is the original weight in its own
    dtype, which a subclass raises to fp32 where it computes with it; the values are fp32, in any
    shape.
    """

    def start(self, rows: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
        """Return the trained values before the first step; `hard` of them has to be the bool mask
        `prior` everywhere."""
        raise NotImplementedError

    def soft(
        self, values: torch.Tensor, rows: torch.Tensor, context: StepContext, name: str
    ) -> torch.Tensor:
        """Return what stands for `rows` while training, differentiable in `values`. Random numbers
        come from `context.generator(name)` alone, so that a recomputed forward pass sees the same
        ones."""
        raise NotImplementedError

    def hard(self, values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the bool mask that the values stand for."""
        raise NotImplementedError

    def kept(self, values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the weights under the hard mask; the original ones unless the parametrisation
        trains weights."""
        return rows


P = TypeVar("P", bound=MaskParametrization)


class LearnableMask(nn.Module):
    """The parametrisation of one weight. `values` are fp32 and stay so."""

    def __init__(
        self,
        site: MaskSite,
        parametrization: MaskParametrization,
        weight: torch.Tensor,
        prior: torch.Tensor,
    ) -> None:
        super().__init__()
        self.site = site
        self.parametrization = parametrization
        rows = to_rows(weight.detach(), site.axis)
        self.values = nn.Parameter(
            parametrization.start(rows, prior.to(rows.device)).float().contiguous()
        )
        self.mode: Mode = "hard"
        self.context = StepContext()
        self.order: list[str] = []
        """Of the layer's parameters, which the parametrisation changes."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if self.mode == "dense":
            return weight
        with torch.autocast(weight.device.type, enabled=False):  # bf16 cannot rank candidates
            rows = to_rows(weight, self.site.axis)
            if self.mode == "hard":
                mask = self.parametrization.hard(self.values, rows)
                masked = torch.where(mask, self.parametrization.kept(self.values, rows), 0.0)
            else:
                masked = self.parametrization.soft(self.values, rows, self.context, self.site.name)
            return from_rows(masked, weight.shape, self.site.axis).to(weight.dtype)

    def parametrized_by(self, kind: type[P]) -> P:
        """Return the parametrisation, which has to be of one kind."""
        assert isinstance(self.parametrization, kind)
        return self.parametrization


MakeParametrization = Callable[[MaskSite], MaskParametrization]
"""The parametrisation of a weight; patterns may differ from weight to weight."""


def attach(
    module: nn.Module,
    sites: Mapping[str, MaskSite],
    parametrization: MakeParametrization,
    priors: Mapping[str, torch.Tensor],
) -> dict[str, LearnableMask]:
    """Freeze `module` and put a mask on the weight of every site; `priors` are bool rows by
    `MaskSite.name`."""
    module.requires_grad_(False)
    attached = {}
    for path, site in sites.items():
        owner, _, name = path.rpartition(".")
        layer = module.get_submodule(owner)
        weight = layer.get_parameter(name)
        mask = LearnableMask(site, parametrization(site), weight, priors[site.name])
        mask.order = list(layer._parameters)
        parametrize.register_parametrization(layer, name, mask, unsafe=True)
        attached[path] = mask
    return attached


def detach(module: nn.Module) -> None:
    """Take every learnable mask off again; the original tensors, not copies of them, are the
    weights again."""
    for layer in list(module.modules()):
        parametrizations: Any = getattr(layer, "parametrizations", {})
        order: list[str] = []
        for name in list(parametrizations):
            if isinstance(mask := parametrizations[name][0], LearnableMask):
                order = order or mask.order  # the first one's, which saw all of them
                parametrize.remove_parametrizations(layer, name, leave_parametrized=False)
        for key in order:
            layer._parameters[key] = layer._parameters.pop(key)


def learnable_masks(module: nn.Module) -> list[LearnableMask]:
    """Return the masks on `module`."""
    return [child for child in module.modules() if isinstance(child, LearnableMask)]


def original_weight(module: nn.Module, site: MaskSite) -> torch.Tensor:
    """Return the untouched weight under a site's mask."""
    owner, _, name = site.path.rpartition(".")
    layer: Any = module.get_submodule(owner)
    return layer.parametrizations[name].original


@contextmanager
def showing(module: nn.Module, mode: Mode) -> Iterator[None]:
    """Put every mask of `module` into another mode inside the block."""
    masks = learnable_masks(module)
    before = [mask.mode for mask in masks]
    for mask in masks:
        mask.mode = mode
    try:
        yield
    finally:
        for mask, old in zip(masks, before):
            mask.mode = old


def set_step(module: nn.Module, context: StepContext) -> None:
    """Tell every mask where the run is, and put it into soft mode, also after the forward pass:
    blocks that are computed again in the backward pass have to see the same."""
    for mask in learnable_masks(module):
        mask.mode, mask.context = "soft", context
