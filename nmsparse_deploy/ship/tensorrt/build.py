"""Build a TensorRT engine from an ONNX file so that its sparse kernels can be proven, with TensorRT
10 or 11.

Sparse weights are a permission: the builder times sparse against dense kernels and keeps the faster
one. So that this choice means something, networks are strongly typed, tactics are timed at the very
shape that will be reported and averaged over several runs, and an engine is thrown away when the
builder had to leave tactics out for lack of memory. What a version of TensorRT can do is asked of
the module, never read from its version number.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nmsparse_deploy.errors import CheckFailed, NmsparseError, UsageError
from nmsparse_deploy.ship.onnx.gemms import Gemm, gemms
from nmsparse_deploy.ship.tensorrt.log import BuildLog, parse_log
from nmsparse_deploy.ship.tensorrt.module import (
    extra,
    load_tensorrt,
    monitor,
    recorder,
    require_cuda,
)
from nmsparse_deploy.ship.tensorrt.sidecar import (
    CACHE,
    FAILED_LOG,
    FILES,
    LAYERS,
    LOG,
    BuildEnvironment,
    Settings,
    Sidecar,
    identify,
    onnx_files,
)
from nmsparse_deploy.system.progress import Progress, silent


def refuse_fp32(onnx: Path, weights: Sequence[Gemm]) -> None:
    """Raise `UsageError` for a graph whose weights are all in 32 bits: its engine would have no
    sparse kernels."""
    if not any(gemm.low_precision for gemm in weights):
        raise UsageError(
            f"No weight of '{onnx}' is in fp16, bf16, fp8 or int8: networks are strongly typed, so its "
            "engine would compute in fp32 and have no sparse kernels worth the name.",
            "nmsparse-deploy export --precision fp16, or --allow-fp32 to build it all the same",
        )


def build_engine(
    onnx: Path, folder: Path, name: str, settings: Settings, progress: Progress = silent
) -> Path:
    """Build `folder/NAME.engine` with its sidecar, log, layer list and timing cache; returns its
    path.

    Either all of them appear, the sidecar last, or only `NAME.failed.log`. Raises `NmsparseError`
    without TensorRT or a GPU or when the build fails, `CheckFailed` when the builder left tactics
    out for lack of memory.
    """
    require_cuda("Building a TensorRT engine")
    trt = load_tensorrt("Building a TensorRT engine")
    if settings.sparse and not settings.allow_fp32:
        refuse_fp32(onnx, gemms(onnx, None, settings.shapes))
    start, files = time.perf_counter(), onnx_files(onnx)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder) as scratch:
        made = Path(scratch) / f"{name}.engine"
        logger = recorder(trt)
        try:
            with logger.writing_to(made.with_suffix(LOG)):
                statistics = _build(trt, logger, onnx, made, settings, progress)
            _refuse_skipped(parse_log(_text(made)), name)
        except NmsparseError as error:
            whole = folder / f"{name}{FAILED_LOG}"
            os.replace(made.with_suffix(LOG), whole)
            error.hint = error.hint or f"the whole log is {whole}"
            raise
        Sidecar(
            identify(made, made.parent),
            tuple(identify(file, folder) for file in files),
            settings,
            environment(trt),
            round(time.perf_counter() - start, 1),
            statistics,
        ).save(made.with_suffix(".json"))
        return _publish(made, folder)


def _publish(made: Path, folder: Path) -> Path:
    """Move everything to its place; the sidecar goes first away and comes last, so it never names
    another engine."""
    (folder / f"{made.stem}.json").unlink(missing_ok=True)
    for suffix in FILES:
        (folder / f"{made.stem}{suffix}").unlink(missing_ok=True)
    for file in sorted(made.parent.iterdir(), key=lambda path: path.name == f"{made.stem}.json"):
        os.replace(file, folder / file.name)
    return folder / made.name


def _build(
    trt: Any, logger: Any, onnx: Path, made: Path, settings: Settings, progress: Progress
) -> dict[str, int]:
    """Parse, configure, build and inspect. Returns what TensorRT tells about the plan."""
    builder = trt.Builder(logger)
    network = builder.create_network(network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        raise NmsparseError(f"TensorRT cannot parse '{onnx}': {_sentence(_first_error(parser))}")
    config = builder.create_builder_config()
    configure(trt, config, settings)
    profile = builder.create_optimization_profile()
    for tensor, shape in settings.shapes.items():
        profile.set_shape(tensor, tuple(shape), tuple(shape), tuple(shape))
    if config.add_optimization_profile(profile) < 0:
        raise NmsparseError(f"TensorRT does not take these input shapes: {dict(settings.shapes)}.")
    cache = config.create_timing_cache(b"")
    config.set_timing_cache(cache, False)
    if hasattr(config, "progress_monitor"):
        config.progress_monitor = monitor(trt, logger, made.stem, progress)
    plan = builder.build_serialized_network(network, config)
    logger.raise_kept()
    if plan is None:
        logger.file.flush()
        errors = parse_log(_text(made)).errors
        raise NmsparseError(
            f"TensorRT built no engine: {_sentence(errors[-1] if errors else 'it gave no reason')}"
        )
    made.write_bytes(plan)
    cache = config.get_timing_cache()
    made.with_suffix(CACHE).write_bytes(cache.serialize())
    return _inspect(trt, logger, made, settings)


def _first_error(parser: Any) -> str:
    if not parser.num_errors:
        return ""
    failure = parser.get_error(0)
    return str(failure.desc())


def network_flags(trt: Any) -> int:
    """Return the flag of strong typing, which TensorRT 11 has always. Raises `NmsparseError` where
    there is none."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    if flag is not None:
        return 1 << int(flag)
    if hasattr(trt.BuilderFlag, "FP16"):
        raise NmsparseError(
            f"TensorRT {trt.__version__} has no strongly typed networks; 10.3 or newer is needed.",
            f"pip install 'nmsparse-deploy[{extra()}]'",
        )
    return 0


