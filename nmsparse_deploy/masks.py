"""Masks as small portable files: packed bits in safetensors, keyed by parameter name, bound to the
dense weights.

One bit per value, so the masks of an 8B model take 1 GB in memory and on disk. A mask is stored,
never inferred from zeros in a weight, and each carries its pattern, its group axis and a hash of
the dense weight it was found for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nmsparse_deploy.errors import CheckFailed, UsageError
from nmsparse_deploy.pattern import (
    BLOCK_SIZE,
    NMPattern,
    Pattern,
    Scope,
    Unstructured,
    parse_pattern,
)

FORMAT = "nmsparse-masks-1"
"""The one metadata key of a mask file; one, because safetensors writes several in random order."""


def tensor_hash(weight: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's shape, dtype and bytes: the identity of a dense weight."""
    digest = hashlib.sha256(f"{weight.dtype}{tuple(weight.shape)}".encode())
    digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def normalise_zeros(weight: torch.Tensor) -> int:
    """Write +0.0 over every -0.0 of `weight`, in place; return how many there were.

    Other pruning tools leave -0.0 (`weight * mask`), and so does rounding a tiny negative value to
    fewer bits.
    """
    negative = (weight == 0) & torch.signbit(weight)
    count = int(negative.sum())
    if count:
        weight.masked_fill_(negative, 0.0)
    return count


