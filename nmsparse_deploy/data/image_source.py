"""Where images come from: a folder, a zip or tar of one, IDX files, or a set with a name.

Archives are read member by member in memory and never unpacked. An image's class is the name of its
folder.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from nmsparse_deploy.data.packaged.images import names, packaged_images
from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.models.preprocess import require_pillow

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
SPLITS = {"train": ("train", "training"), "test": ("test", "val", "valid", "validation")}
MAX_MEMBER_BYTES = 256 << 20
"""Bytes that one compressed member may unpack to."""
IDX_FILES = {"train": "train", "test": "t10k"}
_IMAGES, _LABELS = 0x803, 0x801


@dataclass(frozen=True)
class Images:
    """Images in a fixed order with their names and classes (None where there are none)."""

    name: str
    ids: tuple[str, ...]
    labels: tuple[str | None, ...]
    load: Callable[[int], Image]

    def __len__(self) -> int:
        return len(self.ids)

    def open(self, index: int) -> Image:
        """Return one decoded image. Raises `NmsparseError` naming the file when it is damaged."""
        from PIL import Image as pil

        with warnings.catch_warnings():
            warnings.simplefilter("error", pil.DecompressionBombWarning)
            try:
                image = self.load(index)
                image.load()
            except NmsparseError:
                raise
            except Exception as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise NmsparseError(
                    f"The image '{self.ids[index]}' of '{self.name}' cannot be read: "
                    f"{reason[:160]}.".replace("..", ".")
                ) from error
        return image


def load_images(source: str, split: str = "test") -> Images:
    """Open a folder, a zip or tar, a folder of IDX files, a packaged set (`fashion-mnist`,
    `photos-20`), or `cifar10` or `photos` of the development data.

    `split` is `train` or `test`, for sources that have both. Raises `UsageError` when there is no
    image.
    """
    require_pillow()
    path = Path(source).expanduser()
    if path.exists():
        return _from_path(path, path.name, split)
    packaged = packaged_images(source, split)
    if packaged is None:
        raise UsageError(
            f"There are no images '{source}': no file or folder has this name, and it is none of "
            f"{', '.join(names())}."
        )
    return _from_path(packaged, source, split)


def _from_path(path: Path, name: str, split: str) -> Images:
    if path.is_dir():
        idx = next(iter(sorted(path.rglob(f"{IDX_FILES[split]}-images-idx3-ubyte*"))), None)
        return _idx(idx, name, split) if idx else _folder(path, name, split)
    if path.name.endswith(ARCHIVES):
        return _archive(path, name, split)
    raise UsageError(f"'{path}' is no folder of images, and no zip or tar of one.")


def _folder(path: Path, name: str, split: str) -> Images:
    names = sorted(
        str(file.relative_to(path).as_posix())
        for file in path.rglob("*")
        if file.is_file() and not file.name.startswith(".")
    )
    return _collect(name, names, split, lambda member: (path / member).read_bytes())


def _archive(path: Path, name: str, split: str) -> Images:
    try:
        return _zip(path, name, split) if path.suffix == ".zip" else _tar(path, name, split)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, gzip.BadGzipFile) as error:
        raise UsageError(
            f"'{path}' is not a readable archive: {' '.join(str(error).split())}."
        ) from error


def _zip(path: Path, name: str, split: str) -> Images:
    archive = zipfile.ZipFile(path)

    def read(member: str) -> bytes:
        _check_size(member, archive.getinfo(member).file_size)
        return archive.read(member)

    return _collect(name, sorted(archive.namelist()), split, read)


def _tar(path: Path, name: str, split: str) -> Images:
    archive = tarfile.open(path)  # noqa: SIM115 - stays open as long as the images are read
    members = {member.name: member for member in archive.getmembers() if member.isfile()}

    def read(member: str) -> bytes:
        _check_size(member, members[member].size)
        file = archive.extractfile(members[member])
        assert file is not None  # a link was left out above
        return file.read()

    return _collect(name, sorted(members), split, read)


def _check_size(member: str, size: int) -> None:
    if size > MAX_MEMBER_BYTES:
        raise NmsparseError(f"'{member}' would unpack to {size / 1e6:.0f} MB, which is no image.")


def _collect(name: str, members: list[str], split: str, read: Callable[[str], bytes]) -> Images:
    """Collect the images among the members, only those of `split` when their folders say which are
    which."""
    images = [member for member in members if PurePosixPath(member).suffix.lower() in SUFFIXES]
    for member in images:
        if (
            PurePosixPath(member).is_absolute()
            or ".." in PurePosixPath(member).parts
            or "\\" in member
        ):
            raise UsageError(f"'{name}' holds a file that climbs out of its folder: {member}.")
    images = _of_split(images, split)
    if not images:
        raise UsageError(
            f"There is no image for the {split} part in '{name}' ({', '.join(SUFFIXES)})."
        )
    labels = [PurePosixPath(member).parent.name or None for member in images]
    flat = len(set(labels)) == 1  # one folder for all is no class

    def load(index: int) -> Image:
        from PIL import Image as pil

        return pil.open(io.BytesIO(read(images[index])))

    return Images(name, tuple(images), tuple(None if flat else label for label in labels), load)


def _of_split(images: list[str], split: str) -> list[str]:
    """Keep those of `split` when every image lies below a folder called train, test, val...; all of
    them otherwise."""
    folders = [{part.lower() for part in PurePosixPath(member).parts[:-1]} for member in images]
    every = {name for names in SPLITS.values() for name in names}
    if not all(parts & every for parts in folders):
        return images
    return [member for member, parts in zip(images, folders) if parts & set(SPLITS[split])]


def _idx(path: Path, name: str, split: str) -> Images:
    pixels = _read_idx(path, _IMAGES, 3)
    classes = _read_idx(path.with_name(path.name.replace("images-idx3", "labels-idx1")), _LABELS, 1)
    if len(pixels) != len(classes):
        raise UsageError(
            f"'{path}' holds {len(pixels)} images, but there are {len(classes)} labels."
        )

    def load(index: int) -> Image:
        from PIL import Image as pil

        return pil.fromarray(pixels[index])

    return Images(
        name,
        tuple(f"{split}/{number}" for number in range(len(pixels))),
        tuple(str(label) for label in classes.tolist()),
        load,
    )


def _read_idx(path: Path, magic: int, axes: int) -> np.ndarray:
    """Read one array of bytes: a big-endian magic number, the lengths of the axes, the values."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        header = np.frombuffer(data, ">i4", count=1 + axes)
        shape = tuple(int(length) for length in header[1:])
        if header[0] != magic or len(data) - header.nbytes != np.prod(shape):
            raise ValueError("its header does not fit its length")
        return np.frombuffer(data, np.uint8, offset=header.nbytes).reshape(shape)
    except (OSError, EOFError, ValueError, gzip.BadGzipFile, zlib.error) as error:
        raise UsageError(f"'{path}' is not a readable IDX file: {error}.") from error
