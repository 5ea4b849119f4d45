"""Where the bytes of an ONNX tensor lie (raw, in typed fields, in a file beside the model), read as
untrusted input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nmsparse_deploy.errors import UsageError, first_line
from nmsparse_deploy.prove.scan import ByteSource, FileBytes, MemoryBytes, Nibbles
from nmsparse_deploy.prove.tensor_files import stays_inside

if TYPE_CHECKING:
    from onnx import TensorProto

NAMES = {
    1: "F32",
    2: "U8",
    3: "I8",
    4: "U16",
    5: "I16",
    6: "I32",
    7: "I64",
    9: "BOOL",
    10: "F16",
    11: "F64",
    12: "U32",
    13: "U64",
    16: "BF16",
    17: "F8_E4M3",
    19: "F8_E5M2",
    21: "U4",
    22: "I4",
}
"""`TensorProto.DataType` by the names that the rest of the package uses."""
BITS = {
    "U4": 4,
    "I4": 4,
    "U8": 8,
    "I8": 8,
    "BOOL": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
}
WIDENED = {"U4": "U8", "I4": "I8"}
"""Packed 4-bit integers are seen as one byte each."""


def dtype_name(tensor: TensorProto) -> str:
    """Return `BF16`, `I4`...; for a type that cannot be read, ONNX's own name for it."""
    known = NAMES.get(tensor.data_type)
    if known:
        return known
    kinds: Any = type(tensor).DataType
    return (
        kinds.Name(tensor.data_type)
        if tensor.data_type in kinds.values()
        else f"type {tensor.data_type}"
    )


def element_name(dtype: str) -> str:
    """Return the type of the values as `source_of` hands them out."""
    return WIDENED.get(dtype, dtype)


