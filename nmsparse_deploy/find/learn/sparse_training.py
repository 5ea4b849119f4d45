"""Training the weights under a mask: the mask stays, or follows the weights until it is frozen.

With `W` the trained values, `m` the mask, `W₀` the incoming pruned weight and `top` the N largest
of every group:

    fixed      forward W∘m, gradient G∘m; what is pruned has no gradient and no optimiser state, and stays zero
    SR-STE     forward W∘top(W), gradient G + β (1-m)∘W to all weights: pruned ones can come back, and fade otherwise
    S-STE      forward s(W) = sgn(W) max(|W| - t, 0), t the largest pruned magnitude of the group; gradient G to all.
               Continuous: when two weights change ranks both are zero
    adapters   forward W₀∘m + m∘(B A), with B and A of low rank: merges without breaking the pattern

SR-STE and S-STE were made for training from dense weights. Here they start at a mask that was found
with care, so what is pruned starts at its dense value but below what is kept of its group, and
S-STE adds `t` to what is kept: both start at the incoming weights, which is also why S-STE's scale
`<w, s> / <s, s>` is one.

Zhou et al., SR-STE, ICLR 2021, arXiv:2102.04010; Hu et al., S-STE, NeurIPS 2024, arXiv:2409.09099;
masked low-rank updates as in Lu et al., SPP, ICML 2024, arXiv:2405.16057.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nmsparse_deploy.find.learn.mask_parametrization import MaskParametrization
from nmsparse_deploy.find.learn.step_context import StepContext, digest
from nmsparse_deploy.masks import project
from nmsparse_deploy.pattern import NMPattern

MAX_SHARE = 0.99
"""Where a pruned weight starts at most, as a share of the smallest kept one of its group."""


class FixedMask(MaskParametrization):
    """The mask stays; values are the weights."""

    def __init__(self) -> None:
        self.mask = torch.empty(0)

    def start(self, rows: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
        self.mask = prior
        return torch.where(prior, rows.float(), 0.0)

    def soft(
        self, values: torch.Tensor, rows: torch.Tensor, context: StepContext, name: str
    ) -> torch.Tensor:
        return torch.where(self.mask, values, 0.0)

    def hard(self, values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return self.mask

    def kept(self, values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return values.detach()

    def penalty(self, values: torch.Tensor) -> torch.Tensor | None:
        """Return a term of the loss that is this weight's own, or None."""
        return None

    def after_step(self, values: torch.Tensor, context: StepContext) -> None:
        """Do what follows the optimiser's step; may change `values` in place."""

    def state(self) -> dict[str, torch.Tensor]:
        """Return what has to survive a kill."""
        return {}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state` returned."""


class MovingMask(FixedMask):
    """The mask is that of the largest values, looked at every `refresh` steps until step `until`,
    and then fixed."""

    def __init__(self, pattern: NMPattern, dense: torch.Tensor, refresh: int, until: int) -> None:
        super().__init__()
        self.pattern, self.dense, self.refresh, self.until = pattern, dense, refresh, until
        self.frozen = False

    def after_step(self, values: torch.Tensor, context: StepContext) -> None:
        done = context.step + 1
        if self.frozen or (done < self.until and done % self.refresh):
            return
        self.mask = project(values.abs(), self.pattern)
        if done >= self.until:
            values.copy_(torch.where(self.mask, self.kept(values, values), 0.0))
            self.frozen = True

    def state(self) -> dict[str, torch.Tensor]:
        return {"mask": self.mask, "frozen": torch.tensor(self.frozen)}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        self.mask, self.frozen = state["mask"].to(self.mask.device), bool(state["frozen"])

    def pruned(self, weight: torch.Tensor) -> torch.Tensor:
        """Return where pruned weights start: the dense values, below the smallest kept one of the
        group. Zero where kept."""
        kept = torch.where(self.mask, weight.abs(), torch.inf)
        limit = MAX_SHARE * kept.unflatten(-1, (-1, self.pattern.group)).amin(-1, keepdim=True)
        dense = (
            self.dense.to(weight)
            .unflatten(-1, (-1, self.pattern.group))
            .clamp(-limit, limit)
            .flatten(-2)
        )
        return torch.where(self.mask, 0.0, dense)


class SrSte(MovingMask):
    """Straight through the choice of the largest, with a decay on what is pruned."""

    def __init__(
        self, pattern: NMPattern, dense: torch.Tensor, refresh: int, until: int, decay: float
    ) -> None:
        super().__init__(pattern, dense, refresh, until)
        self.decay = decay

    def start(self, rows: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
        weight = super().start(rows, prior)
        return weight + self.pruned(weight)

    def soft(
        self, values: torch.Tensor, rows: torch.Tensor, context: StepContext, name: str
    ) -> torch.Tensor:
        kept = torch.where(self.mask, values, 0.0)
        return kept if self.frozen else through(kept, values)

    def penalty(self, values: torch.Tensor) -> torch.Tensor | None:
        """Return `β/2 ‖(1-m)∘W‖²`, whose gradient is the decay."""
        if self.frozen or not self.decay:
            return None
        return self.decay / 2 * torch.where(self.mask, 0.0, values).square().sum()


class SSte(MovingMask):
    """A threshold that moves with the weights."""

    def __init__(self, pattern: NMPattern, dense: torch.Tensor, until: int) -> None:
        super().__init__(pattern, dense, 1, until)

    def start(self, rows: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
        weight = super().start(rows, prior)
        pruned = self.pruned(weight)
        t = pruned.abs().unflatten(-1, (-1, self.pattern.group)).amax(-1, keepdim=True)
        lifted = weight.abs().unflatten(-1, (-1, self.pattern.group)) + t
        return torch.where(prior, lifted.flatten(-2).copysign(weight), pruned)

    def soft(
        self, values: torch.Tensor, rows: torch.Tensor, context: StepContext, name: str
    ) -> torch.Tensor:
        return (
            torch.where(self.mask, values, 0.0)
            if self.frozen
            else through(shrunk(values, self.pattern), values)
        )

    def kept(self, values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return values.detach() if self.frozen else shrunk(values.detach(), self.pattern)


class Adapters(FixedMask):
    """Low-rank changes under the mask. Values are `B` `[R, rank]` above `Aᵀ` `[K, rank]`."""

    def __init__(self, name: str, rank: int) -> None:
        super().__init__()
        self.name, self.rank = name, rank

    def start(self, rows: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
        self.mask = prior
        rank = min(self.rank, *rows.shape)
        generator = torch.Generator().manual_seed(digest("adapters", self.name))
        a = torch.randn(rows.shape[1], rank, generator=generator) / rank**0.5
        return torch.cat([torch.zeros(rows.shape[0], rank), a]).to(rows.device)

    def soft(
        self, values: torch.Tensor, rows: torch.Tensor, context: StepContext, name: str
    ) -> torch.Tensor:
        return torch.where(self.mask, self._merged(values, rows), 0.0)

    def kept(self, values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return self._merged(values.detach(), rows)

    def _merged(self, values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        b, a = values.split([rows.shape[0], rows.shape[1]])
        return rows.float() + b @ a.T


def shrunk(values: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    """Return `s(W)`: every group moves towards zero by its largest pruned magnitude."""
    sizes = values.abs().unflatten(-1, (-1, pattern.group))
    t = sizes.sort(dim=-1, descending=True).values[..., pattern.keep, None]
    return (sizes - t).clamp(min=0).flatten(-2).copysign(values)


def through(shown: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return `shown` in the forward pass, with the gradient handed to `values` as it is."""
    return shown.detach() + (values - values.detach())
