"""Labelled accuracy of frozen features: a linear probe and nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

PENALTY = 0.01
"""Half the squared norm of the standardised weights is added to the mean cross-entropy with this
factor."""
STEPS = 200
NEIGHBOURS = 20


@dataclass(frozen=True)
class Probe:
    """Multinomial logistic regression on standardised features."""

    mean: torch.Tensor
    scale: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """`features` [samples, width] to [samples, classes]."""
        return (features.double() - self.mean) / self.scale @ self.weight.T + self.bias


def fit_probe(features: torch.Tensor, labels: torch.Tensor, classes: int) -> Probe:
    """Find the minimum of a convex loss with L-BFGS from zero: no seed, no schedule.

    `features` [samples, width], `labels` [samples] of class numbers. Computed in float64.
    """
    x = features.double()
    mean, scale = x.mean(0), x.std(0).clamp(min=1e-8)
    x = (x - mean) / scale
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=STEPS, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        solver.zero_grad()
        value = (
            nn.functional.cross_entropy(x @ weight.T + bias, labels)
            + PENALTY / 2 * weight.square().sum()
        )
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    return Probe(mean, scale, weight.detach(), bias.detach())


def nearest_classes(
    gallery: torch.Tensor,
    labels: torch.Tensor,
    queries: torch.Tensor,
    classes: int,
    neighbours: int = NEIGHBOURS,
) -> torch.Tensor:
    """Votes [queries, classes] of the nearest gallery features by cosine, each vote weighing its
    similarity."""
    gallery, queries = (nn.functional.normalize(x.double(), dim=1) for x in (gallery, queries))
    similarity, index = (queries @ gallery.T).topk(min(neighbours, len(gallery)), dim=1)
    votes = torch.zeros(len(queries), classes, dtype=torch.float64)
    return votes.scatter_add_(1, labels[index], similarity.clamp(min=0) + 1e-9)


def hits(scores: torch.Tensor, labels: torch.Tensor, k: int) -> list[float]:
    """1.0 where the label is among the `k` best scores, else 0.0."""
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return (best == labels.unsqueeze(1)).any(1).double().tolist()
