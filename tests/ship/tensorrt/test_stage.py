"""A pruned run through export, engines and report, on a fake TensorRT; and the same where there is
none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from pydantic import TypeAdapter

import nmsparse_deploy as nms
from nmsparse_deploy.cli import app, invoke
from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.ship.onnx import LinkMap
from nmsparse_deploy.ship.onnx.gemms import GraphInput, fixed_shapes, gemms, graph_inputs
from nmsparse_deploy.ship.onnx.record import ExportedGraph
from nmsparse_deploy.ship.tensorrt.gather import read_counters
from nmsparse_deploy.ship.tensorrt.stage import parse_shapes
from tests.fixtures.fake_tensorrt import SPARSE
from tests.fixtures.small_engines import graph, settings

pytest.importorskip("onnxscript")


def run(capfd, *arguments: object) -> tuple[int, str, str]:
    code = invoke(lambda: app([str(a) for a in arguments]))
    out, err = capfd.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def exported(llama_dir, tmp_path_factory) -> Path:
    """The attention of a two-block model pruned (q, k, v, o), exported in fp16."""
    out = tmp_path_factory.mktemp("deploy") / "run"
    prune = [
        "--quiet",
        "prune",
        str(llama_dir),
        "--method",
        "magnitude",
        "--include",
        "*self_attn*",
        "--out",
        str(out),
    ]
    assert invoke(lambda: app(prune)) == 0
    assert invoke(lambda: app(["--quiet", "export", str(out), "--precision", "fp16"])) == 0
    return out


@pytest.fixture
def pruned(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "run"))


def engines(folder: Path) -> dict[str, dict]:
    return {row["name"]: row for row in RunDir(folder).read_json("engines.json")["engines"]}


def first_block(names):
    """Of the eligible layers, q/k/v of the first block."""
    return [name for name in names if name.endswith("_myl0_0")]


def test_from_a_run_to_evidence_to_a_report(pruned, install, capfd):
    install(11, choose=first_block)
    code, out, _ = run(capfd, "--json", "build", pruned, "--length", 16)
    assert code == 0 and [row["name"] for row in json.loads(out)["engines"]] == [
        "sparse-on",
        "sparse-off",
    ]
    twins = engines(pruned)
    on, off = (twins[name]["evidence"] for name in ("sparse-on", "sparse-off"))
    assert twins["sparse-on"]["path"] == "engines/fp16-1x16/sparse-on.engine"
    same = {
        key: twins["sparse-on"]["settings"][key] == value
        for key, value in twins["sparse-off"]["settings"].items()
    }
    assert [key for key, equal in same.items() if not equal] == ["sparse"]
    by = {row["parameter"] or row["node"]: row for row in on["layers"]}
    attention = "model.layers.{}.self_attn.{}_proj.weight".format
    assert [by[attention(0, name)]["rung"] for name in "qkvo"] == ["observed"] * 3 + ["eligible"]
    assert (
        by[attention(1, "q")]["reason"] == "dense was faster"
        and by[attention(0, "q")]["merged_with"]
    )
    assert by["node_linear_4"]["rung"] is None and by["node_linear_4"]["reason"] == "not in pattern"
    assert on["rungs"]["pattern"]["layers"] == 8 and on["rungs"]["observed"]["layers"] == 3
    assert on["flop_basis"] == "input shapes" and not on["problems"]
    assert "not due to sparse tensor cores" in off["verdict"] and "ran on sparse" in on["verdict"]

    code, out, _ = run(capfd, "report", pruned)
    page, data = (
        Path(out.strip()).read_text(),
        json.loads((pruned / "report/report.json").read_text()),
    )
    text = (pruned / "report/report.md").read_text()
    assert code == 0 and "engine" not in {row["place"] for row in data["not_checked"]}
    assert (
        page.count("level of evidence is the last")
        == text.count("level of evidence is the last")
        == 1
    )
    for view in (page, text.replace("\\", "")):
        assert on["verdict"] in view and "dense was faster" in view and "sparse-off.engine" in view
    assert any(
        line.startswith("Engine engines/fp16-1x16/sparse-on.engine: 3 of 15")
        for line in data["headline"]["lines"]
    )
    assert any(
        "build" in command and "--length 16" in command
        for command in data["provenance"]["commands"]
    )
    code, out, _ = run(capfd, "--json", "verify", pruned)
    assert code == 0 and json.loads(out)["not_checked"] == []


def test_nothing_chosen_is_said_as_plainly(pruned, install, capfd):
    install(10, choose=lambda names: [])
    code, out, _ = run(capfd, "build", pruned)
    assert code == 0 and "No sparse kernel was seen in 15 GEMMs (8 eligible, 0 chosen)" in out
    assert out.count("not due to sparse tensor cores") == 2


def test_an_engine_is_verified_from_what_lies_beside_it(pruned, install, capfd, monkeypatch):
    trt = install(11, choose=first_block)
    assert run(capfd, "build", pruned, "--length", 16)[0] == 0
    for name in ("Runtime", "Builder"):
        monkeypatch.delattr(trt, name)  # nothing is loaded for this
    engine = pruned / "engines/fp16-1x16/sparse-on.engine"
    code, out, _ = run(capfd, "--json", "verify", engine)
    found = json.loads(out)
    assert code == 0 and found["layers"] == engines(pruned)["sparse-on"]["evidence"]["layers"]
    counters = pruned / "ncu.csv"
    counters.write_text(
        '==PROF== Connected\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        f'"0","{SPARSE}_execute_kernel","sm__ops_hgmma_sparsity_on.sum","inst","1,024"\n'
        f'"0","{SPARSE}_execute_kernel","sm__ops_hgmma_sparsity_off.sum","inst","0"\n'
    )
    code, out, _ = run(capfd, "verify", engine, "--counters", counters)
    assert code == 0 and "3 of 15 GEMMs" in out and "counted by the hardware" in out
    moved = (
        shutil.copytree(pruned, pruned.with_name("moved")) / "engines/fp16-1x16/sparse-on.engine"
    )
    assert run(capfd, "verify", moved)[0] == 0


def test_engines_that_are_not_what_they_say(pruned, install, capfd, tmp_path):
    install(11, choose=first_block)
    assert run(capfd, "build", pruned, "--length", 16)[0] == 0
    folder = pruned / "engines/fp16-1x16"
    engine = folder / "sparse-on.engine"

    def refused(words: str, code: int = 1) -> None:
        found, out, err = run(capfd, "--quiet", "verify", engine)
        assert found == code and words in err and "Traceback" not in err and not out, err
        assert err.count("\n") <= 2, "one sentence and a hint"

    whole = engine.read_bytes()
    for damaged, words in (
        (whole[:-1], "truncated"),
        (whole[:-1] + b"?", "SHA-256 differs"),
        (b"", "truncated"),
    ):
        engine.write_bytes(damaged)
        refused(words)
    engine.write_bytes(whole)
    weights = pruned / "onnx/fp16/model.onnx.data"
    held = weights.read_bytes()
    weights.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
    refused("has changed since")
    weights.write_bytes(held)
    log = folder / "sparse-on.log"
    text = log.read_text()
    log.write_text(text + "[W] Requested amount of GPU memory (1 bytes) could not be allocated.\n")
    refused("lack of memory")
    log.write_text(text)
    for suffix, words in (
        (".layers.json", "not the JSON of an engine inspector"),
        (".kernels.json", "damaged"),
        (".json", "not the sidecar"),
    ):
        before = engine.with_suffix(suffix).read_text()
        engine.with_suffix(suffix).write_text(before[:-20])
        refused(words, 2)
        engine.with_suffix(suffix).write_text(before)
    assert run(capfd, "verify", engine)[0] == 0
    (folder / "sparse-on.json").unlink()
    refused("nothing ties it to an ONNX file", 2)
    (tmp_path / "foreign.plan").write_bytes(bytes(64))
    assert "nothing ties it" in run(capfd, "verify", tmp_path / "foreign.plan")[2]
    code, _, err = run(capfd, "verify", tmp_path / "nothing.engine")
    assert code == 2 and "There is no engine" in err


def test_an_engine_of_a_graph_without_a_run_is_judged_by_values(install, tmp_path, capfd):
    from nmsparse_deploy.ship.tensorrt.build import build_engine

    install(10)
    onnx = graph(tmp_path / "a/b/c", dense=("w_k",))
    engine = build_engine(onnx, tmp_path / "e", "on", settings())
    code, out, err = run(capfd, "verify", engine)
    assert (
        code == 1 and "sparse kernel for 'k', whose weight is not proven" in err
    )  # the fake does not look at values
    rows = {
        line.split()[0]: line for line in out.splitlines() if line.startswith(("q ", "k ", "o "))
    }
    assert "not in pattern" in rows["k"] and "tactic" in rows["q"] and "tactic" in rows["o"]


@pytest.mark.parametrize("arguments", [["build"], ["export", "--trt"]])
def test_without_tensorrt_the_graph_stays(arguments, pruned, capfd):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    extra = ["--precision", "fp16"] if "--trt" in arguments else []
    code, out, err = run(capfd, "--json", *arguments, pruned, *extra)
    errors = [line for line in err.splitlines() if line.startswith("Error:")]
    assert (
        code == 1
        and len(errors) == 1
        and "needs an NVIDIA GPU" in errors[0]
        and "stays as it is" in errors[0]
    )
    assert (
        json.loads(out)["exit_code"] == 1
        and "nmsparse-deploy[trt1" in err
        and "Traceback" not in err
    )
    assert (pruned / "onnx/fp16/model.onnx").is_file() and not (pruned / "engines").exists()
    assert run(capfd, "verify", pruned)[0] == 0


def test_export_with_engines_is_one_document(pruned, install, capfd, monkeypatch):
    install(11)
    # a machine that only says it has a GPU cannot trace; the exported files are there already
    files = TypeAdapter(tuple[ExportedGraph, ...]).validate_python(
        RunDir(pruned).read_json("export.json")["files"]
    )
    monkeypatch.setattr(nms, "export", lambda run, *rest: files)
    code, out, _ = run(capfd, "--json", "export", pruned, "--precision", "fp16", "--trt")
    document = json.loads(out)
    assert (
        code == 0 and document["files"][0]["precision"] == "fp16" and len(document["engines"]) == 2
    )


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--precision", "bf16"], "no ONNX file in bf16"),
        (["--precision", "int3"], "precision"),
        (["--level", "3"], "level"),
        (["--timing-iterations", "1"], "timing_iterations"),
        (["--shape", "ids"], "no shape"),
        (["--shape", "ids=1x2"], "no input 'ids'"),
        (["--shape", "input_ids=1x2x3"], "has the shape"),
    ],
)
def test_build_usage_errors(arguments, words, pruned, capfd):
    code, out, err = run(capfd, "build", pruned, *arguments)
    assert code == 2 and words in err and not out


def test_a_graph_that_fails_verification_is_not_built(pruned, install, capfd):
    trt = install(11)
    data = pruned / "onnx/fp16/model.onnx.data"
    data.write_bytes(b"\x3c" * data.stat().st_size)
    code, _, err = run(capfd, "build", pruned)
    assert code == 1 and "fails verification" in err and not trt.calls


def test_other_shapes_are_kept_and_the_same_one_is_replaced(pruned, install, capfd):
    install(11)
    for length in (16, 16, 32):
        assert run(capfd, "build", pruned, "--length", length)[0] == 0
    held = RunDir(pruned).read_json("engines.json")["engines"]
    assert sorted(row["path"] for row in held) == [
        f"engines/fp16-1x{n}/sparse-{twin}.engine" for n in (16, 32) for twin in ("off", "on")
    ]


def test_a_build_route_is_an_arm_of_its_own(pruned, install, capfd):
    install(11, routes='[{"name": "-cask:sparsity"}]')
    assert run(capfd, "build", pruned, "--route", "-cask:sparsity=must")[0] == 0
    assert [(name, row["settings"]["route"]) for name, row in engines(pruned).items()] == [
        ("sparse-on", None),
        ("sparse-off", None),
        ("sparse-routed", "-cask:sparsity=must"),
    ]


# --- the graph ---


def test_gemms_of_an_export_share_what_they_read_and_cost_what_they_cost(exported):
    onnx = exported / "onnx/fp16/model.onnx"
    found = gemms(onnx, LinkMap.load(onnx.with_suffix(".link.json")), {"input_ids": (2, 8)})
    by = {gemm.parameter or gemm.node: gemm for gemm in found}
    q, k, v = (by[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkv")
    assert q.reads == k.reads == v.reads and len({gemm.reads for gemm in found}) == 9
    assert (q.k, q.n, q.dtype) == (64, 64, "F16") and q.flops == 2 * 64 * 64 * 2 * 8 and k.n == 32
    assert all(gemm.flops == 2 * gemm.k * gemm.n * 2 * 8 for gemm in found)


def test_the_outer_product_of_rotary_angles_is_no_gemm(tmp_path):
    """Some exporters write positions times frequencies as a product with K = 1, which nothing could
    make sparse."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper

    stored = [
        onnx.numpy_helper.from_array(np.ones(shape, np.float32), name)
        for name, shape in (("f", (1, 8)), ("w", (8, 4)))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "f"], ["a"], "outer"),
        helper.make_node("MatMul", ["a", "w"], ["y"], "inner"),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, width])
        for name, width in (("x", 1), ("y", 4))
    ]
    path = tmp_path / "m.onnx"
    onnx.save(
        helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)), str(path)
    )
    assert [(gemm.node, gemm.k) for gemm in gemms(path, None, {"x": (2, 1)})] == [("inner", 8)]