@dataclass(frozen=True)
class Mask:
    """One packed mask. `bits` holds one bit per value of the row-major weight, lowest bit first."""

    bits: np.ndarray
    shape: tuple[int, ...]
    axis: int
    pattern: Pattern
    dense_hash: str

    @classmethod
    def pack(cls, mask: torch.Tensor, axis: int, pattern: Pattern, dense_hash: str) -> Mask:
        """Pack a bool tensor, True = keep."""
        bits = np.packbits(mask.cpu().contiguous().numpy().reshape(-1), bitorder="little")
        return cls(bits, tuple(mask.shape), axis % mask.ndim, pattern, dense_hash)

    def unpack(self) -> torch.Tensor:
        """Return the mask as a bool tensor, True = keep."""
        size = int(np.prod(self.shape))
        return torch.from_numpy(
            np.unpackbits(self.bits, count=size, bitorder="little").astype(bool)
        ).view(self.shape)

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight with every pruned value exactly +0.0."""
        return torch.where(
            self.unpack().to(weight.device), weight, torch.zeros((), dtype=weight.dtype)
        )


@dataclass(frozen=True)
class MaskSet:
    """The masks of one model, and where they came from (method, recipe fingerprint, base model)."""

    masks: dict[str, Mask]
    info: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write one safetensors file. The caller makes it atomic."""
        table = {
            name: {
                "shape": m.shape,
                "axis": m.axis,
                "pattern": str(m.pattern),
                "dense": m.dense_hash,
            }
            for name, m in self.masks.items()
        }
        header = json.dumps({"info": self.info, "masks": table}, sort_keys=True)
        save_file({name: m.bits for name, m in self.masks.items()}, path, {FORMAT: header})

    @staticmethod
    def wrote(path: Path) -> bool:
        """Tell whether a safetensors file is a mask file of this tool."""
        try:
            with safe_open(path, framework="numpy") as file:
                return FORMAT in (file.metadata() or {})
        except (SafetensorError, OSError):
            return False

    @classmethod
    def load(cls, path: Path) -> MaskSet:
        """Read a mask file. Raises `UsageError` when it is missing, truncated or not a mask
        file."""
        if not path.is_file():
            raise UsageError(f"There is no mask file '{path}'.")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                if FORMAT not in metadata:
                    raise UsageError(
                        f"'{path}' is not a mask file of this tool (no '{FORMAT}' in its header)."
                    )
                header = json.loads(metadata[FORMAT])
                masks = {
                    name: _read(name, row, file.get_tensor(name))
                    for name, row in header["masks"].items()
                }
                return cls(masks, dict(header["info"]))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UsageError(f"The mask file '{path}' is damaged: {error}.") from error

    def check_base(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Raise `CheckFailed` unless every mask was found for exactly these dense weights."""
        for name, mask in self.masks.items():
            weight = weights.get(name)
            if weight is None:
                raise CheckFailed(
                    f"These masks belong to another model: it has no parameter '{name}'."
                )
            if tuple(weight.shape) != mask.shape:
                raise CheckFailed(
                    f"These masks belong to another model: '{name}' has shape {tuple(weight.shape)}, "
                    f"its mask {mask.shape}."
                )
            if tensor_hash(weight) != mask.dense_hash:
                raise CheckFailed(
                    f"These masks belong to another model: '{name}' has other dense weights than the "
                    "mask was found for."
                )


class _Entry(TypedDict):
    """A mask in the header of a mask file."""

    shape: list[int]
    axis: int
    pattern: str
    dense: str


def _read(name: str, row: _Entry, bits: np.ndarray) -> Mask:
    shape = tuple(int(n) for n in row["shape"])
    if bits.dtype != np.uint8 or bits.size != -(-int(np.prod(shape)) // 8):
        raise ValueError(f"'{name}' holds {bits.size} bytes, which do not fit its shape {shape}")
    return Mask(bits, shape, int(row["axis"]), parse_pattern(row["pattern"]), str(row["dense"]))


def project(
    scores: torch.Tensor, pattern: Pattern, axis: int = -1, scope: Scope = "layer"
) -> torch.Tensor:
    """Keep the `keep` highest scores of every group along `axis`; equal scores keep the lowest
    index.

    An unstructured pattern keeps exactly `round(density * count)` of the values that compete in
    `scope`; there an index counts along the rows, row after row. Returns a bool mask of the shape
    of `scores`, True = keep. Raises `ValueError` when the axis is not divisible by the group or a
    score is NaN.
    """
    if scores.shape[axis] % pattern.alignment:
        raise ValueError(
            f"axis {axis} of shape {tuple(scores.shape)} is not divisible by {pattern.alignment}"
        )
    if torch.isnan(scores).any():
        raise ValueError("scores contain NaN")
    lines = scores.movedim(axis, -1)
    if isinstance(pattern, Unstructured):
        masks = [
            _highest(contest, pattern.kept(contest.shape[-1])).view(part.shape)
            for part, contest in _contests(lines, scope)
        ]
        return torch.cat(masks, -1).movedim(-1, axis)
    groups = lines.unflatten(-1, (-1, pattern.group))
    order = groups.argsort(dim=-1, descending=True, stable=True)[..., : pattern.keep]
    mask = torch.zeros(groups.shape, dtype=torch.bool, device=scores.device).scatter_(
        -1, order, True
    )
    return mask.flatten(-2).movedim(-1, axis)


def _contests(lines: torch.Tensor, scope: Scope) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the parts of `lines` side by side, each with its values as
    `[contests, competitors]`."""
    if scope == "row":
        return [(lines, lines.reshape(-1, lines.shape[-1]))]
    parts = lines.split(BLOCK_SIZE, -1) if scope == "columns" else (lines,)
    return [(part, part.reshape(1, -1)) for part in parts]


def _highest(contests: torch.Tensor, keep: int) -> torch.Tensor:
    """Mark the `keep` highest values of every row by one threshold a row; sorting a whole layer is
    far slower."""
    if not keep:
        return torch.zeros_like(contests, dtype=torch.bool)
    threshold = contests.kthvalue(contests.shape[-1] - keep + 1, dim=-1, keepdim=True).values
    above, level = contests > threshold, contests == threshold
    places = keep - above.sum(-1, keepdim=True)
    return above | (level & (level.cumsum(-1, dtype=torch.int32) <= places))


def mask_follows(
    mask: torch.Tensor, pattern: Pattern, axis: int = -1, scope: Scope | None = None
) -> bool:
    """Tell whether a bool mask keeps exactly `keep` of every group along `axis`.

    An unstructured one has to keep the exact count in every contest of `scope`; where the scope is
    not known, a count in all that the rounding of some scope allows.
    """
    lines = mask.movedim(axis, -1)
    if isinstance(pattern, NMPattern):
        return bool((lines.unflatten(-1, (-1, pattern.group)).sum(-1) == pattern.keep).all())
    if scope is None:
        return pattern.allows(int(mask.sum()), lines[..., 0].numel(), lines.shape[-1])
    return all(
        bool((contest.sum(-1) == pattern.kept(contest.shape[-1])).all())
        for _, contest in _contests(lines, scope)
    )
