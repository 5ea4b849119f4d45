"""A `tensorrt` module made of Python, in the shape of 10.x and of 11.x.

It has the attributes that the real one has, and no others: what is gone in 11 raises here too. "Building" reads the ONNX
graph and decides by rule which GEMMs are sparse; the plan is JSON. "Running" reads and writes memory through the very
addresses it was given.
"""

from __future__ import annotations

import ctypes
import enum
import json
import math
from types import ModuleType

import onnx

SPARSE = "sm90_xmma_sparse_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64"
DENSE = "sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize64x64x64"
WIDTH = {"HALF": ctypes.c_uint16, "FLOAT": ctypes.c_float, "INT64": ctypes.c_int64, "BF16": ctypes.c_uint16}
KINDS = {onnx.TensorProto.FLOAT16: "HALF", onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.INT64: "INT64",
         onnx.TensorProto.BFLOAT16: "BF16"}


def make(major: int, *, choose=lambda names: names, extra_log=(), parses=True, builds=True, routes="",
         takes_routes=True) -> ModuleType:
    """The module. `choose` decides which eligible layers get a sparse kernel; `extra_log` is printed while building."""
    trt = ModuleType("tensorrt")
    trt.__version__ = {9: "8.6.1", 10: "10.14.1.48", 11: "11.4.0.106"}[major]
    trt.calls = []
    trt.ran = []

    class Severity(enum.Enum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class ILogger:
        def __init__(self):
            self.ready = True

    flags = ["SPARSE_WEIGHTS", "STRICT_NANS", "REFIT"] + (["FP16", "INT8", "BF16"] if major < 11 else [])
    trt.BuilderFlag = enum.IntEnum("BuilderFlag", flags, start=0)
    typed = [] if major == 9 else ["STRONGLY_TYPED"]
    trt.NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", ["EXPLICIT_BATCH", *typed], start=0)
    trt.ProfilingVerbosity = enum.Enum("ProfilingVerbosity", ["LAYER_NAMES_ONLY", "NONE", "DETAILED"])
    trt.LayerInformationFormat = enum.Enum("LayerInformationFormat", ["ONELINE", "JSON"])
    trt.TensorIOMode = enum.Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
    trt.EngineStat = enum.Enum("EngineStat", ["TOTAL_WEIGHTS_SIZE", "STRIPPED_WEIGHTS_SIZE"])
    trt.DataType = enum.Enum("DataType", ["FLOAT", "HALF", "BF16", "INT64", "INT32", "INT8", "UINT8", "BOOL", "FP8"])
    trt.ILogger = ILogger

    class IProgressMonitor:
        def __init__(self):
            self.ready = True

    class ParserError:
        def desc(self):
            return "In node 3 (importNode): UNSUPPORTED_NODE: no importer\nmore"

    class Profile:
        def __init__(self):
            self.shapes = {}

        def set_shape(self, name, least, best, most):
            self.shapes[name] = (least, best, most)

    class Cache:
        def serialize(self):
            return b"timings"

    class Config:
        __slots__ = ("_cache", "_flags", "_profiles", "_route", "avg_timing_iterations", "builder_optimization_level",
                     "profiling_verbosity", "progress_monitor")

        def __init__(self):
            self._flags, self._profiles, self._cache, self._route, self.progress_monitor = [], [], None, "", None

        def set_flag(self, flag):
            assert isinstance(flag, trt.BuilderFlag)
            self._flags.append(flag.name)

        def add_optimization_profile(self, profile):
            self._profiles.append(profile)
            return 0 if profile.shapes else -1

        def create_timing_cache(self, blob):
            assert blob == b""
            return Cache()

        def set_timing_cache(self, cache, ignore_mismatch):
            self._cache = cache
            return True

        def get_timing_cache(self):
            return self._cache

    if major == 11:
        def set_route(self, text):
            self._route = text if takes_routes else ""

        Config.all_build_routes = property(lambda self: routes)
        Config.build_route = property(lambda self: self._route, set_route)

    class Network:
        def __init__(self, flags):
            self.flags, self.model = flags, None

    class OnnxParser:
        def __init__(self, network, logger):
            self.network, self.num_errors = network, 0

        def parse_from_file(self, path):
            assert isinstance(path, str)
            self.network.model = onnx.load(path, load_external_data=True)
            self.num_errors = 0 if parses else 1
            return parses

        def get_error(self, index):
            return ParserError()

    class Builder:
        def __init__(self, logger):
            assert logger.ready, "ILogger.__init__ was not called"
            self.logger = logger

        def create_network(self, flags=0):
            strong = 1 << trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
            assert major == 11 or flags & strong, "weak typing is not for us"
            return Network(flags)

        def create_builder_config(self):
            return Config()

        def create_optimization_profile(self):
            return Profile()

        def build_serialized_network(self, network, config):
            trt.calls.append(config)
            if config.progress_monitor:
                assert config.progress_monitor.ready
                config.progress_monitor.phase_start("Building", None, 2)
                if not config.progress_monitor.step_complete("Building", 0):
                    return None
                config.progress_monitor.phase_finish("Building")
            self.logger.log(Severity.VERBOSE, "Trying tactics\non two lines")
            for severity, line in extra_log:
                self.logger.log(Severity[severity], line)
            if not builds:
                self.logger.log(Severity.ERROR, "Error Code 10: Could not find any implementation for node x.")
                return None
            layers = _layers(network.model, "SPARSE_WEIGHTS" in config._flags, self.logger, choose)
            return json.dumps({"layers": layers, "io": _io(network.model), "profile": config._profiles[0].shapes}).encode()

    def _layers(model, sparse, logger, choose):
        stored = {t.name for t in model.graph.initializer if 1 not in t.dims[-2:]}  # rotary angles are no GEMM
        groups = {}
        for node in model.graph.node:
            if node.op_type in ("MatMul", "Gemm") and set(node.input) & stored:
                groups.setdefault(node.input[0], []).append(node.name)
        names = {"+".join(reversed(nodes)) + f"_myl0_{i}": nodes for i, nodes in enumerate(groups.values())}
        chosen = list(choose(list(names))) if sparse else []
        if sparse:
            def listed(found):
                return f": {', '.join(found)}" if found else ""

            logger.log(Severity.INFO, f"(Sparsity) Found {len(names)} layer(s) eligible to use sparse tactics{listed(names)}")
            logger.log(Severity.INFO, f"(Sparsity) Chose {len(chosen)} layer(s) using sparse tactics{listed(chosen)}")
        return [{"Name": name, "LayerType": "gemm", "TacticName": SPARSE if name in chosen else DENSE,
                 "Metadata": "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes)} for name, nodes in names.items()]

    def _io(model):
        stored = {t.name for t in model.graph.initializer}
        pairs = [(v, "INPUT") for v in model.graph.input if v.name not in stored] + [(v, "OUTPUT") for v in model.graph.output]
        return {v.name: {"mode": mode, "type": KINDS[v.type.tensor_type.elem_type],
                         "shape": [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim]} for v, mode in pairs}

    class Context:
        def __init__(self, engine):
            self.engine, self.shapes, self.at, self.nvtx_verbosity = engine, {}, {}, trt.ProfilingVerbosity.DETAILED

        def set_input_shape(self, name, shape):
            assert isinstance(shape, tuple)
            fits = list(shape) == list(self.engine.plan["profile"][name][1])
            self.shapes |= {name: shape} if fits else {}
            return fits

        def infer_shapes(self):
            named = {}
            for name, shape in self.shapes.items():
                named |= {d: s for d, s in zip(self.engine.plan["io"][name]["shape"], shape) if isinstance(d, str)}
            for name, value in self.engine.plan["io"].items():
                self.shapes[name] = tuple(named.get(d, d) for d in value["shape"])
            return []

        def get_tensor_shape(self, name):
            return self.shapes[name]

        def set_tensor_address(self, name, address):
            self.at[name] = address
            return True

        def execute_async_v3(self, stream):
            """Every output value is the sum of the first input's bits, so that a wrong address shows."""
            io = self.engine.plan["io"]
            given = next(name for name in io if io[name]["mode"] == "INPUT")
            total = sum(_array(self, given)) % 1000
            for name in io:
                if io[name]["mode"] == "OUTPUT":
                    out = _array(self, name)
                    out[:] = [total] * len(out)
            trt.ran.extend(layer["TacticName"] + "_execute_kernel" for layer in self.engine.plan["layers"])
            return True

    def _array(context, name):
        kind = WIDTH[context.engine.plan["io"][name]["type"]]
        return (kind * math.prod(context.shapes[name])).from_address(context.at[name])

    class Inspector:
        def __init__(self, engine):
            self.engine, self.execution_context = engine, None

        def get_engine_information(self, form):
            assert form is trt.LayerInformationFormat.JSON and self.execution_context.shapes
            return json.dumps({"Layers": self.engine.plan["layers"], "Bindings": []})

    class Engine:
        def __init__(self, plan):
            self.plan = plan
            self.num_io_tensors = len(plan["io"])

        def create_execution_context(self):
            return Context(self)

        def create_engine_inspector(self):
            return Inspector(self)

        def get_engine_stat(self, stat):
            return 1234

        def get_tensor_name(self, index):
            return list(self.plan["io"])[index]

        def get_tensor_mode(self, name):
            return trt.TensorIOMode[self.plan["io"][name]["mode"]]

        def get_tensor_dtype(self, name):
            return trt.DataType[self.plan["io"][name]["type"]]

        def get_tensor_profile_shape(self, name, index):
            return self.plan["profile"][name]

    class Runtime:
        def __init__(self, logger):
            assert logger.ready

        def deserialize_cuda_engine(self, blob):
            try:
                return Engine(json.loads(blob))
            except ValueError:
                return None

    trt.IProgressMonitor, trt.Builder, trt.OnnxParser, trt.Runtime = IProgressMonitor, Builder, OnnxParser, Runtime
    trt.classes = {"builder": Builder, "network": Network, "parser": OnnxParser, "config": Config, "profile": Profile,
                   "cache": Cache, "runtime": Runtime, "engine": Engine, "context": Context, "inspector": Inspector,
                   "failure": ParserError}
    return trt
