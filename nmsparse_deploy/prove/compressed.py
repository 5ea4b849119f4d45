"""Weights that a checkpoint stores in several tensors: decoded where the format says which places are
zero, otherwise named.

compressed-tensors keeps the values that are not pruned and one bit a place (lowest bit first, rows
padded to whole bytes). Formats whose codes are packed, often in the order of a kernel, are not
unpacked here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nmsparse_deploy.pattern import NMPattern, Unstructured
from nmsparse_deploy.prove.group_counter import ELEMENT_TYPES
from nmsparse_deploy.prove.report import TensorCheck
from nmsparse_deploy.prove.rows import foreign_check, unmatched
from nmsparse_deploy.prove.scan import FileBytes, Scanner, countable
from nmsparse_deploy.prove.tensor_files import StoredTensor

PACKED = (
    ("weight_packed", "meta", "marlin-24 packs codes and places in the order of its kernel"),
    ("weight_packed", "", "compressed-tensors packs several codes into a word"),
    ("qweight", "", "GPTQ and AWQ pack several codes into a word"),
    ("B_24", "B_meta", "marlin-24 packs codes and places in the order of its kernel"),
    ("B", "meta", "marlin-24 packs codes and places in the order of its kernel"),
    ("B", "s", "marlin packs codes in the order of its kernel"),
    ("weight", "weight.absmax", "bitsandbytes packs two codes into a byte"),
    ("weight", "weight_scale_2", "NVFP4 packs two codes into a byte"),
    ("W_q", "", "HQQ packs several codes into a word"),
    ("codes", "codebooks", "AQLM stores numbers of codebook entries"),
    ("_blocks", "_scales", "MXFP4 packs two codes into a byte"),
)
"""How the tensor of a packed weight ends, the ending of one that has to be beside it, and why it is
not followed; the more special come first."""
CODES = {"I8", "U8", "I16", "U16", "I32", "U32", "I64", "F4"}
HELPERS = re.compile(
    r"(scale_packed|meta|B_meta|s|scales?|zeros?|qzeros|g_idx|codebooks|row_offsets|_scales|"
    r"weight_(shape|scale(_\d)?|zero_point|g_idx|global_scale)|input(_global)?_scale|"
    r"weight\.(absmax|quant_map|nested_\w+|quant_state\.\w+))"
)
"""What stands beside a packed weight and belongs to it."""


@dataclass(frozen=True)
class Bitmask:
    """A weight as its kept values and a bit for every place."""

    name: str
    values: StoredTensor
    bits: StoredTensor
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Packed:
    """A weight in codes that are not unpacked here."""

    name: str
    why: str


@dataclass(frozen=True)
class Compressed:
    """The weights of a checkpoint that are not tensors of their own shape."""

    bitmasks: tuple[Bitmask, ...]
    packed: tuple[Packed, ...]
    owners: Mapping[str, str]
    """Every tensor that belongs to one of them -> that weight."""


@dataclass(frozen=True)
class Places:
    """The bits of a mask, one byte for every place of [rows, width]."""

    bits: FileBytes
    rows: int
    width: int

    @property
    def nbytes(self) -> int:
        """Return how many places there are."""
        return self.rows * self.width

    def chunks(self, size: int) -> Iterator[np.ndarray]:
        """Yield the places of whole rows, or of whole bytes where rows end with them."""
        if self.width % 8 == 0:
            for raw in self.bits.chunks(max(1, size // 8)):
                yield np.unpackbits(raw, bitorder="little")
            return
        stride = -(-self.width // 8)
        for raw in self.bits.chunks(max(1, size // self.width) * stride):
            rows = raw.reshape(-1, stride)
            yield np.unpackbits(rows, axis=1, count=self.width, bitorder="little").reshape(-1)


def find_compressed(tensors: Sequence[StoredTensor]) -> Compressed:
    """Return the weights that are stored in several tensors or packed into one."""
    by_name = {tensor.name: tensor for tensor in tensors}
    bitmasks: list[Bitmask] = []
    packed: dict[str, Packed] = {}  # by what stands before the ending of its name
    owners: dict[str, str] = {}
    for name, tensor in by_name.items():
        stem, _, last = name.rpartition(".")
        values, shape = by_name.get(f"{stem}.compressed"), by_name.get(f"{stem}.shape")
        if last == "bitmask" and values and shape:
            bitmasks.append(Bitmask(stem, values, tensor, _numbers(shape)))
            names = (f"{stem}.{part}" for part in ("compressed", "bitmask", "shape", "row_offsets"))
            owners.update((part, stem) for part in names if part in by_name)
        for ending, partner, why in PACKED:
            stem = name.removesuffix(ending)
            whole = not stem or stem[-1] == "." or ending[0] == "_"
            fits = stem != name and whole and tensor.dtype in CODES
            if fits and (not partner or stem + partner in by_name):
                packed[stem] = Packed(name, why)
                break
    for name in by_name:
        for cut in range(len(name)):
            weight = packed.get(name[:cut])
            if weight and (name == weight.name or HELPERS.fullmatch(name, cut)):
                owners.setdefault(name, weight.name)
    return Compressed(tuple(bitmasks), tuple(packed.values()), owners)


def bitmask_check(
    weight: Bitmask, pattern: NMPattern, expected: bool, scanner: Scanner
) -> TensorCheck:
    """Judge the places that a bitmask keeps; there have to be as many values, all finite."""
    row = TensorCheck("file", weight.name, weight.values.dtype, weight.shape, str(pattern))
    rows, width = weight.shape if len(weight.shape) == 2 else (0, 0)
    if weight.bits.dtype != "U8" or weight.bits.shape != (rows, -(-width // 8)):
        return unmatched(
            row,
            f"its bitmask {list(weight.bits.shape)} does not fit its shape {list(weight.shape)}",
        )
    place, element = ELEMENT_TYPES["U8"], ELEMENT_TYPES.get(weight.values.dtype)
    if not countable(weight.shape, 1, place, pattern):
        reason = f"axis 1 of {list(weight.shape)} cannot be checked in groups of {pattern.group}"
        return unmatched(row, reason) if expected else replace(row, skipped=reason)
    source = Places(weight.bits.source, rows, width)
    scanned = scanner.scan(source, place, weight.shape, [1], pattern)
    row = foreign_check(row, pattern, scanned, expected)
    kept, stored = scanned.counts[1].nonzeros, math.prod(weight.values.shape)
    if kept != stored:
        row = unmatched(row, f"its bitmask keeps {kept:,} places, but {stored:,} values are stored")
    if element is None or not stored:
        return row
    anywhere = Unstructured(0.5)
    values = scanner.scan(weight.values.source, element, (stored,), [0], anywhere).counts[0]
    row = replace(row, negative_zeros=values.negative_zeros, nonfinite=values.nonfinite)
    if values.nonfinite and row.skipped is None:
        return unmatched(row, f"{values.nonfinite:,} values are NaN or infinite")
    return row


def _numbers(tensor: StoredTensor) -> tuple[int, ...]:
    """Read the shape that a checkpoint stores as a tensor; empty when it is none."""
    kind = {"I64": "<i8", "I32": "<i4"}.get(tensor.dtype)
    if kind is None or not 0 < tensor.source.nbytes <= 64:
        return ()
    raw = b"".join(chunk.tobytes() for chunk in tensor.source.chunks(64))
    numbers = np.frombuffer(raw, kind).tolist()
    return tuple(numbers) if all(0 < number < 1 << 40 for number in numbers) else ()
