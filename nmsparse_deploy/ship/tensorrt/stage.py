"""From an exported graph of a run to TensorRT engines and the evidence for each.

Every graph gets twins: the same graph with the same settings, sparse weights allowed and not
allowed. What separates their speed is the sparse kernels alone, as far as the evidence shows any.

    RUN/engines/fp16-1x128/sparse-on.engine   with sparse-on.json .log .layers.json .kernels.json .cache
                           sparse-off.engine  with the same
    RUN/engines.json       settings, sizes and evidence of all of them
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from nmsparse_deploy.errors import CheckFailed, UsageError
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.prove import VerifyReport
from nmsparse_deploy.recipe import Build
from nmsparse_deploy.runs.run_dir import GRAPH, RunDir
from nmsparse_deploy.ship.engine import BuiltEngine
from nmsparse_deploy.ship.ladder import Kernels
from nmsparse_deploy.ship.onnx import LinkMap
from nmsparse_deploy.ship.onnx.gemms import fixed_shapes, gemms, graph_inputs
from nmsparse_deploy.ship.tensorrt.build import build_engine, refuse_fp32
from nmsparse_deploy.ship.tensorrt.gather import gather
from nmsparse_deploy.ship.tensorrt.module import load_tensorrt, require_cuda
from nmsparse_deploy.ship.tensorrt.sidecar import KERNELS, Settings, Sidecar
from nmsparse_deploy.system.progress import Progress

ON, OFF, ROUTED = "sparse-on", "sparse-off", "sparse-routed"


Profile = Callable[[Path, Mapping[str, Sequence[int]]], Kernels]
"""Runs an engine once at these input shapes and counts its kernels."""


def build_twins(
    run: RunDir,
    spec: Build,
    name: str,
    verify: Callable[[Path, MaskSet, Progress], VerifyReport],
    profile: Profile,
    progress: Progress,
) -> list[BuiltEngine]:
    """Verify the run's ONNX graph, build its TensorRT twins, profile them once, and gather the
    evidence.

    Raises `UsageError` for a graph that is not there or has no low-precision weights, `CheckFailed`
    when the graph does not hold the masks or a build is invalid, `NmsparseError` without a GPU or
    TensorRT; the ONNX files stay.
    """
    onnx = run / f"onnx/{spec.precision}/{GRAPH}.onnx"
    if not onnx.is_file():
        raise UsageError(
            f"The run '{run.path}' has no ONNX file in {spec.precision}.",
            f"nmsparse-deploy export {run.path} --precision {spec.precision}",
        )
    shapes = fixed_shapes(graph_inputs(onnx), spec.batch, spec.length, spec.shapes)
    if not spec.allow_fp32:
        refuse_fp32(onnx, gemms(onnx, None, shapes))
    what = f"Building an engine from '{onnx}', which stays as it is,"
    require_cuda(what)
    load_tensorrt(what)
    report = verify(onnx, MaskSet.load(run / "masks.safetensors"), progress)
    if not report.ok:
        raise CheckFailed(
            f"The graph fails verification, so no engine is built from it: {report.summary()}"
        )
    settings = Settings(shapes, True, spec.level, spec.timing_iterations, None, spec.allow_fp32)
    arms = {ON: settings, OFF: replace(settings, sparse=False)}
    if spec.route:
        arms[ROUTED] = replace(settings, route=spec.route)
    folder = run / f"engines/{spec.precision}-{'x'.join(map(str, next(iter(shapes.values()))))}"
    rows = []
    for arm, chosen in arms.items():
        progress(f"building {arm}; this takes minutes", 0, 0)
        engine = build_engine(onnx, folder, arm, chosen, progress)
        progress(f"profiling one run of {arm}", 0, 0)
        run.write_json(
            str(engine.with_suffix(KERNELS).relative_to(run.path)), profile(engine, shapes)
        )
        sidecar = Sidecar.load(engine)
        evidence = gather(engine, sidecar, report, LinkMap.load(onnx.with_suffix(".link.json")))
        rows.append(
            BuiltEngine(
                name,
                arm,
                str(engine.relative_to(run.path)),
                str(onnx.relative_to(run.path)),
                sidecar.engine.bytes,
                asdict(sidecar.settings),
                asdict(sidecar.environment),
                sidecar.seconds,
                evidence,
                sidecar.statistics,
            )
        )
    return rows


def parse_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Read `NAME=1x3x224x224`. Raises `UsageError` for anything else."""
    shapes = {}
    for text in texts:
        name, _, sizes = text.rpartition("=")
        if not name or not all(size.isdecimal() for size in sizes.split("x")):
            raise UsageError(
                f"'{text}' is no shape.", "write it as --shape pixel_values=1x3x224x224"
            )
        shapes[name] = tuple(int(size) for size in sizes.split("x"))
    return shapes
