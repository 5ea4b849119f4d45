"""Every attribute that our code uses on TensorRT exists: on the fake (always) and on the real
bindings of both majors.

The names are read from the source with `ast`, so a new call cannot escape. The real bindings are
pinned wheels; the libraries they link against are not on the package index, so three stub libraries
with nine empty entry points stand in: enough to import the module and look, not to build anything.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.ship.tensorrt import build as tensorrt_build
from nmsparse_deploy.ship.tensorrt import engine as tensorrt
from nmsparse_deploy.ship.tensorrt import module as tensorrt_module
from nmsparse_deploy.system import assets
from tests.fixtures import fake_tensorrt

SOURCES = [Path(module.__file__) for module in (tensorrt, tensorrt_build, tensorrt_module)]
CLASSES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "cache": "ITimingCache",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
    "failure": "ParserError",
}
"""What a variable (or `self._NAME`) of that name holds, everywhere in the sources."""
MAKERS = {
    "Builder": "builder",
    "create_network": "network",
    "OnnxParser": "parser",
    "create_builder_config": "config",
    "create_optimization_profile": "profile",
    "create_timing_cache": "cache",
    "Runtime": "runtime",
    "deserialize_cuda_engine": "engine",
    "create_execution_context": "context",
    "create_engine_inspector": "inspector",
    "get_timing_cache": "cache",
    "get_error": "failure",
}
"""What a call returns must be put into the variable of its name, or used on the spot."""


def root(node: ast.expr) -> str | None:
    """`trt` of `trt.A.B`, `engine` of `engine` and `self._engine`."""
    if isinstance(node, ast.Name):
        return node.id
    if (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    ):
        return node.attr.removeprefix("_")
    return None


def used() -> tuple[set[str], set[str]]:
    """Dotted names that must exist (`trt.Builder`, `config.set_flag`), and those that are asked for
    first."""
    needed, probed, guarded = set(), set(), set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("hasattr", "getattr")
            ):
                owner, name = dotted(node.args[0]), node.args[1].value
                if owner:
                    probed.add(f"{owner}.{name}")
            elif isinstance(node, ast.Attribute):
                name = dotted(node)
                if name and "." in name:
                    needed.add(name)
    needed = {name for name in needed if not any(other.startswith(f"{name}.") for other in needed)}
    guarded = {
        name for name in needed if any(name == one or name.startswith(f"{one}.") for one in probed)
    }
    optional = (
        probed | guarded | {"config.build_route"}
    )  # set only after it was found among all_build_routes
    return needed - optional, optional


def dotted(node: ast.expr) -> str | None:
    start = root(node)
    if start == "trt" or start in CLASSES:
        return start
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return f"{owner}.{node.attr}" if owner else None
    return None


def test_variables_hold_what_their_names_say():
    """Without this the collection below would miss calls on an object under another name."""
    wrong = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)):
                continue
            maker = node.value.func.attr if isinstance(node.value.func, ast.Attribute) else ""
            held = [root(target) for target in node.targets]
            if maker in MAKERS and held != [MAKERS[maker]]:
                wrong.append(f"{path.name}:{node.lineno}")
    assert not wrong


def test_the_collection_sees_calls_of_every_kind():
    needed, optional = used()
    assert {
        "trt.Builder",
        "trt.BuilderFlag.SPARSE_WEIGHTS",
        "trt.ProfilingVerbosity.DETAILED",
        "trt.ILogger.__init__",
        "config.set_flag",
        "parser.parse_from_file",
        "config.avg_timing_iterations",
        "failure.desc",
        "cache.serialize",
        "context.execute_async_v3",
        "engine.get_tensor_mode",
        "runtime.deserialize_cuda_engine",
    } <= needed
    assert {
        "trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "config.all_build_routes",
        "config.build_route",
        "trt.EngineStat",
        "engine.get_engine_stat",
        "trt.BuilderFlag.FP16",
    } <= optional
    assert len(needed) > 35 and not {"trt.BuilderFlag.FP16", "trt.BuilderFlag.INT8"} & needed


@pytest.mark.parametrize("major", [10, 11])
def test_the_fake_has_what_is_used(major):
    trt = fake_tensorrt.make(major)
    engine = {
        "engine": ["num_io_tensors"],
        "inspector": ["execution_context"],
        "context": ["nvtx_verbosity"],
        "parser": ["num_errors"],
    }  # set when an object is made
    missing = [
        name
        for name in used()[0]
        if not has(trt, trt.classes, name)
        and name.partition(".")[2] not in engine.get(name.partition(".")[0], [])
    ]
    assert not missing


def has(trt, classes, name: str) -> bool:
    first, *rest = name.split(".")
    found = trt if first == "trt" else classes[first]
    for part in rest:
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


# --- the real bindings ---

PINS = {
    ("11.4.0.106", 311): (
        "cu13",
        "2_28",
        "d072ac2a095e2be749fefc847adfb25d5ebe70303401df62ede8fe67a59f27fc",
    ),
    ("11.4.0.106", 312): (
        "cu13",
        "2_28",
        "5fc7a6c412881f7212030893bd5531b1a0ff415c72c7678dfe4ead7a7765b38d",
    ),
    ("10.14.1.48.post1", 311): (
        "cu12",
        "2_28",
        "2a0b5a301c84d1c95e67cede52bb49f44fda02a45c6a4b409fa16f0632394046",
    ),
    ("10.14.1.48.post1", 312): (
        "cu12",
        "2_28",
        "78da2abb803370147e75045eaeaa2a3f134f5aa7537405f86b22eaa36c0a11ed",
    ),
    ("10.3.0", 311): (
        "cu12",
        "2_17",
        "59ace22d7f2ca1e9dcde2cb0cb5916912cb3cd5a9d72dd7852be0160d9b3a0ee",
    ),
    ("10.3.0", 312): (
        "cu12",
        "2_17",
        "f5c2582aeaa7f5628d2c4d4148a701ebe97be78f7ff3b46a617f0ee0cb5460f2",
    ),
}
ENTRIES = (
    "createInferBuilder_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "getBuilderPluginRegistry",
    "initLibNvInferPlugins",
)
LOOK = """
import json, sys
import tensorrt_bindings as trt
classes, names = json.loads(sys.argv[1])
def has(name):
    first, *rest = name.split(".")
    found = trt if first == "trt" else getattr(trt, classes[first])
    for part in rest:
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True
class Logger(trt.ILogger):  # the two callbacks can be derived from
    def __init__(self): trt.ILogger.__init__(self)
