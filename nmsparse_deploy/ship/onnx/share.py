"""Several graphs, one copy of the weights: tensors of equal bytes are stored once, in the data file
of the first."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import TensorProto

ALIGNMENT = 64
"""Tensors begin at multiples of this, as the exporter writes them."""


def share_weights(folder: Path, names: Sequence[str]) -> int:
    """Let the graphs `names` (without suffix) read their weights from `FIRST.onnx.data`; returns
    the bytes saved.

    What only a later graph has is appended there. Data files of their own are removed.
    """
    import onnx

    first = folder / f"{names[0]}.onnx"
    data = folder / f"{first.name}.data"
    places = {
        _digest(folder, tensor): _place(tensor)[1:]
        for tensor in _external(onnx.load(str(first), load_external_data=False))
    }
    saved = 0
    for name in names[1:]:
        path = folder / f"{name}.onnx"
        model = onnx.load(str(path), load_external_data=False)
        own = {_place(tensor)[0] for tensor in _external(model)} - {data.name}
        for tensor in _external(model):
            digest = _digest(folder, tensor)
            if digest in places:
                saved += places[digest][1]
            else:
                places[digest] = _append(data, _bytes(folder, tensor))
            _point(tensor, data.name, *places[digest])
        path.write_bytes(model.SerializeToString(deterministic=True))
        for file in own:
            (folder / file).unlink()
    return saved


def _external(model: object) -> list[TensorProto]:
    graph = model.graph  # type: ignore[attr-defined]
    return [tensor for tensor in graph.initializer if tensor.data_location == tensor.EXTERNAL]


def _place(tensor: TensorProto) -> tuple[str, int, int]:
    """Return file, offset and length."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return entries["location"], int(entries.get("offset", 0)), int(entries["length"])


def _bytes(folder: Path, tensor: TensorProto) -> bytes:
    location, offset, length = _place(tensor)
    with open(folder / location, "rb") as file:
        file.seek(offset)
        return file.read(length)


def _digest(folder: Path, tensor: TensorProto) -> bytes:
    """Return type, shape and bytes: what makes two stored tensors one."""
    about = f"{tensor.data_type} {list(tensor.dims)} ".encode()
    return hashlib.sha256(about + _bytes(folder, tensor)).digest()


def _append(data: Path, values: bytes) -> tuple[int, int]:
    with open(data, "ab") as file:
        file.write(bytes(-file.tell() % ALIGNMENT))
        offset = file.tell()
        file.write(values)
        file.flush()
        os.fsync(file.fileno())
    return offset, len(values)


def _point(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
