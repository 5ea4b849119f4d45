"""Builder and runtime code on a fake TensorRT of both majors: control flow, files, refusals. No
engine is built here."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
import torch

from nmsparse_deploy.errors import CheckFailed, MissingExtra, NmsparseError, UsageError
from nmsparse_deploy.ship.tensorrt import module as tensorrt_module
from nmsparse_deploy.ship.tensorrt.build import build_engine, network_flags
from nmsparse_deploy.ship.tensorrt.engine import TensorRT
from nmsparse_deploy.ship.tensorrt.sidecar import FILES, Sidecar
from tests.fixtures import fake_tensorrt
from tests.fixtures.small_engines import graph, settings

MAJORS = pytest.mark.parametrize("major", [10, 11])


def names(folder):
    return {file.name for file in folder.iterdir()}


@MAJORS
def test_a_build_leaves_everything_and_the_sidecar_ties_it(major, install, tmp_path):
    trt, onnx = install(major), graph(tmp_path / "onnx")
    engine = build_engine(onnx, tmp_path / "engines", "on", settings())
    assert engine == tmp_path / "engines/on.engine"
    assert names(engine.parent) == {"on.engine", "on.json", "on.log", "on.layers.json", "on.cache"}
    sidecar = Sidecar.load(engine)
    sidecar.check(engine)
    assert [file.path for file in sidecar.onnx] == ["../onnx/model.onnx", "../onnx/model.onnx.data"]
    assert sidecar.onnx_path(engine) == onnx and sidecar.statistics == {"total_weights_bytes": 1234}
    assert sidecar.settings == settings()
    assert sidecar.environment.tensorrt == trt.__version__ and sidecar.environment.gpu == "Fake GPU"
    log = engine.with_suffix(".log").read_text()
    assert "[V] Trying tactics\non two lines\n" in log and "[I] (Sparsity) Found 2 layer(s)" in log


@MAJORS
def test_what_the_builder_is_told(major, install, tmp_path):
    trt, onnx = install(major), graph(tmp_path)
    build_engine(onnx, tmp_path, "on", settings(level=5, timing_iterations=9))
    build_engine(onnx, tmp_path, "off", settings(sparse=False, level=5, timing_iterations=9))
    on, off = trt.calls
    assert on._flags == ["SPARSE_WEIGHTS"] and off._flags == []
    for config in (on, off):
        assert (config.builder_optimization_level, config.avg_timing_iterations) == (5, 9)
        assert (
            config.profiling_verbosity is trt.ProfilingVerbosity.DETAILED
            and config._cache is not None
        )
        assert config._profiles[0].shapes == {"x": ((4, 64),) * 3}, (
            "tactics are timed at the reported shape"
        )
    assert "(Sparsity)" not in (tmp_path / "off.log").read_text()


def test_strong_typing_is_probed():
    assert network_flags(fake_tensorrt.make(10)) == network_flags(fake_tensorrt.make(11)) == 0b10
    always = fake_tensorrt.make(11)
    del always.NetworkDefinitionCreationFlag
    always.NetworkDefinitionCreationFlag = object
    assert network_flags(always) == 0
    with pytest.raises(NmsparseError, match=r"8\.6\.1 has no strongly typed networks"):
        network_flags(fake_tensorrt.make(9))


@pytest.mark.parametrize(
    "line",
    [
        "UNSUPPORTED_STATE: Skipping tactic 33 due to insufficient memory on requested size of 1",
        "Requested amount of GPU memory (2 bytes) could not be allocated.",
    ],
)
def test_a_build_that_skipped_tactics_is_invalid(line, install, tmp_path):
    install(10, extra_log=[("WARNING", line)])
    with pytest.raises(CheckFailed, match="left tactics out") as caught:
        build_engine(graph(tmp_path / "onnx"), tmp_path / "e", "on", settings())
    assert names(tmp_path / "e") == {"on.failed.log"} and "on.failed.log" in caught.value.hint
    assert line in (tmp_path / "e/on.failed.log").read_text()


@pytest.mark.parametrize(
    "options,words",
    [
        ({"parses": False}, "cannot parse .*UNSUPPORTED_NODE: no importer"),
        ({"builds": False}, "built no engine: Error Code 10: Could not find"),
    ],
)
def test_a_failed_build_is_one_sentence_and_keeps_its_log_and_the_old_engine(
    options, words, install, tmp_path
):
    onnx = graph(tmp_path / "onnx")
    install(11)
    build_engine(onnx, tmp_path / "e", "on", settings())
    before = (tmp_path / "e/on.engine").read_bytes()
    install(11, **options)
    with pytest.raises(NmsparseError, match=words) as caught:
        build_engine(onnx, tmp_path / "e", "on", settings())
    assert "\n" not in caught.value.message
    assert (tmp_path / "e/on.engine").read_bytes() == before and (
        tmp_path / "e/on.failed.log"
    ).is_file()
    Sidecar.load(tmp_path / "e/on.engine").check(tmp_path / "e/on.engine")


def test_a_rebuild_leaves_nothing_of_the_old_engine(install, tmp_path):
    install(11)
    onnx = graph(tmp_path / "onnx")
    engine = build_engine(onnx, tmp_path / "e", "on", settings())
    for suffix in FILES:
        engine.with_suffix(suffix).write_text("old")
    build_engine(onnx, tmp_path / "e", "on", settings())
    assert names(tmp_path / "e") == {"on.engine", "on.json", "on.log", "on.layers.json", "on.cache"}


def test_sparse_from_an_fp32_graph_is_refused(install, tmp_path):
    trt, onnx = install(10), graph(tmp_path / "onnx", "fp32")
    with pytest.raises(UsageError, match="strongly typed") as caught:
        build_engine(onnx, tmp_path / "e", "on", settings())
    assert "--precision fp16" in caught.value.hint and not trt.calls
    build_engine(onnx, tmp_path / "e", "off", settings(sparse=False))
    build_engine(onnx, tmp_path / "e", "on", settings(allow_fp32=True))
    assert len(trt.calls) == 2


ROUTES = json.dumps([{"name": "-cask:sparsity", "values": ["disable", "enable", "must"]}])


def test_a_build_route_is_set_only_where_it_is_listed(install, tmp_path):
    onnx = graph(tmp_path / "onnx")
    trt = install(11, routes=ROUTES)
    build_engine(onnx, tmp_path / "e", "must", settings(route="-cask:sparsity=must"))
    assert trt.calls[0]._route == "-cask:sparsity=must"
    for major, options, route in (
        (11, {"routes": ""}, "-cask:sparsity=must"),
        (10, {}, "-cask:sparsity=must"),
        (11, {"routes": ROUTES}, "-cask:sparse=must"),
        (11, {"routes": ROUTES}, "-ask:sparsity=1"),
    ):
        install(major, **options)
        with pytest.raises(UsageError, match="lists no build route"):
            build_engine(onnx, tmp_path / "e", "other", settings(route=route))
    install(11, routes=ROUTES, takes_routes=False)
    with pytest.raises(NmsparseError, match="did not take"):
        build_engine(onnx, tmp_path / "e", "other", settings(route="-cask:sparsity=must"))


def test_ctrl_c_in_a_callback_stops_the_build_and_not_the_process(install, tmp_path):
    def interrupted(text, done=0, total=0):
        raise NmsparseError("Interrupted.")

    install(11)
    with pytest.raises(NmsparseError, match="Interrupted"):
        build_engine(graph(tmp_path / "onnx"), tmp_path / "e", "on", settings(), interrupted)
    assert names(tmp_path / "e") == {"on.failed.log"}
    assert "Trying tactics" not in (tmp_path / "e/on.failed.log").read_text(), "the build went on"


def test_a_full_disk_in_the_log_ends_the_build(install, tmp_path, monkeypatch):
    trt = install(11)
    logger = tensorrt_module.recorder(trt)

    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"), logger.writing_to(tmp_path / "log"):
        logger.file = Full()
        severity = type("S", (), {"name": "INFO"})
        logger.log(severity, "message")  # a callback never raises
        logger.file.flush = lambda: None


def test_without_a_gpu_nothing_of_tensorrt_is_touched(tmp_path, monkeypatch):
    class Explosive:
        def __getattr__(self, name):
            raise AssertionError(f"tensorrt.{name} was touched without a GPU")

    monkeypatch.setitem(sys.modules, "tensorrt", Explosive())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    onnx = graph(tmp_path / "onnx")
    (tmp_path / "any.engine").write_bytes(b"plan")
    for call in (
        lambda: build_engine(onnx, tmp_path / "e", "on", settings()),
        lambda: TensorRT.build(tmp_path / "any.engine"),
        lambda: TensorRT.build(onnx),
    ):
        with pytest.raises(NmsparseError, match="needs an NVIDIA GPU") as caught:
            call()
        assert "nmsparse-deploy[trt1" in caught.value.hint and caught.value.exit_code == 1
    assert onnx.is_file() and not (tmp_path / "e").exists()


def test_a_missing_package_is_a_sentence_with_the_right_extra(cuda, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # import raises ModuleNotFoundError
    for installed in ("trt10", "trt11"):
        monkeypatch.setattr(tensorrt_module, "extra", lambda installed=installed: installed)
        with pytest.raises(MissingExtra, match="'tensorrt', which is not installed") as caught:
            build_engine(graph(tmp_path), tmp_path / "e", "on", settings())
        assert f"pip install 'nmsparse-deploy[{installed}]'" in caught.value.hint


def test_libraries_that_do_not_load_are_a_sentence(cuda, tmp_path, monkeypatch):
    package = tmp_path / "site/tensorrt"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "raise ImportError('libnvinfer.so.11: cannot open shared object file')"
    )
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.syspath_prepend(str(package.parent))
    with pytest.raises(NmsparseError, match=r"cannot be loaded: libnvinfer\.so\.11"):
        tensorrt_module.load_tensorrt("Building an engine")


def test_the_extra_follows_onnx_runtime(tmp_path, monkeypatch):
    package = tmp_path / "onnxruntime"
    (package / "capi").mkdir(parents=True)
    spec = type("Spec", (), {"submodule_search_locations": [str(package)]})
    monkeypatch.setattr(tensorrt_module, "find_spec", lambda name: spec)
    assert tensorrt_module.extra() == "trt11"
    (package / "capi/libonnxruntime_providers_tensorrt.so").touch()
    assert tensorrt_module.extra() == "trt10"
    monkeypatch.setattr(tensorrt_module, "find_spec", lambda name: None)
    assert tensorrt_module.extra() == "trt11"


# --- running ---


@MAJORS
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_runs_by_name_through_the_addresses_of_tensors(major, cuda_graph, install, tmp_path):
    trt = install(major)
    engine = TensorRT.build(graph(tmp_path), {"shapes": {"x": (4, 64)}, "cuda_graph": cuda_graph})
    assert (
        engine.path == tmp_path / "model.engine"
        and engine._context.nvtx_verbosity is trt.ProfilingVerbosity.NONE
    )
    x = np.zeros((4, 64), np.float32)
    x[0, 0] = 1.0  # the one input bit pattern that is not zero: 0x3C00 in fp16
    out = engine.run({"x": x})["y"]
    assert (
        out.shape == (4, 64)
        and out.dtype == np.float16
        and (out.view(np.uint16) == 0x3C00 % 1000).all()
    )
    ran = len(trt.ran)
    engine.run({"x": torch.zeros(4, 64)})
    assert (len(trt.ran) == ran) == cuda_graph, "a captured enqueue is replayed, not enqueued again"
    assert engine.inspect().facts["cuda_graph"] is cuda_graph and engine.inspect().facts[
        "inputs"
    ] == ["x"]


def test_wrong_batches_are_usage_errors(install, tmp_path):
    install(10)
    engine = TensorRT.build(graph(tmp_path), {"batch": 4, "length": 64})
    with pytest.raises(UsageError, match="takes the inputs x, not ids"):
        engine.run({"ids": np.zeros((4, 64))})
    with pytest.raises(UsageError, match=re.escape("best (4, 64), not for (5, 64)")):
        engine.run({"x": np.zeros((5, 64))})
    with pytest.raises(UsageError, match="no setting 'batches'"):
        TensorRT.build(tmp_path / "model.onnx", {"batches": 1})
    with pytest.raises(UsageError, match="There is no file"):
        TensorRT.build(tmp_path / "nothing.engine")


def test_a_damaged_or_foreign_engine_is_a_sentence(install, tmp_path):
    install(11)
    (tmp_path / "foreign.engine").write_bytes(b"ftrt not for this GPU")
    with pytest.raises(NmsparseError, match="another version or for another GPU"):
        TensorRT.build(tmp_path / "foreign.engine")
    engine = build_engine(graph(tmp_path), tmp_path, "on", settings())
    engine.write_bytes(engine.read_bytes()[:-5])
    with pytest.raises(CheckFailed, match="truncated"):
        TensorRT.build(engine)


def test_observed_kernels_are_those_of_one_pass(install, tmp_path):
    install(11, choose=lambda found: found[:1])
    engine = TensorRT.build(graph(tmp_path), {"shapes": {"x": (4, 64)}})
    assert engine.observe({"x": np.zeros((4, 64))}) == {
        f"{fake_tensorrt.SPARSE}_execute_kernel": 1,
        f"{fake_tensorrt.DENSE}_execute_kernel": 1,
    }
