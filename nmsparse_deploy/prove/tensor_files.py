"""Find the tensors of a checkpoint: safetensors headers and shard indexes, read as untrusted input.

The official reader maps whole files into memory. This one reads the header alone and says where the
bytes lie.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TypeGuard

from nmsparse_deploy.errors import UsageError, from_os_error
from nmsparse_deploy.masks import FORMAT
from nmsparse_deploy.prove.scan import FileBytes

MAX_HEADER = 100_000_000
"""The limit of the format."""
MAX_AXES = 64
INDEXES = ("model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json")
"""Of Transformers and of diffusers."""
BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint, with the place of its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: FileBytes


def find_tensors(path: Path) -> list[StoredTensor]:
    """Find every tensor of one .safetensors file or of a checkpoint folder. Raises `UsageError` on
    damage."""
    try:
        if path.is_dir():
            return _of_folder(path)
        there = path.is_file()
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise from_os_error(error) from error
    if not there:
        raise UsageError(f"There is no checkpoint '{path}'.")
    if path.suffix.lower() != ".safetensors":
        raise UsageError(f"'{path}' {_what_it_is(path)}.", _instead(path))
    tensors, metadata = read_header(path)
    if FORMAT in metadata:
        raise UsageError(
            f"'{path}' holds masks, not weights.", "give the folder or the file with the weights"
        )
    return tensors


PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
OTHERS = {
    ".ort": "is a model in ONNX Runtime's own format, which is not read here",
    ".pb": "is a protobuf of TensorFlow or Caffe, which is not read here",
    ".tflite": "is a TensorFlow Lite model, which is not read here",
    ".h5": "is an HDF5 file of Keras, which is not read here",
    ".keras": "is a Keras model, which is not read here",
    ".msgpack": "holds the weights of a Flax model, which are not read here",
    ".npz": "holds NumPy arrays, which are not read here",
    ".npy": "holds a NumPy array, which is not read here",
    ".mlpackage": "is a Core ML model, which is not read here",
    ".xml": "describes a model of OpenVINO, which is not read here",
    ".data": "holds values of an ONNX model, and not which layer multiplies by them",
    ".json": "is a description without weights",
}
"""Files that people try, by how they end -> what they are."""


def _what_it_is(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        return "is not a .safetensors file but a pickle, which can run code when it is opened"
    return OTHERS.get(
        suffix, "is not a file with weights that can be read (.safetensors, .gguf, .onnx)"
    )


def _instead(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in (".ort", ".data"):
        return "verify the .onnx file that it belongs to"
    if suffix == ".json":
        return "give the folder that it lies in"
    return "save the model with safetensors, or export it to ONNX, and verify that"


def _of_folder(folder: Path) -> list[StoredTensor]:
    index = next((folder / name for name in INDEXES if (folder / name).exists()), None)
    promised = _read_index(index) if index is not None else None
    if promised is None:
        files = sorted(f for f in folder.iterdir() if f.suffix.lower() == ".safetensors")
    else:
        files = [folder / name for name in sorted(set(promised.values()))]
    stored: dict[str, StoredTensor] = {}
    for file in files:
        tensors, metadata = read_header(file)
        if FORMAT in metadata:
            continue
        for tensor in tensors:
            if tensor.name in stored:
                raise UsageError(
                    f"Tensor '{tensor.name}' is in both '{stored[tensor.name].source.path}' and '{file}'."
                )
            stored[tensor.name] = tensor
    for name, shard in (promised or {}).items():
        if name not in stored or stored[name].source.path.name != PurePosixPath(shard).name:
            raise UsageError(
                f"'{index}' promises tensor '{name}' in '{shard}', which does not hold it."
            )
    if not stored:
        other = next(
            (f for f in sorted(folder.iterdir()) if f.suffix.lower() in (*PICKLES, *OTHERS)), None
        )
        named = f"; '{other.name}' {_what_it_is(other)}" if other else ""
        raise UsageError(f"There are no .safetensors weights in '{folder}'{named}.")
    return list(stored.values())


def _read_index(path: Path) -> dict[str, str]:
    """Read name -> shard. A shard may be a link out of the folder (download caches are made of
    links); its name not."""
    table = _json(path, _read(path, 0, path.stat().st_size))
    shards = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise UsageError(f"'{path}' has no weight_map.")
    for name, shard in shards.items():
        if not isinstance(shard, str) or not stays_inside(shard):
            raise UsageError(f"'{path}' puts tensor '{name}' outside its folder: {shard!r}.")
        if not (path.parent / shard).is_file():
            raise UsageError(f"'{path}' puts tensor '{name}' in '{shard}', which is not there.")
    return shards


def stays_inside(location: str) -> bool:
    """Tell whether this is a relative path without steps upwards, on any system."""
    if not location or "\0" in location:
        return False
    posix, windows = PurePosixPath(location), PureWindowsPath(location)
    return not (
        posix.is_absolute() or windows.anchor or ".." in posix.parts or ".." in windows.parts
    )


def read_header(path: Path) -> tuple[list[StoredTensor], dict[str, str]]:
    """Read the tensors of one file in the order of their bytes, and its metadata. Raises
    `UsageError` on damage."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise from_os_error(error) from error
    length = int.from_bytes(_read(path, 0, 8), "little") if size >= 8 else 0
    if size < 8 or length > size - 8:
        raise UsageError(
            f"'{path}' is truncated: its header of {length:,} bytes does not fit in {size:,} bytes."
        )
    if length > MAX_HEADER:
        raise UsageError(
            f"'{path}' has a header of {length:,} bytes; the format allows {MAX_HEADER:,}."
        )
    header = _json(path, _read(path, 8, length))
    if not isinstance(header, dict):
        raise UsageError(f"'{path}' has a header that is not a table.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise UsageError(f"'{path}' has metadata that is not text.")
    tensors = sorted(
        (_tensor(path, name, row, 8 + length) for name, row in header.items()),
        key=lambda tensor: (tensor.source.start, tensor.source.nbytes),
    )
    _check_layout(path, tensors, 8 + length, size)
    return tensors, metadata


def _tensor(path: Path, name: str, row: object, base: int) -> StoredTensor:
    where = f"Tensor '{name}' in '{path}'"
    if not isinstance(row, dict) or not isinstance(row.get("dtype"), str):
        raise UsageError(f"{where} has no dtype.")
    shape, offsets = row.get("shape"), row.get("data_offsets")
    if not _naturals(shape):
        raise UsageError(f"{where} has a bad shape: {str(shape)[:80]}.")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise UsageError(f"{where} has bad data_offsets: {str(offsets)[:80]}.")
    nbytes, bits = offsets[1] - offsets[0], BITS.get(row["dtype"])
    if bits is not None and math.prod(shape) * bits != nbytes * 8:
        raise UsageError(
            f"{where} is {row['dtype']} of shape {shape}, which does not fit its {nbytes:,} bytes."
        )
    return StoredTensor(
        name, row["dtype"], tuple(shape), FileBytes(path, base + offsets[0], nbytes)
    )


def _check_layout(path: Path, tensors: Iterable[StoredTensor], base: int, size: int) -> None:
    """Raise `UsageError` unless the tensors cover the rest of the file, without overlaps or
    gaps."""
    end, before = base, "the header"
    for tensor in tensors:
        start = tensor.source.start
        if start != end:
            fault = "overlaps" if start < end else "leaves a gap after"
            raise UsageError(f"Tensor '{tensor.name}' in '{path}' {fault} {before}.")
        end, before = start + tensor.source.nbytes, f"'{tensor.name}'"
        if end > size:
            raise UsageError(
                f"'{path}' is truncated: tensor '{tensor.name}' ends at byte {end:,} of {size:,}."
            )
    if end != size:
        raise UsageError(f"'{path}' has {size - end:,} bytes at its end that belong to no tensor.")


def _naturals(value: object) -> TypeGuard[list[int]]:
    """Tell whether this is a list of numbers from 0 up. (In Python True is a number; in a header it
    is a lie.)"""
    return (
        isinstance(value, list)
        and len(value) <= MAX_AXES
        and all(type(n) is int and 0 <= n < 1 << 63 for n in value)
    )


def _read(path: Path, start: int, length: int) -> bytes:
    return b"".join(bytes(chunk) for chunk in FileBytes(path, start, length).chunks(max(1, length)))


def _json(path: Path, text: bytes) -> object:
    try:
        return json.loads(text.decode(), object_pairs_hook=lambda pairs: _no_repeats(path, pairs))
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"'{path}' is damaged: its JSON does not parse ({str(error)[:120]})."
        ) from error


def _no_repeats(path: Path, pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        name = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise UsageError(f"'{path}' names '{name}' twice in one table.")
    return table