def configure(trt: Any, config: Any, settings: Settings) -> None:
    """Apply `settings`. Hardware compatibility, refitting and strict NaNs stay off: each takes
    sparse tactics away."""
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = settings.level
    config.avg_timing_iterations = settings.timing_iterations
    if settings.sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if settings.route is not None:
        _set_route(config, settings.route)


def _set_route(config: Any, route: str) -> None:
    """Set build routes only where TensorRT lists them, and read them back: one that it does not
    know is ignored."""
    listed = str(getattr(config, "all_build_routes", "") or "")
    for token in route.split():
        knob = token.partition("=")[0].lstrip("-")
        if not re.search(rf"(?<![\w:]){re.escape(knob)}(?![\w:])", listed):
            raise UsageError(
                f"This TensorRT lists no build route '{knob}'.", "build without --route"
            )
    config.build_route = route
    if str(config.build_route).split() != route.split():
        raise NmsparseError(
            f"TensorRT did not take the build route '{route}'.", "build without --route"
        )


def _inspect(trt: Any, logger: Any, made: Path, settings: Settings) -> dict[str, int]:
    """Write the inspector's layer list at the profile's shape."""
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(made.read_bytes())
    if engine is None:
        raise NmsparseError("TensorRT cannot load the engine that it has just built.")
    context = engine.create_execution_context()
    for tensor, shape in settings.shapes.items():
        context.set_input_shape(tensor, tuple(shape))
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    made.with_suffix(LAYERS).write_text(text, encoding="utf-8")
    if not (hasattr(trt, "EngineStat") and hasattr(engine, "get_engine_stat")):
        return {}
    return {"total_weights_bytes": int(engine.get_engine_stat(trt.EngineStat.TOTAL_WEIGHTS_SIZE))}


def environment(trt: Any) -> BuildEnvironment:
    """Return what this build depends on beside the graph and the settings."""
    import torch

    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return BuildEnvironment(
        trt.__version__,
        torch.__version__,
        torch.version.cuda,
        device.name,
        f"{device.major}.{device.minor}",
    )


def _refuse_skipped(log: BuildLog, name: str) -> None:
    if log.memory:
        raise CheckFailed(
            f"The builder ran out of memory {len(log.memory)} times while it made '{name}' and left "
            f"tactics out, so what it chose means nothing: {_sentence(log.memory[0])}"
        )


def _text(made: Path) -> str:
    return made.with_suffix(LOG).read_text(encoding="utf-8")


def _sentence(text: str) -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "it gave no reason")
    return line if line.endswith(".") else f"{line}."