class Monitor(trt.IProgressMonitor):
    def __init__(self): trt.IProgressMonitor.__init__(self)
Logger(), Monitor()
print(json.dumps({"version": trt.__version__, "has": {name: has(name) for name in names},
                  "severities": list(trt.ILogger.Severity.__members__), "types": list(trt.DataType.__members__)}))
"""


@pytest.fixture(scope="session", params=["11.4.0.106", "10.14.1.48.post1", "10.3.0"])
def bindings(request, tmp_path_factory) -> dict:
    """What the real bindings of a version have."""
    python = sys.version_info.major * 100 + sys.version_info.minor
    pin, compiler = PINS.get((request.param, python)), shutil.which("cc")
    if pin is None or sys.platform != "linux" or os.uname().machine != "x86_64":
        pytest.skip("no wheel is pinned for this Python and system")
    if compiler is None:
        pytest.skip("no C compiler (cc) to build the stub libraries with")
    cuda, glibc, digest = pin
    package, version = f"tensorrt-{cuda}-bindings", request.param
    wheel = f"tensorrt_{cuda}_bindings-{version}-cp{python}-none-manylinux_{glibc}_x86_64.whl"
    key = f"trt-bindings-cp{python}"
    asset = assets.Asset(
        key, "bindings", "", package, version, wheel, digest, ("tensorrt_bindings/*",)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assets, "assets", lambda: {key: asset})
        try:
            folder = assets.fetch(key)
        except NmsparseError as error:
            pytest.skip(f"the bindings could not be downloaded: {error.message}")
    stubs = tmp_path_factory.mktemp("stubs")
    (stubs / "stub.c").write_text(
        "".join(f"void *{name}(void) {{ return 0; }}\n" for name in ENTRIES)
    )
    for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        name = f"lib{library}.so.{version.split('.')[0]}"
        subprocess.run(
            [
                compiler,
                "-shared",
                "-fPIC",
                f"-Wl,-soname,{name}",
                "-o",
                str(stubs / name),
                str(stubs / "stub.c"),
            ],
            check=True,
        )
    needed, optional = used()
    done = subprocess.run(
        [sys.executable, "-c", LOOK, json.dumps([CLASSES, sorted(needed | optional)])],
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(stubs)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.matrix
def test_the_real_bindings_have_every_attribute(bindings):
    needed, optional = used()
    assert not [name for name in needed if not bindings["has"][name]], bindings["version"]
    major = int(bindings["version"].split(".")[0])
    held = {name for name in optional if bindings["has"][name]}
    assert {
        "trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "config.progress_monitor",
        "context.nvtx_verbosity",
    } <= held
    assert ("trt.BuilderFlag.FP16" in held) == (major == 10)
    assert ("config.all_build_routes" in held) == ("config.build_route" in held) == (major == 11)


@pytest.mark.matrix
def test_the_real_enumerations_are_understood(bindings):
    assert set(bindings["severities"]) == set(tensorrt_module.SEVERITIES)
    assert set(tensorrt._TYPES) <= set(bindings["types"])
