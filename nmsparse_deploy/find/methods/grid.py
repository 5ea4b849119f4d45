"""The grid that a joint sweep rounds kept weights to: symmetric, its scales fixed from the dense
weight beforehand.

    levels = 2^(bits-1) - 1,   s = max |w| / levels per row (or per run of `width` columns of a row),
    Q(w) = s · clamp(round(w / s), ±levels)

Zero is a level of its own, so what is pruned stays exactly zero. Inside a sweep a column is rounded
when it is frozen: `e_j = (w_j - q_j)/d_j` with `q_j = Q(w_j)` where it is kept and 0 elsewhere; the
columns after it absorb the error.

Frantar & Alistarh, SparseGPT, 2023, section 3.5 (joint sparsification and quantisation).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Grid:
    """`scales` are `[R, n / width]` in fp32: one for every run of `width` columns of a row."""

    scales: torch.Tensor
    width: int
    bits: int

    @classmethod
    def of(cls, weight: torch.Tensor, bits: int, width: int | None = None) -> Grid:
        """Make the grid of the dense `weight` `[R, n]`; `width` divides n, None = one scale for the
        whole row."""
        width = width or weight.shape[1]
        largest = weight.abs().unflatten(1, (-1, width)).amax(-1)
        return cls(torch.where(largest > 0, largest / _levels(bits), 1.0), width, bits)

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the nearest levels of a whole weight `[R, n]`, fp32 integers; times their scales
        they are its values."""
        return _nearest(weight, self._spread(), self.bits)

    def holds(self, weight: torch.Tensor) -> bool:
        """Tell whether every value of `weight` `[R, n]` is a level, stored in the dtype of
        `weight`."""
        return torch.equal((self.codes(weight.float()) * self._spread()).to(weight.dtype), weight)

    def _spread(self) -> torch.Tensor:
        return self.scales.repeat_interleave(self.width, 1)

    def freeze(
        self,
        first: int,
        w: torch.Tensor,
        factor: torch.Tensor,
        errors: torch.Tensor,
        kept: torch.Tensor,
    ) -> None:
        """Round the group `w` `[group, R]` that starts at column `first` and whose pruned weights
        are zero already.

        Column by column, with the errors left to the later ones and added to `errors`; `factor` is
        the group's block of `U`. What that moves in a pruned place is pruned again, so the outcome
        is that of one sweep doing both at once.
        """
        for column in range(w.shape[0]):
            scale = self.scales[:, (first + column) // self.width]
            level = torch.where(kept[column], _nearest(w[column], scale, self.bits) * scale, 0.0)
            error = (w[column] - level) / factor[column, column]
            errors[column] += error
            w[column] = level
            w[column + 1 :].addr_(factor[column, column + 1 :], error, alpha=-1)


def _levels(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def _nearest(w: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    return (w / scale).round().clamp(-_levels(bits), _levels(bits)) + 0.0  # -0.0 + 0.0 is 0.0
