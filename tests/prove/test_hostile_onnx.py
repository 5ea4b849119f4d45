"""Damaged and lying ONNX models: one sentence, and nothing read outside the folder of the model."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from nmsparse_deploy.errors import MissingExtra, UsageError
from nmsparse_deploy.prove import verify_onnx, weight_uses
from tests.fixtures.onnx_files import TYPES, external, ints, model, node, saved, tensor
from tests.fixtures.tensor_files import sparse

KN = sparse(48, 32, axis=0)[0].numpy()
NODES = [node("MatMul", "x w", "y")]


def refused(path, words):
    with pytest.raises(UsageError, match=words) as caught:
        verify_onnx(path)
    assert "\n" not in caught.value.message
    return caught.value


@pytest.mark.parametrize(
    "content", [b"", b"not an onnx model", b"\x08\x08", bytes(100), b"\xff" * 100]
)
def test_what_is_no_model_is_refused(tmp_path, content):
    (tmp_path / "m.onnx").write_bytes(content)
    refused(tmp_path / "m.onnx", "not an ONNX model")


def test_a_missing_model_is_refused(tmp_path):
    refused(tmp_path / "m.onnx", "no ONNX model")
    refused(tmp_path, "no ONNX model")


def test_a_model_cut_anywhere_never_holds(tmp_path):
    whole = saved(tmp_path, NODES, [tensor("w", KN)]).read_bytes()
    path = tmp_path / "cut.onnx"
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        try:
            report = verify_onnx(path)
        except UsageError as error:
            assert "'w'" in error.message or "cut.onnx" in error.message
        else:
            assert not report.ok


def test_without_onnx_the_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(MissingExtra, match="not installed") as caught:
        weight_uses(tmp_path / "m.onnx")
    assert "nmsparse-deploy[onnx]" in caught.value.hint


@pytest.mark.parametrize(
    "location", ["../w.bin", "/tmp/w.bin", "a/../../w.bin", "C:\\w.bin", "..\\w.bin", "", "w\0.bin"]
)
def test_external_data_cannot_climb(tmp_path, location):
    (tmp_path / "w.bin").write_bytes(KN.tobytes())
    (tmp_path / "inner").mkdir()
    refused(
        saved(tmp_path / "inner", NODES, [external("w", KN, location)]), "'w'.*outside the folder"
    )


@pytest.mark.parametrize("link", ["file", "folder"])
def test_external_data_cannot_climb_through_a_link(tmp_path, link):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "w.bin").write_bytes(KN.tobytes())
    (tmp_path / "inner").mkdir()
    if link == "file":
        (tmp_path / "inner" / "w.bin").symlink_to("../secret/w.bin")
    else:
        (tmp_path / "inner" / "data").symlink_to("../secret")
    location = "w.bin" if link == "file" else "data/w.bin"
    refused(
        saved(tmp_path / "inner", NODES, [external("w", KN, location)]), "'w'.*link that leads out"
    )


@pytest.mark.parametrize(
    "given, words",
    [
        ({"location": "gone.bin"}, "not there"),
        ({"location": "."}, "not there"),
        ({"location": None}, "outside"),
        ({"offset": 4}, "ends at byte"),
        ({"offset": 1 << 62}, "ends at byte"),
        ({"offset": -4}, "bad offset"),
        ({"offset": "0x0"}, "bad offset"),
        ({"offset": "9" * 5000}, "bad offset"),
        ({"length": KN.nbytes - 4}, "takes"),
        ({"length": KN.nbytes + 4}, "takes"),
        ({"length": "many"}, "bad offset"),
    ],
)
def test_a_range_of_external_data_must_fit(tmp_path, given, words):
    (tmp_path / "w.bin").write_bytes(KN.tobytes())
    refused(
        saved(tmp_path, NODES, [external("w", KN, **{"location": "w.bin", **given})]),
        f"'w'.*{words}",
    )


def test_external_data_that_is_short_is_refused(tmp_path):
    (tmp_path / "w.bin").write_bytes(KN.tobytes()[:-1])
    refused(saved(tmp_path, NODES, [external("w", KN, "w.bin")]), "'w'.*ends at byte")


@pytest.mark.parametrize("change", ["short", "long", "empty", "negative", "huge"])
def test_values_that_do_not_fit_their_shape_are_refused(tmp_path, change):
    stored = tensor("w", KN)
    if change == "negative":
        stored.dims[0] = -48
    elif change == "huge":
        stored.dims[0] = 1 << 62
    else:
        stored.raw_data = {
            "short": stored.raw_data[:-1],
            "long": stored.raw_data + b"1",
            "empty": b"",
        }[change]
    words = "bad shape" if change == "negative" else "takes"
    refused(saved(tmp_path, NODES, [stored]), f"'w'.*{words}")


def test_typed_values_must_fit_their_type_and_shape(tmp_path):
    wild = onnx.TensorProto(name="w", data_type=TYPES["I8"], dims=[4, 8], int32_data=[300] * 32)
    refused(saved(tmp_path, NODES, [wild]), "'w'.*do not fit that type")
    few = onnx.TensorProto(name="w", data_type=TYPES["F32"], dims=[4, 8], float_data=[1.0] * 31)
    refused(saved(tmp_path, NODES, [few]), "'w'.*takes")


def test_a_name_with_two_meanings_is_refused(tmp_path):
    refused(saved(tmp_path, NODES, [tensor("w", KN), tensor("w", KN)]), "defines 'w' twice")
    refused(
        saved(tmp_path, [node("Identity", "x", "w"), *NODES], [tensor("w", KN)]),
        "defines 'w' twice",
    )


def test_an_unknown_type_claims_nothing(tmp_path):
    for kind in (TensorProto.STRING, TensorProto.COMPLEX64, 999):
        odd = onnx.TensorProto(name="w", data_type=kind, dims=[48, 32], raw_data=bytes(48 * 32 * 8))
        report = verify_onnx(saved(tmp_path, NODES, [odd]))
        assert (
            not report.ok
            and report.checked == 0
            and "cannot be checked" in report.checks[0].skipped
        )


def test_sparse_initializers_are_said_not_to_be_followed(tmp_path):
    made = model(NODES, [])
    made.graph.sparse_initializer.append(
        helper.make_sparse_tensor(tensor("w", [1.0]), ints("", 3), [48, 32])
    )
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    report = verify_onnx(tmp_path / "m.onnx")
    assert not report.ok and "sparse format" in report.checks[0].skipped


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Transpose", "", "t"), node("MatMul", "x t", "y")],
        [node("MatMul", "w", "y")],
        [node("Gemm", "", "y")],
        [node("Mul", "w", "t"), node("MatMul", "x t", "y")],
        [node("DequantizeLinear", "w", "t"), node("Conv", "x t", "y")],
        [node("Reshape", "w", "t"), node("MatMul", "x t", "y")],
        [node("MatMul", "a a", "y"), node("Identity", "y", "a")],
        [node("Mul", "w v", "t"), node("MatMul", "x t", "y")],
        [helper.make_node("Constant", [], []), *NODES],
    ],
    ids=lambda nodes: f"{nodes[0].op_type}({', '.join(nodes[0].input)})",
)
def test_malformed_nodes_never_end_in_a_traceback(tmp_path, nodes):
    path = saved(tmp_path, nodes, [tensor("w", KN), tensor("v", np.ones(7))])
    verify_onnx(path).to_json()


def test_a_chain_of_nodes_takes_neither_recursion_nor_memory_without_end(tmp_path):
    chain = [node("Identity", f"w{i}", f"w{i + 1}") for i in range(5000)]
    stored = [tensor("w0", KN)]
    assert verify_onnx(saved(tmp_path, [*chain[:60], node("MatMul", "x w60", "y")], stored)).ok
    report = verify_onnx(saved(tmp_path, [*chain, node("MatMul", "x w5000", "y")], stored))
    assert not report.ok and "more than 64 operators" in report.checks[0].skipped
