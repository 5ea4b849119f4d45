"""Find the tensors of a GGUF file: the header alone, read as untrusted input.

llama.cpp stores every matrix as [out, in] (it turns a `Conv1D` around), and lists axes from the last
to the first.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from pathlib import Path

from nmsparse_deploy.errors import UsageError, from_os_error
from nmsparse_deploy.prove.scan import FileBytes
from nmsparse_deploy.prove.tensor_files import BITS, StoredTensor

MAX_HEADER = 64 << 20
"""Vocabularies of the largest models take a third of it."""
MAX_AXES = 8
VERSIONS = (2, 3)
PLAIN = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
"""Types that hold one value after the other; all others hold blocks of codes."""
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Types of the metadata -> their bytes."""
UINT32, TEXT, LIST = 4, 8, 9
ALIGNMENT = b"general.alignment"


def read_gguf(path: Path) -> list[StoredTensor]:
    """Return the tensors of a GGUF file; those in blocks have the block's name as their type.
    Raises `UsageError` on damage."""
    try:
        with open(path, "rb") as file:
            header = file.read(MAX_HEADER)
        size = path.stat().st_size
    except OSError as error:
        raise from_os_error(error) from error
    if header[:4] != b"GGUF":
        raise UsageError(f"'{path}' is not a GGUF file.")
    try:
        return _Reader(path, header, size).tensors()
    except (struct.error, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(
            f"'{path}' is damaged: its header is cut off or makes no sense."
        ) from error


class _Reader:
    """A place in the header."""

    def __init__(self, path: Path, header: bytes, size: int) -> None:
        self.path, self.header, self.size, self.at = path, header, size, 4

    def tensors(self) -> list[StoredTensor]:
        """Read the header from its start."""
        (version,) = self.take("<I")
        if version not in VERSIONS:
            known = " and ".join(str(known) for known in VERSIONS)
            raise UsageError(f"'{self.path}' is GGUF of version {version}; {known} are read.")
        count, pairs = self.take("<QQ")
        alignment = 32
        for _ in range(pairs):
            key = self.text()
            (kind,) = self.take("<I")
            if key == ALIGNMENT and kind == UINT32:
                (alignment,) = struct.unpack_from("<I", self.header, self.at)
            self.skip(kind)
        rows = [self.row() for _ in range(count)]
        if not alignment or alignment % 8:
            raise UsageError(f"'{self.path}' is damaged: an alignment of {alignment}.")
        base = -(-self.at // alignment) * alignment
        name, repeats = Counter(row[0] for row in rows).most_common(1)[0] if rows else ("", 1)
        if repeats > 1:
            raise UsageError(f"'{self.path}' names '{name}' twice.")
        return [self.tensor(base, *row) for row in rows]

    def take(self, layout: str) -> tuple[int, ...]:
        """Read numbers."""
        numbers = struct.unpack_from(layout, self.header, self.at)
        self.at += struct.calcsize(layout)
        return numbers

    def text(self) -> bytes:
        """Read a text."""
        (length,) = self.take("<Q")
        text = self.header[self.at : self.at + length]
        if len(text) < length:
            raise struct.error
        self.at += length
        return text

    def skip(self, kind: int) -> None:
        """Step over a value of the metadata."""
        if kind == TEXT:
            self.text()
        elif kind == LIST:
            inner, length = self.take("<IQ")
            if inner in SCALARS:
                self.at += SCALARS[inner] * length
            else:
                for _ in range(length):
                    self.skip(inner)
        elif kind in SCALARS:
            self.at += SCALARS[kind]
        else:
            raise struct.error
        if self.at > len(self.header):
            raise struct.error

    def row(self) -> tuple[str, tuple[int, ...], int, int]:
        """Read the name, shape, type and offset of a tensor."""
        name = self.text().decode()
        (axes,) = self.take("<I")
        if axes > MAX_AXES:
            raise struct.error
        shape = self.take(f"<{axes}Q")[::-1]
        kind, offset = self.take("<IQ")
        return name, shape, kind, offset

    def tensor(
        self, base: int, name: str, shape: tuple[int, ...], kind: int, offset: int
    ) -> StoredTensor:
        """Return a tensor whose bytes lie in the file."""
        dtype, values, nbytes = _type(kind)
        nbytes *= math.prod(shape) // values
        if base + offset + nbytes > self.size:
            raise UsageError(f"'{self.path}' is truncated: tensor '{name}' ends beyond it.")
        return StoredTensor(name, dtype, shape, FileBytes(self.path, base + offset, nbytes))


def _type(kind: int) -> tuple[str, int, int]:
    """Return the name of a type, the values of a block and its bytes; a type of the future has
    none."""
    if kind in PLAIN:
        return PLAIN[kind], 1, BITS[PLAIN[kind]] // 8
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        name = GGMLQuantizationType(kind)
    except ValueError:
        return f"GGUF type {kind}", 1, 0
    return str(name.name), *GGML_QUANT_SIZES[name]
