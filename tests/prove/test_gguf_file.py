"""GGUF files: judged where they hold plain numbers, refused or not followed where they do not."""

import struct

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.prove import verify_checkpoint
from nmsparse_deploy.prove.gguf_file import read_gguf
from tests.fixtures.tensor_files import dense, sparse
from tests.prove.test_checkpoint import by_name

W = sparse(64, 96)[0].numpy()


def written(path, tensors, quantised=()):
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc"])
    writer.add_array("numbers", [1, 2, 3])
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    for name, values in quantised:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("suffix", ["gguf", "GGUF"])
def test_plain_tensors_are_judged_as_out_by_in(tmp_path, dtype, suffix):
    path = written(
        tmp_path / f"a.{suffix}",
        {
            "blk.0.attn_q.weight": W.astype(dtype),
            "blk.0.attn_norm.weight": np.ones(96, dtype),
            "output.weight": dense(100, 64).numpy().astype(dtype),
        },
    )
    report = verify_checkpoint(path)
    assert report.ok and report.checked == 1
    assert by_name(report)["blk.0.attn_q.weight"].shape == (64, 96)
    assert by_name(report)["output.weight"].skipped == "dense"


def test_bfloat16_is_read(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "llama")
    raw = (W.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    kind = gguf.GGMLQuantizationType.BF16
    writer.add_tensor("w.weight", raw.reshape(64, -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = verify_checkpoint(tmp_path / "a.gguf")
    assert report.ok and report.checks[0].dtype == "BF16" and report.checks[0].axis == 1


def test_a_pattern_along_the_first_axis_is_the_wrong_one(tmp_path):
    weights = {f"blk.{i}.ffn_up.weight": np.ascontiguousarray(W.T) for i in range(2)}
    report = verify_checkpoint(written(tmp_path / "a.gguf", weights))
    assert report.failed == 2 and "in a GGUF file 'ffn_up' is no Conv1D" in report.summary()


def test_blocks_of_codes_are_named_and_not_followed(tmp_path):
    path = written(tmp_path / "a.gguf", {"b.weight": W}, [("a.weight", W)])
    report = verify_checkpoint(path)
    assert report.ok and not by_name(report)["a.weight"].followed
    assert "Q8_0" in by_name(report)["a.weight"].skipped
    report = verify_checkpoint(path, expect=["a.*"])
    assert not report.ok and "not followed" in report.summary()
    report = verify_checkpoint(written(tmp_path / "c.gguf", {}, [("a.weight", W)]))
    assert not report.ok and "could be shown to be 2:4 sparse" in report.summary()
    assert "Nothing in" in report.summary() and "is 2:4 sparse" not in report.summary()


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_damage_is_one_sentence(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damage") / "a.gguf"
    written(path, {"a.weight": W[:4, :8]})
    raw = bytearray(path.read_bytes())
    start = data.draw(st.integers(0, 200))
    raw[start : start + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=9))
    path.write_bytes(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    try:
        verify_checkpoint(path)
    except UsageError as error:
        assert str(path) in error.message and "\n" not in error.message


@pytest.mark.parametrize(
    "body, words",
    [
        (struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (struct.pack("<IQQ", 3, 1 << 62, 0), "cut off"),
        (struct.pack("<IQQ", 3, 0, 1 << 62), "cut off"),
        (struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 62), "cut off"),
        (struct.pack("<IQQQcIIQ", 3, 0, 1, 1, b"k", 9, 4, 1 << 62), "cut off"),
        (struct.pack("<IQQQcI", 3, 0, 1, 1, b"k", 9) + struct.pack("<IQ", 9, 1) * 9000, "cut off"),
        (struct.pack("<IQQQcIIQIQ", 3, 1, 0, 1, b"w", 1, 0, 64, 0, 0), "cut off|truncated"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, body, words):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + body)
    with pytest.raises(UsageError, match=words):
        read_gguf(path)
    path.write_bytes(b"PK" + body)
    with pytest.raises(UsageError, match="not a GGUF file"):
        read_gguf(path)
