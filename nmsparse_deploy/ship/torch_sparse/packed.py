"""2:4 weights without their zeros: two values of every four, and two bits that say where each of
them belongs.

    bits per group = 2 · b + 2 · 2,   dense: 4 · b      ->  9/16 for b = 16,  10/16 for b = 8

A byte holds the places of two groups, lowest bits first; in a group the lower place comes first.
Sparse tensor cores want the same information in an order that depends on GPU and library, so files
keep this one and the library's own is made when a model is loaded. What implies 2:4 (1:4, 2:8) is
packed just as well: a group with fewer values keeps zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nmsparse_deploy.errors import CheckFailed
from nmsparse_deploy.masks import project
from nmsparse_deploy.pattern import TWO_FOUR

PLACES_PER_BYTE = 4
"""Two bits each."""
_BITS = {1: torch.uint8, 2: torch.int16}
"""Values are moved as bits: not every processor selects among 8-bit floats."""


@dataclass(frozen=True)
class Packed:
    """A matrix `[n, k]` in 2:4: `values` `[n, k/2]` in its dtype, `places` `[n, k/8]` as bytes."""

    values: torch.Tensor
    places: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        n, kept = self.values.shape
        return n, kept // TWO_FOUR.keep * TWO_FOUR.group

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.places.nbytes


def stored_share(dtype: torch.dtype) -> float:
    """Return bytes of a packed matrix relative to the dense one: 9/16 for 16 bits, 10/16 for 8."""
    bits = 8 * dtype.itemsize
    return TWO_FOUR.density + TWO_FOUR.keep * (8 / PLACES_PER_BYTE) / (TWO_FOUR.group * bits)


def packable(k: int, n: int) -> bool:
    """Tell whether the places of a row fill whole bytes."""
    return (
        n > 0
        and k > 0
        and k // TWO_FOUR.group * TWO_FOUR.keep % PLACES_PER_BYTE == 0
        and k % TWO_FOUR.group == 0
    )


def pack(rows: torch.Tensor) -> Packed:
    """Pack a matrix whose groups lie along the last axis. Raises `CheckFailed` when one holds more
    than two values."""
    n, k = rows.shape
    bits = rows.contiguous().view(_BITS[rows.element_size()])
    nonzero = bits != 0
    if rows.is_floating_point():
        nonzero &= (
            bits != torch.iinfo(bits.dtype).min if bits.dtype.is_signed else bits != 0x80
        )  # minus zero
    groups = nonzero.view(n, -1, TWO_FOUR.group)
    bad = int((groups.sum(-1) > TWO_FOUR.keep).sum())
    if bad:
        raise CheckFailed(
            f"{bad} of {groups[..., 0].numel()} groups hold more than {TWO_FOUR.keep} values, so the "
            f"weight is not {TWO_FOUR} and cannot be packed."
        )
    kept = project(nonzero.to(torch.uint8), TWO_FOUR)
    places = (
        torch.arange(TWO_FOUR.group, device=rows.device).to(torch.uint8).repeat(k // TWO_FOUR.group)
    )
    chosen = places.expand(n, k)[kept].view(n, -1, PLACES_PER_BYTE)
    shifts = torch.arange(0, 8, 8 // PLACES_PER_BYTE, device=rows.device)
    packed = (chosen.int() << shifts).sum(-1).to(torch.uint8)
    return Packed(torch.where(nonzero, bits, 0)[kept].view(n, -1).view(rows.dtype), packed)


def unpack(packed: Packed) -> torch.Tensor:
    """Unpack the matrix with its zeros. Raises `CheckFailed` when two values of a group claim the
    same place."""
    n, k = packed.shape
    bits = packed.values.view(_BITS[packed.values.element_size()]).view(n, -1, TWO_FOUR.keep)
    shifts = torch.arange(0, 8, 8 // PLACES_PER_BYTE, device=bits.device)
    places = ((packed.places.int().unsqueeze(-1) >> shifts) % TWO_FOUR.group).view(
        n, -1, TWO_FOUR.keep
    )
    if bool((places.diff(dim=-1) <= 0).any()):
        raise CheckFailed(
            "The packed weight is damaged: two values of a group have the same place."
        )
    rows = torch.zeros(n, k // TWO_FOUR.group, TWO_FOUR.group, dtype=bits.dtype, device=bits.device)
    return rows.scatter_(-1, places.long(), bits).view(n, k).view(packed.values.dtype)
