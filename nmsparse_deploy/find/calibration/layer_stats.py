"""Statistics of a layer's inputs, from which methods choose: token count, column norms, Gram
matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.registry import Need

STRIP, STRIPS = 192, 8
"""Of a symmetric product only the upper triangle is computed, in at most so many strips, none
narrower than a matrix product needs to be fast."""


@dataclass(frozen=True)
class ExpertTokens:
    """The numbers of calibration tokens that reached each expert of a matrix, and the experts that
    too few reached."""

    tokens: tuple[int, ...]
    by_magnitude: tuple[int, ...]


@dataclass(frozen=True)
class LayerStats:
    """Statistics of the inputs `X` (`n` columns, `tokens` rows) that one or more layers read.

    `square_sum[j]` is the sum of squares of column j and `total[j]` its sum (fp32); `gram` is `XᵀX`
    (fp32, symmetric) or None; `cross` is `X_dᵀX` with `X_d` the inputs that the dense model gives
    the same layer for the same tokens, or None. For a layer that writes to the residual stream
    `drift` is `(R_d - R)ᵀX` `[outputs, n]`, with `R` what its output is added to and `R_d` the same
    in the dense model; and where it has fewer outputs than inputs, `wanted` stands in for `cross`:
    `Y_dᵀX` `[outputs, n]`, with `Y_d = X_d Wᵀ` what it puts out there.

    A stack of matrices has the statistics of each in `experts`. Those of an expert that hardly any
    token reached are `white` instead: as if its inputs were uncorrelated and of equal size, so that
    every method ranks by magnitude.
    """

    tokens: int
    square_sum: torch.Tensor
    gram: torch.Tensor | None = None
    cross: torch.Tensor | None = None
    total: torch.Tensor | None = None
    drift: torch.Tensor | None = None
    wanted: torch.Tensor | None = None
    experts: tuple[LayerStats, ...] = ()
    white: bool = False

    @classmethod
    def none(cls) -> LayerStats:
        """Make empty statistics, for methods that look at weights only."""
        return cls(0, torch.zeros(0))

    @property
    def rms(self) -> torch.Tensor:
        """Return the root mean square of every input column."""
        return (self.square_sum / max(self.tokens, 1)).sqrt()

    @property
    def mean(self) -> torch.Tensor:
        """Return the mean of every input column."""
        return (
            torch.zeros_like(self.square_sum)
            if self.total is None
            else self.total / max(self.tokens, 1)
        )

    def expert_tokens(self) -> ExpertTokens | None:
        """Count the tokens of each expert; None for a matrix that all tokens reach."""
        if not self.experts and not self.white:
            return None
        experts = self.experts or (self,)
        return ExpertTokens(
            tuple(own.tokens for own in experts),
            tuple(number for number, own in enumerate(experts) if own.white),
        )

    def reordered(self, order: torch.Tensor) -> LayerStats:
        """Return the statistics of the same inputs with column `order[j]` in the place of column
        j."""
        order = order.to(self.square_sum.device)

        def both(matrix: torch.Tensor | None) -> torch.Tensor | None:
            return None if matrix is None else matrix[order][:, order]

        return replace(
            self,
            square_sum=self.square_sum[order],
            gram=both(self.gram),
            cross=both(self.cross),
            total=None if self.total is None else self.total[order],
            drift=None if self.drift is None else self.drift[:, order],
            wanted=None if self.wanted is None else self.wanted[:, order],
        )


class StatsAccumulator:
    """Sums of statistics over batches, in fp32 and outside autocast whatever dtype the forward pass
    runs in; products of the two streams are taken in bf16 where that is what the streams are."""

    def __init__(self, need: Need) -> None:
        self.need = need
        self.tokens = 0
        self.square_sum: torch.Tensor | None = None
        self.gram: torch.Tensor | None = None
        self.cross: torch.Tensor | None = None
        self.total: torch.Tensor | None = None
        self.drift: torch.Tensor | None = None
        self.wanted: torch.Tensor | None = None

    @torch.no_grad()
    def update(
        self,
        layer: nn.Module,
        x: torch.Tensor,
        dense: torch.Tensor | None = None,
        drift: torch.Tensor | None = None,
        wanted: torch.Tensor | None = None,
        expert: int = 0,
    ) -> None:
        """Add one batch of a layer's inputs, what the dense model feeds it for the same tokens, by
        how much the residual stream beside it has drifted away from the dense model's, and what the
        layer puts out there without its bias (where that is narrower than its inputs).

        Convolutions are unfolded in the order of `to_rows`.
        """
        with torch.autocast(x.device.type, enabled=False):
            rows = as_rows(layer, x)
            self.tokens += rows.shape[0]
            self.total = rows.sum(0) if self.total is None else self.total.add_(rows.sum(0))
            if self.need == "gram":
                self.gram = _add_gram(self.gram, rows)
                native = rows.bfloat16() if x.dtype == torch.bfloat16 else rows
                if wanted is not None and wanted.shape[-1] < rows.shape[-1]:
                    self.wanted = _add_product(self.wanted, wanted, native)
                elif dense is not None:
                    self.cross = _add_product(self.cross, as_rows(layer, dense), native)
                if drift is not None:
                    self.drift = _add_product(self.drift, drift, native)
            else:
                squares = rows.square().sum(0)
                self.square_sum = (
                    squares if self.square_sum is None else self.square_sum.add_(squares)
                )

    def parts(self) -> list[StatsAccumulator]:
        """Return the accumulators of single matrices: this one alone."""
        return [self]

    def finish(self) -> LayerStats:
        """Return everything summed so far. Raises `NmsparseError` when the model's activations have
        overflowed."""
        for total in (self.gram, self.cross, self.drift, self.wanted, self.square_sum):
            if total is not None and not torch.isfinite(total).all():
                raise NmsparseError(
                    "The calibration statistics contain NaN or Inf: the model's activations overflow.",
                    "set compute to fp32 in the recipe, or look at the model's outputs first",
                )
        if self.gram is not None:
            gram = self.gram.triu() + self.gram.triu(1).T
            return LayerStats(
                self.tokens,
                gram.diagonal().clone(),
                gram,
                self.cross,
                self.total,
                self.drift,
                self.wanted,
            )
        square_sum = self.square_sum if self.square_sum is not None else torch.zeros(0)
        return LayerStats(self.tokens, square_sum, total=self.total)


def _add_gram(gram: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    """Add `XᵀX` to the upper triangle of a Gram, in strips of rows; what lies below is not meant."""
    width = rows.shape[1]
    gram = rows.new_zeros(width, width) if gram is None else gram
    strip = max(STRIP, -(-width // STRIPS))
    for start in range(0, width, strip):
        gram[start : start + strip, start:].addmm_(
            rows[:, start : start + strip].T, rows[:, start:]
        )
    return gram


def _add_product(
    total: torch.Tensor | None, other: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """Add the product of two different matrices, in the dtype of `rows`, to a sum in fp32.

    Rounding each batch's product to bf16 is an error far below that of a finite sample, and nothing
    is factorised that comes of it.
    """
    product = other.to(rows.dtype).reshape(-1, other.shape[-1]).T @ rows
    return product.float() if total is None else total.add_(product)


def as_rows(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return a layer's inputs as the fp32 matrix `[tokens, reduction]` that `to_rows` of its weight
    multiplies."""
    x = x.float()
    if isinstance(layer, nn.Conv1d):  # pointwise: others are no targets
        x = x[..., :: layer.stride[0]].transpose(-1, -2)
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    padding: Any = layer.padding
    columns = nn.functional.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
    batch, _, places = columns.shape
    return (
        columns.view(batch, layer.in_channels, -1, places)
        .permute(0, 3, 2, 1)
        .reshape(batch * places, -1)
    )
