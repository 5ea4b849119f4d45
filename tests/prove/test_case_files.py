"""Files that mislead a verifier, or bring it down: the verdict that tests/hostile and tests/golden
give for each."""

from __future__ import annotations

import time

import numpy as np
import pytest
from onnx import helper

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.prove import VerifyReport, verify_onnx
from nmsparse_deploy.prove.report import TensorCheck
from tests import ROOT
from tests.fixtures.onnx_files import external, node, saved, tensor
from tests.fixtures.tensor_files import sparse

HOSTILE, GOLDEN = ROOT / "tests/hostile", ROOT / "tests/golden/verify"
KN = sparse(64, 32, axis=0)[0].numpy()


def rows(report: VerifyReport) -> dict[str, TensorCheck]:
    return {check.tensor: check for check in report.checks}


@pytest.mark.parametrize(
    "name, words", [("perm-as-int", "'perm'.*no list of numbers"), ("function-bomb", "unfold to")]
)
def test_damage_and_bombs_are_refused_within_a_second(name, words):
    verify_onnx(GOLDEN / "sibling-branches.onnx")  # the imports of onnx are not what is timed
    start = time.perf_counter()
    with pytest.raises(UsageError, match=words) as caught:
        verify_onnx(HOSTILE / f"{name}.onnx")
    assert time.perf_counter() - start < 1 and "\n" not in caught.value.message


def test_sibling_branches_have_names_of_their_own():
    report = verify_onnx(GOLDEN / "sibling-branches.onnx")
    assert report.ok and report.checked == 2 and len(rows(report)) == 2
    assert {check.axis for check in report.checks} == {0}
    assert verify_onnx(GOLDEN / "sibling-branches.onnx", expect=["w"]).ok


def test_functions_that_call_themselves_or_too_deep_are_refused(tmp_path):
    def calls(name, callee):
        return helper.make_function(
            "local",
            name,
            ["a"],
            ["c"],
            [node(callee, "a", "c", domain="local")],
            [helper.make_opsetid("", 23), helper.make_opsetid("local", 1)],
        )

    nodes = [node("F0", "x", "y", domain="local")]
    for functions, words in (
        ([calls("F0", "F0")], "calls itself"),
        ([calls(f"F{i}", f"F{i + 1}") for i in range(2000)], "deep"),
    ):
        with pytest.raises(UsageError, match=words):
            verify_onnx(saved(tmp_path, nodes, [], functions=functions))


def test_circles_of_links_and_long_names_are_one_sentence(tmp_path):
    (tmp_path / "w.bin").symlink_to("w.bin")
    nodes = [node("MatMul", "x w", "y")]
    for location in ("w.bin", "w" * 5000):
        with pytest.raises(UsageError, match="'w' keeps its data in"):
            verify_onnx(saved(tmp_path, nodes, [external("w", KN, location)]))


@pytest.mark.parametrize("blob, reads", [("../../blobs/b", True), ("../../../elsewhere/b", False)])
def test_data_of_the_hubs_cache_is_read_through_its_links_and_no_further(tmp_path, blob, reads):
    repo = tmp_path / "models--a--b"
    for folder in (repo / "blobs", repo / "snapshots" / "rev", tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
    for folder in (repo / "blobs", tmp_path / "elsewhere"):
        (folder / "b").write_bytes(KN.tobytes())
    (repo / "snapshots" / "rev" / "w.bin").symlink_to(blob)
    path = saved(
        repo / "snapshots" / "rev", [node("MatMul", "x w", "y")], [external("w", KN, "w.bin")]
    )
    if reads:
        assert verify_onnx(path).ok
    else:
        with pytest.raises(UsageError, match="link that leads out"):
            verify_onnx(path)


@pytest.mark.parametrize("change", [{"perm": 1.5}, {"perm": "ab"}])
def test_attributes_of_another_type_are_refused(tmp_path, change):
    nodes = [node("Transpose", "w", "t", **change), node("MatMul", "x t", "y")]
    with pytest.raises(UsageError, match="damaged"):
        verify_onnx(saved(tmp_path, nodes, [tensor("w", np.ascontiguousarray(KN.T))]))