def source_of(tensor: TensorProto, folder: Path) -> ByteSource:
    """Return the values of a tensor as little-endian bytes. Raises `UsageError` when they are
    damaged."""
    dtype, where = dtype_name(tensor), f"ONNX tensor '{tensor.name}'"
    if dtype not in BITS:
        raise UsageError(f"{where} has values of type {dtype}, which cannot be read.")
    if any(size < 0 for size in tensor.dims) or tensor.HasField("segment"):
        raise UsageError(f"{where} has a bad shape: {list(tensor.dims)[:16]}.")
    count = math.prod(tensor.dims)
    nbytes = -(-count * BITS[dtype] // 8)
    source: ByteSource
    if tensor.data_location == type(tensor).EXTERNAL:
        source = _external(tensor, folder, nbytes, where)
    else:
        raw = (
            np.frombuffer(tensor.raw_data, np.uint8)
            if tensor.HasField("raw_data")
            else _typed(tensor, dtype, where)
        )
        if raw.size != nbytes:
            raise UsageError(
                f"{where} is {dtype} of shape {list(tensor.dims)}, which takes {nbytes:,} bytes, "
                f"and has {raw.size:,}."
            )
        source = MemoryBytes(raw)
    return Nibbles(source, count, dtype == "I4") if dtype in WIDENED else source


def stored_bytes(tensor: TensorProto) -> int:
    """Return how many bytes the tensor claims to take."""
    return -(-math.prod(int(size) for size in tensor.dims) * BITS.get(dtype_name(tensor), 0) // 8)


def _external(tensor: TensorProto, folder: Path, nbytes: int, where: str) -> FileBytes:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if not stays_inside(location):
        raise UsageError(f"{where} keeps its data outside the folder of the model: {location!r}.")
    path = folder / location
    try:
        target, here = path.resolve(), folder.resolve()
        if not any(target.is_relative_to(place) for place in (here, *hub_blobs(folder))):
            raise UsageError(
                f"{where} keeps its data in '{location[:200]}', a link that leads out of the folder of "
                "the model."
            )
        if not target.is_file():
            raise UsageError(f"{where} keeps its data in '{location[:200]}', which is not there.")
    except (OSError, RuntimeError) as error:  # a circle of links, a name that is too long
        raise UsageError(
            f"{where} keeps its data in '{location[:200]}', which cannot be opened "
            f"({first_line(error)[:80]})."
        ) from error
    offset = _natural(entries.get("offset", "0"), where)
    length = _natural(entries.get("length", str(nbytes)), where)
    if length != nbytes:
        raise UsageError(
            f"{where} of shape {list(tensor.dims)} takes {nbytes:,} bytes; its entry says {length:,}."
        )
    if offset + nbytes > path.stat().st_size:
        raise UsageError(
            f"{where} ends at byte {offset + nbytes:,} of '{path}', which has {path.stat().st_size:,}."
        )
    return FileBytes(path, offset, nbytes)


def hub_blobs(folder: Path) -> list[Path]:
    """Return where the hub's cache keeps the files of the repository that `folder` is a snapshot
    of, if it is one."""
    for place in (folder.absolute(), *folder.absolute().parents):
        if place.parent.name == "snapshots":
            blobs = place.parent.parent / "blobs"
            return [blobs.resolve()] if blobs.is_dir() and not blobs.is_symlink() else []
    return []


def _natural(text: str, where: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise UsageError(f"{where} has a bad offset or length: '{text[:40]}'.")
    return int(text)


def _typed(tensor: TensorProto, dtype: str, where: str) -> np.ndarray:
    """Read values in a field of their own; small types lie in `int32_data`, one (or one packed
    pair) per number."""
    if dtype == "F32":
        values = np.array(tensor.float_data, np.float32)
    elif dtype == "F64":
        values = np.array(tensor.double_data, np.float64)
    elif dtype == "I64":
        values = np.array(tensor.int64_data, np.int64)
    elif dtype in ("U32", "U64"):
        values = np.array(tensor.uint64_data, np.uint64).astype(f"u{BITS[dtype] // 8}")
    else:
        wide, bits = np.array(tensor.int32_data, np.int32), max(8, BITS[dtype])
        if bits < 32 and wide.size and (wide.min() < -(1 << bits - 1) or wide.max() >= 1 << bits):
            raise UsageError(f"{where} is {dtype} and holds numbers that do not fit that type.")
        values = wide.astype(f"u{bits // 8}")
    return values.view(np.uint8)


def used_values(
    tensor: TensorProto, folder: Path, picks: Sequence[np.ndarray | None], zero: np.ndarray | None
) -> np.ndarray:
    """Return, in memory, the places of a tensor that are used: the bits of its values, or where a
    zero point is given, 1 for every value that differs from it."""
    source, name = source_of(tensor, folder), element_name(dtype_name(tensor))
    raw = np.concatenate([chunk.copy() for chunk in source.chunks(1 << 24)] or [np.empty(0, "u1")])
    values: np.ndarray = raw.view(f"u{BITS[name] // 8}").reshape(tuple(tensor.dims))
    for axis, places in enumerate(picks):
        if places is not None:
            values = values.take(places, axis=axis)
    if zero is None:
        return values
    codes = values.view(number_type(name))
    wanted = zero.astype(codes.dtype)
    differs: np.ndarray = ((codes != wanted) | (wanted != zero)).view(np.uint8)
    return differs


def number_type(name: str) -> np.dtype[np.generic]:
    """Return NumPy's type (`ml_dtypes` for the small floats)."""
    import ml_dtypes

    small = {
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "BOOL": np.bool_,
    }
    kind: np.dtype[np.generic] = np.dtype(small.get(name, f"{name[0].lower()}{BITS[name] // 8}"))
    return kind


def decode(tensor: TensorProto, folder: Path) -> np.ndarray:
    """Read the whole tensor into NumPy's type for it (`ml_dtypes` for the small floats, I8/U8 for
    4-bit)."""
    bits = used_values(tensor, folder, (), None)
    decoded: np.ndarray = bits.view(number_type(element_name(dtype_name(tensor))))
    return decoded