def test_quantised_siblings_read_the_same_tensor(tmp_path):
    import onnx
    from onnx import helper

    path = graph(tmp_path, external=False)
    model = onnx.load(str(path))
    scale = [
        onnx.numpy_helper.from_array(
            onnx.numpy_helper.to_array(model.graph.initializer[0])[0, :1].reshape(()), "s"
        )
    ]
    extra = [
        helper.make_node(op, [a, "s"], [b], name=b)
        for name in "qk"
        for op, a, b in (
            ("QuantizeLinear", "x", f"{name}_i"),
            ("DequantizeLinear", f"{name}_i", f"{name}_f"),
        )
    ]
    for node in model.graph.node:
        if node.name in "qk":
            node.input[0] = f"{node.name}_f"
    nodes = [*extra, *[onnx.NodeProto.FromString(n.SerializeToString()) for n in model.graph.node]]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(scale)
    path.write_bytes(model.SerializeToString())
    q, k, o = gemms(path, None, {"x": (4, 64)})
    assert q.reads == k.reads == "x" and o.reads == "c" and q.parameter is None


def test_shapes_are_settled_or_asked_for():
    ids, pixels = (
        GraphInput("ids", ("batch", "sequence")),
        GraphInput("pixels", ("batch", 3, 56, 56)),
    )
    assert fixed_shapes([ids, pixels], 2, 16, {}) == {"ids": (2, 16), "pixels": (2, 3, 56, 56)}
    assert fixed_shapes([ids], 2, 16, {"ids": (4, 4)}) == {"ids": (4, 4)}
    free = GraphInput("pixels", ("batch", 3, "height", "width"))
    with pytest.raises(UsageError) as caught:
        fixed_shapes([free], 1, 16, {})
    assert "--shape pixels=batchx3xheightxwidth" in caught.value.hint
    for wrong in ((1, 3, 56), (1, 4, 56, 56), (0, 3, 56, 56)):
        with pytest.raises(UsageError, match="has the shape"):
            fixed_shapes([pixels], 1, 16, {"pixels": wrong})


def test_shapes_as_typed():
    assert parse_shapes(["a=1x3", "b=c=2"]) == {"a": (1, 3), "b=c": (2,)}
    for wrong in ("a", "a=", "a=1x", "=1", "a=-1x2"):
        with pytest.raises(UsageError, match="no shape"):
            parse_shapes([wrong])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        '"ID","Kernel Name"\n"0","x"\n',
        '"Metric Name","Metric Value"\n"a_sparsity_on","1"\n',
        '"Kernel Name","Metric Name","Metric Value"\n"k","a_sparsity_on","many"\n',
    ],
)
def test_other_files_are_no_counters(text, tmp_path):
    (tmp_path / "ncu.csv").write_text(text)
    with pytest.raises(UsageError):
        read_counters(tmp_path / "ncu.csv")


def test_the_graph_inputs_of_a_damaged_file(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"not a graph")
    with pytest.raises(UsageError, match="damaged"):
        graph_inputs(tmp_path / "m.onnx")
