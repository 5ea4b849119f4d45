"""ProxSparse: train a copy of the weights under a regulariser that is zero on N:M groups, and keep
only its support.

    min_W  L(W) + λ₁ Σ_groups e_{N+1}(|w|) + λ₂ ‖ W / (W₀ + ε sgn W₀) ∘ (W - W₀) ‖²_F

A step of AdamW on `L` and the last term, then the proximal operator of the one before
(`learn/prox.py`) on every matrix. In the end the N largest of every group of the copy stay, with
their original values; the copy is thrown away. The last term holds back what changes much for its
size.

Since `prox_λ(c z) = c prox_{λ c^(N-1)}(z)`, a strength means something only beside the size of the
weights, which is why published values of λ₁ span 0.2 to 25. Here `pressure` is the strength of all
steps together, relative to each matrix, and `reach` how far the optimiser can carry a weight over
the run, both in units of the matrix's root mean square `s`:

    λ₁ = pressure / (steps · s^(N-1)),   rate = reach · s / steps

The published settings for Llama-2-7B (λ₁ 0.25, rate 1e-4, 400 steps) would be 2 and 2 if all its
matrices had `s` 0.02; the defaults come from there. `lambda1` and `rate` set the raw numbers. The
copy is fp32: in bf16 most of these steps round to nothing.

Liu et al., ProxSparse, ICML 2025, arXiv:2502.00258, sections 3 and 4. Written from the formulas.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from nmsparse_deploy.find.learn.learner import LearnedMethod, MaskLearner, Subject
from nmsparse_deploy.find.learn.mask_parametrization import (
    MaskParametrization,
    MaskSite,
    original_weight,
)
from nmsparse_deploy.find.learn.prox import prox
from nmsparse_deploy.find.learn.sharded import put, whole
from nmsparse_deploy.find.learn.step_context import StepContext
from nmsparse_deploy.masks import project
from nmsparse_deploy.models.base import to_rows
from nmsparse_deploy.recipe import ProxSparse

FUSED = 3
"""Query, key and value stored as one: three times as many outputs as inputs. Each has a size of its
own."""


class SupportMask(MaskParametrization):
    """Trained weights whose N largest of a group are the mask of the original ones."""

    def __init__(self, site: MaskSite) -> None:
        self.site = site
        self.prior: torch.Tensor | None = None
        """What the mask is until the first step: training starts at the dense weights, whatever the
        prior."""

    def start(self, rows: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
        self.prior = prior
        return rows.to(torch.float32, copy=True)  # the original must not move

    def soft(
        self, values: torch.Tensor, rows: torch.Tensor, context: StepContext, name: str
    ) -> torch.Tensor:
        return values

    def hard(self, values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return (
            project(values.detach().abs(), self.site.pattern) if self.prior is None else self.prior
        )

    def slices(self, rows: torch.Tensor) -> Iterator[slice]:
        """Yield the rows that make one matrix."""
        height, width = rows.shape
        sizes = self.site.slices or ((width,) * FUSED if height == FUSED * width else (height,))
        start = 0
        for size in sizes:
            yield slice(start, start + size)
            start += size


class ProximalLearner(MaskLearner):
    """AdamW on a copy of the weights, and the proximal operator after every step."""

    def __init__(self, spec: ProxSparse) -> None:
        super().__init__(SupportMask, spec.rate or 1.0, decay=0.0, moments=32)
        self.spec = spec
        self.shards = not spec.lambda2  # that term is taken outside the forward pass
        self.sizes: dict[str, list[float]] = {}
        """Root mean square of every slice of the original weights, by `MaskSite.path`."""

    def prepare(
        self, subject: Subject, priors: Mapping[str, torch.Tensor]
    ) -> torch.optim.Optimizer:
        super().prepare(subject, priors)
        groups = []
        for path, mask in self.masks.items():
            rows = to_rows(original_weight(self.module, mask.site), mask.site.axis).float()
            slices = mask.parametrized_by(SupportMask).slices(rows)
            self.sizes[path] = [float(rows[part].square().mean().sqrt()) for part in slices]
            rate = (
                self.spec.rate
                or self.spec.reach * float(rows.square().mean().sqrt()) / self.spec.steps
            )
            groups.append({"params": [mask.values], "lr": rate})
        return torch.optim.AdamW(groups, 1.0, self.betas, weight_decay=0.0, fused=True)

    def loss_terms(
        self, subject: Subject, number: int, context: StepContext
    ) -> dict[str, torch.Tensor]:
        terms = super().loss_terms(subject, number, context)
        if self.spec.lambda2:
            distances = [
                frozen(
                    mask.values,
                    to_rows(original_weight(self.module, mask.site), mask.site.axis),
                    self.spec.epsilon,
                )
                for mask in self.masks.values()
            ]
            terms["frozen"] = self.spec.lambda2 * torch.stack(distances).sum()
        return terms

    def after_step(self, context: StepContext) -> None:
        for path, mask in self.masks.items():
            support, pattern = mask.parametrized_by(SupportMask), mask.site.pattern
            support.prior, values = None, whole(mask.values.data)
            for part, size in zip(support.slices(values), self.sizes[path]):
                values[part] = prox(values[part], self._strength(size, pattern.keep), pattern)
            put(mask.values.data, values)

    def _strength(self, size: float, keep: int) -> float:
        if self.spec.lambda1 is not None:
            return self.spec.lambda1
        return self.spec.pressure / self.spec.steps / size ** (keep - 1) if size else 0.0

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Forget the prior: a checkpoint is written after a step at the earliest."""
        for mask in self.masks.values():
            mask.parametrized_by(SupportMask).prior = None


def frozen(weight: torch.Tensor, start: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return `‖ W / (W₀ + ε sgn W₀) ∘ (W - W₀) ‖²_F` with `sgn 0 = 1`."""
    start = start.float()
    sign = torch.where(start < 0, -1.0, 1.0)
    return (weight / (start + epsilon * sign) * (weight - start)).square().sum()


LEARNED = LearnedMethod(ProximalLearner)
