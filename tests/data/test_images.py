"""Pictures: every kind of source, seeded and known by content; hostile files are one sentence that
names them."""

from __future__ import annotations

import io
import shutil
import struct
import sys
import tarfile
import zipfile
import zlib

import pytest
import torch

from nmsparse_deploy.data.image_source import load_images
from nmsparse_deploy.data.images import calibration_images, check_images_disjoint, evaluation_images
from nmsparse_deploy.errors import MissingExtra, NmsparseError, UsageError
from nmsparse_deploy.models.preprocess import Preprocess
from tests.fixtures import small_vision as small

PRE = Preprocess((32, 32), 32)


def draw(source, samples=4, seed=0):
    return calibration_images(str(source), PRE, "pixel_values", samples, seed)


def zipped(folder, target):
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, str(file.relative_to(folder)))
    return target


def tarred(folder, target):
    with tarfile.open(target, "w:gz") as archive:
        archive.add(folder, arcname=".")
    return target


def test_folder_zip_and_tar_are_the_same_pictures(pictures, tmp_path):
    one = draw(pictures)
    for other in (
        draw(zipped(pictures, tmp_path / "a.zip")),
        draw(tarred(pictures, tmp_path / "a.tar.gz")),
    ):
        assert other.hashes == one.hashes and other.labels == one.labels
        assert torch.equal(other.inputs["pixel_values"], one.inputs["pixel_values"])
    assert one.inputs["pixel_values"].shape == (4, 3, 32, 32)


def test_a_folder_is_a_class_and_train_and_test_are_kept_apart(pictures):
    train, test = load_images(str(pictures), "train"), load_images(str(pictures), "test")
    assert (len(train), len(test)) == (36, 18) and set(train.labels) == set(small.CLASSES)
    assert all(name.startswith("train/") for name in train.ids) and not set(train.ids) & set(
        test.ids
    )
    whole = load_images(str(pictures / "train"), "test")  # no split below this folder
    assert len(whole) == 36


def test_a_class_may_be_called_train(tmp_path):
    for kind in ("train", "car"):
        (tmp_path / kind).mkdir()
        small.picture("red", 1).save(tmp_path / kind / "a.png")
    assert set(load_images(str(tmp_path), "test").labels) == {"train", "car"}


def test_idx_files(tmp_path):
    images = load_images(str(small.idx(tmp_path / "set")), "train")
    assert (
        len(images) == 8
        and images.labels[:4] == ("0", "1", "2", "0")
        and images.open(3).size == (28, 28)
    )


def test_drawing_is_seeded_and_distinct(pictures):
    one, again, other = draw(pictures, 8), draw(pictures, 8), draw(pictures, 8, seed=1)
    assert one.ids == again.ids != other.ids and len(set(one.ids)) == 8
    fixed = evaluation_images(str(pictures), "test", PRE, "x", 9)
    assert (
        fixed.ids == evaluation_images(str(pictures), "test", PRE, "x", 9).ids
        and len(set(fixed.ids)) == 9
    )
    assert len(evaluation_images(str(pictures), "test", PRE, "x", 999)) == 18


def test_two_sources_share_the_samples(pictures, photos):
    mixed = draw(f"{pictures}+{photos}", 5)
    assert [i.split("/")[0] for i in mixed.ids] == ["colours"] * 3 + ["photos"] * 2


def test_what_is_recorded_names_every_picture(pictures):
    sample = draw(pictures, 3)
    data = sample.to_json()
    assert (
        data["ids"] == list(sample.ids)
        and len(data["sha256"][0]) == 64
        and data["preprocess"]["size"] == [32, 32]
    )
    assert sample.record()["image_sha256"].shape == (3, 32)


def test_a_copy_under_another_name_and_format_is_not_held_out(pictures, tmp_path):
    calibration = draw(pictures, 36)
    copy = tmp_path / "renamed"
    copy.mkdir()
    image = load_images(str(pictures), "train").open(5)
    image.save(copy / "innocent.bmp")
    small.picture("red", 99).save(copy / "other.png")
    evaluation = evaluation_images(str(copy), "test", PRE, "x", 2)
    with pytest.raises(NmsparseError, match="1 of 2 evaluation images were calibrated on"):
        check_images_disjoint(calibration.record()["image_sha256"], evaluation.hashes)
    assert check_images_disjoint(calibration.record()["image_sha256"], evaluation.hashes[1:]) == 1


@pytest.mark.parametrize(
    "name", ["../../evil.png", "/evil.png", "a/../../evil.png", "..\\evil.png"]
)
def test_archives_cannot_climb_out(tmp_path, name):
    buffer = io.BytesIO()
    small.picture("red", 0).save(buffer, "PNG")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, buffer.getvalue())
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(buffer.getvalue())
        archive.addfile(member, io.BytesIO(buffer.getvalue()))
    for source in ("a.zip", "a.tar"):
        with pytest.raises(UsageError, match="climbs out"):
            draw(tmp_path / source, 1)


def test_links_in_a_tar_are_no_pictures(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        member = tarfile.TarInfo("secret.png")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(UsageError, match="no image"):
        draw(tmp_path / "a.tar", 1)


def bomb() -> bytes:
    """A PNG of 40 000 x 40 000 pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "bomb"])
def test_a_damaged_picture_is_named(tmp_path, damage):
    file = tmp_path / "class" / "bad.png"
    file.parent.mkdir()
    small.picture("red", 0).save(file)
    whole = file.read_bytes()
    file.write_bytes(
        {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"not a picture", "bomb": bomb()}[
            damage
        ]
    )
    with pytest.raises(NmsparseError, match=r"class/bad\.png") as caught:
        draw(tmp_path, 1)
    assert "\n" not in caught.value.message


def test_sources_without_pictures(tmp_path, pictures, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk.zip").write_bytes(b"PK nonsense")
    (tmp_path / "junk.tar").write_bytes(b"nonsense" * 100)
    (tmp_path / "file.txt").write_text("x")
    for name in ("empty", "junk.zip", "junk.tar", "file.txt", "nowhere"):
        with pytest.raises(UsageError, match=name.split(".")[0]) as caught:
            draw(tmp_path / name, 1)
        assert "\n" not in caught.value.message
    for samples in (0, 10**6):
        with pytest.raises(UsageError):
            draw(pictures, samples)
    monkeypatch.delenv("NMSPARSE_DATA", raising=False)
    with pytest.raises(UsageError, match="NMSPARSE_DATA"):
        draw("cifar10")


def test_damaged_idx_files(tmp_path):
    with pytest.raises(UsageError, match="header does not fit"):
        load_images(str(small.idx(tmp_path / "lie", claim=10**9)), "train")
    folder = small.idx(tmp_path / "cut")
    file = folder / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UsageError, match="not a readable IDX file"):
        load_images(str(folder), "train")
    shutil.copy(folder / "train-labels-idx1-ubyte.gz", file)
    with pytest.raises(UsageError, match="not a readable IDX file"):
        load_images(str(folder), "train")


def test_without_pillow_the_extra_is_named(pictures, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtra, match="pillow") as caught:
        draw(pictures)
    assert "nmsparse-deploy[vision]" in caught.value.hint
