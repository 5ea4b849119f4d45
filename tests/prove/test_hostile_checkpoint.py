"""Damaged and lying checkpoint files: one sentence that names the file (and the tensor), never a
traceback."""

import json

import pytest
import torch
from safetensors.torch import save_file

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.prove import verify_checkpoint
from tests.fixtures.tensor_files import dense, mask_set, row, sparse, write_raw

W = row("F32", [2, 4], 0, 32)
LIES = {
    "not JSON": (b"{nonsense", b"", "JSON"),
    "not UTF-8": (b"\xff\xfe{}", b"", "JSON"),
    "a list": (b"[]", b"", "not a table"),
    "nested too deep": (b"[" * 100_000, b"", "JSON"),
    "same name twice": (
        b'{"w": %s, "w": %s}' % ((json.dumps(W).encode(),) * 2),
        bytes(32),
        "'w' twice",
    ),
    "metadata is no text": ({"__metadata__": {"a": 1}, "w": W}, bytes(32), "metadata"),
    "row is no table": ({"w": 3}, b"", "'w'.*no dtype"),
    "no dtype": ({"w": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4), "'w'.*no dtype"),
    "no shape": ({"w": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4), "'w'.*bad shape"),
    "negative shape": ({"w": row("F32", [-2, -4], 0, 32)}, bytes(32), "'w'.*bad shape"),
    "bool shape": ({"w": row("F32", [True, True], 0, 4)}, bytes(4), "'w'.*bad shape"),
    "float shape": ({"w": row("F32", [2.0, 4], 0, 32)}, bytes(32), "'w'.*bad shape"),
    "huge shape": ({"w": row("F32", [1 << 70], 0, 32)}, bytes(32), "'w'.*bad shape"),
    "too many axes": ({"w": row("F32", [1] * 100_000, 0, 4)}, bytes(4), "'w'.*bad shape"),
    "bool offsets": ({"w": row("I8", [1], False, True)}, bytes(1), "'w'.*data_offsets"),
    "backward offsets": ({"w": row("F32", [0], 4, 0)}, bytes(4), "'w'.*data_offsets"),
    "three offsets": ({"w": {**W, "data_offsets": [0, 16, 32]}}, bytes(32), "'w'.*data_offsets"),
    "size does not fit": ({"w": row("F32", [2, 4], 0, 16)}, bytes(16), "'w'.*does not fit"),
    "size wraps 64 bits": ({"w": row("F32", [1 << 62, 4], 0, 0)}, b"", "'w'.*does not fit"),
    "half a byte": ({"w": row("F4", [3], 0, 1)}, bytes(1), "'w'.*does not fit"),
    "overlap": (
        {"v": row("F32", [2, 4], 0, 32), "w": row("F32", [2, 4], 16, 48)},
        bytes(48),
        "'w'.*overlaps 'v'",
    ),
    "same bytes twice": ({"v": W, "w": W}, bytes(32), "overlaps"),
    "gap": ({"w": row("F32", [2, 4], 16, 48)}, bytes(48), "'w'.*gap"),
    "beyond the file": ({"w": row("F32", [2, 4], 0, 32)}, bytes(31), "truncated.*'w'"),
    "bytes of nobody": ({"w": W}, bytes(40), "8 bytes at its end"),
}


@pytest.mark.parametrize("header, data, words", LIES.values(), ids=LIES.keys())
def test_a_lying_header_is_one_sentence(tmp_path, header, data, words):
    path = write_raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(UsageError, match=words) as caught:
        verify_checkpoint(path)
    assert "bad.safetensors" in caught.value.message and "\n" not in caught.value.message


@pytest.mark.parametrize("length", [33, 1 << 20, (1 << 64) - 1])
def test_a_header_longer_than_the_file_is_refused(tmp_path, length):
    path = write_raw(tmp_path / "bad.safetensors", b"{}", bytes(30), length=length)
    with pytest.raises(UsageError, match="truncated"):
        verify_checkpoint(path)


