"""Frechet distance between two sets of feature vectors, each taken for a Gaussian.

    d^2 = ‖m_a - m_b‖^2 + tr(A + B - 2 (A^½ B A^½)^½)

Dowson and Landau 1982. On features of the Inception network it is called FID (Heusel et al. 2017,
arXiv:1706.08500); on any other features it is not, and figures of different features, or of
different numbers of samples, do not compare.
"""

from __future__ import annotations

import torch

from nmsparse_deploy.errors import UsageError


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of features `[samples, width]`, in float64. Raises `UsageError` for fewer than two
    samples."""
    if min(len(a), len(b)) < 2:
        raise UsageError("A Frechet distance needs at least two samples on each side.")
    a, b = a.double(), b.double()
    first, second = (torch.atleast_2d(torch.cov(features.T)) for features in (a, b))
    root = _root(first)
    middle = root @ second @ root
    cross = torch.linalg.eigvalsh((middle + middle.T) / 2).clamp(min=0).sqrt().sum()
    squared = (a.mean(0) - b.mean(0)).square().sum() + first.trace() + second.trace() - 2 * cross
    return max(0.0, float(squared))  # rounding may leave a tiny negative number


def _root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