def test_a_header_longer_than_the_format_allows_is_not_read(tmp_path):
    path = write_raw(tmp_path / "bad.safetensors", b"{}", length=200_000_000)
    with open(path, "r+b") as file:
        file.truncate(300_000_000)
    with pytest.raises(UsageError, match="the format allows"):
        verify_checkpoint(path)


def test_a_good_file_cut_at_any_byte_is_refused(tmp_path):
    save_file({"w": sparse(8, 16)[0], "v": dense(3, 4)}, tmp_path / "good.safetensors")
    whole = (tmp_path / "good.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(UsageError, match="cut"):
            verify_checkpoint(path)


def test_a_file_that_shrinks_while_it_is_read_is_one_sentence(tmp_path):
    from nmsparse_deploy.errors import NmsparseError
    from nmsparse_deploy.prove.scan import FileBytes

    (tmp_path / "a").write_bytes(bytes(10))
    with pytest.raises(NmsparseError, match="ended while"):
        list(FileBytes(tmp_path / "a", 0, 20).chunks(8))


def test_an_unknown_dtype_is_skipped_and_said(tmp_path):
    weight = sparse(64, 64)[0].numpy().tobytes()
    path = write_raw(
        tmp_path / "new.safetensors",
        {"w": row("F32", [64, 64], 0, 16384), "x": row("Q3_NEW", [4, 4], 16384, 16390)},
        weight + bytes(6),
    )
    report = verify_checkpoint(path)
    assert report.ok and "Q3_NEW" in report.checks[1].skipped


def test_pickles_masks_and_missing_files_are_refused(tmp_path):
    torch.save({"w": dense(4, 4)}, tmp_path / "model.pt")
    with pytest.raises(UsageError, match=r"not a \.safetensors"):
        verify_checkpoint(tmp_path / "model.pt")
    with pytest.raises(UsageError, match="no checkpoint"):
        verify_checkpoint(tmp_path / "nothing.safetensors")
    with pytest.raises(UsageError, match=r"no \.safetensors weights"):
        verify_checkpoint(tmp_path)
    mask_set(w=sparse(4, 8)[1]).save(tmp_path / "masks.safetensors")
    with pytest.raises(UsageError, match="masks, not weights"):
        verify_checkpoint(tmp_path / "masks.safetensors")


def shards(folder, weight_map):
    save_file({"w": sparse(64, 64)[0]}, folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    "shard, words",
    [
        ("gone.safetensors", "'w'.*not there"),
        ("../a.safetensors", "'w'.*outside"),
        ("x/../../a.safetensors", "outside"),
        ("/etc/a.safetensors", "outside"),
        ("C:\\a.safetensors", "outside"),
        ("..\\a.safetensors", "outside"),
        ("", "outside"),
        ("a\0b", "outside"),
        (7, "outside"),
        (["a.safetensors"], "outside"),
    ],
)
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, shard, words):
    (tmp_path / "inner").mkdir()
    save_file({"w": sparse(64, 64)[0]}, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match=words):
        verify_checkpoint(shards(tmp_path / "inner", {"w": shard}))


def test_an_index_that_promises_too_much_is_refused(tmp_path):
    with pytest.raises(UsageError, match="promises tensor 'v'"):
        verify_checkpoint(shards(tmp_path, {"w": "a.safetensors", "v": "a.safetensors"}))
    for text in ("{", "[]", '{"weight_map": []}', '{"weight_map": {}}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(UsageError, match=r"index\.json"):
            verify_checkpoint(tmp_path)


def test_a_name_in_two_shards_is_refused(tmp_path):
    for name in ("a", "b"):
        save_file({"w": sparse(64, 64)[0]}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UsageError, match="'w' is in both"):
        verify_checkpoint(tmp_path)


def test_a_shard_may_be_a_link_of_a_download_cache(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file({"w": sparse(64, 64)[0]}, tmp_path / "blobs" / "0123")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/0123")
    assert verify_checkpoint(tmp_path / "snapshot").ok
