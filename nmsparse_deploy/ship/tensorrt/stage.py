"""From an exported graph to TensorRT engines and the evidence for each: build, and look again later.

Every graph gets twins: the same graph with the same settings, sparse weights allowed and not allowed. What separates
their speed is the sparse kernels alone, as far as the evidence shows any.

    RUN/engines/fp16-1x128/sparse-on.engine   with sparse-on.json .log .layers.json .kernels.json .cache
                           sparse-off.engine  with the same
    RUN/engines.json       settings, sizes and evidence of all of them
"""

from __future__ import annotations

import csv
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nmsparse_deploy.errors import CheckFailed, UsageError
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.prove import VerifyReport, verify_onnx
from nmsparse_deploy.recipe import Build
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.ship.evidence import EngineEvidence
from nmsparse_deploy.ship.ladder import Counters, Kernels, Sources, climb
from nmsparse_deploy.ship.onnx import LinkMap
from nmsparse_deploy.ship.onnx.gemms import fixed_shapes, gemms, graph_inputs
from nmsparse_deploy.ship.tensorrt.build import Settings, build_engine, refuse_fp32
from nmsparse_deploy.ship.tensorrt.engine import TensorRT
from nmsparse_deploy.ship.tensorrt.log import parse_inspector, parse_log
from nmsparse_deploy.ship.tensorrt.module import load_tensorrt, require_cuda
from nmsparse_deploy.ship.tensorrt.sidecar import KERNELS, LAYERS, LOG, Sidecar
from nmsparse_deploy.system.environment import environment
from nmsparse_deploy.system.progress import Progress, silent

ON, OFF, ROUTED = "sparse-on", "sparse-off", "sparse-routed"


def build(run: RunDir, spec: Build = Build(), progress: Progress = silent) -> list[dict[str, Any]]:  # noqa: B008
    """Verify the run's ONNX graph, build its TensorRT twins, watch them run once, and gather the evidence.

    Raises `UsageError` for a graph that is not there or has no low-precision weights, `CheckFailed` when the graph does
    not hold the masks or a build is invalid, `NmsparseError` without a GPU or TensorRT; the ONNX files stay.
    """
    start = time.perf_counter()
    onnx = run / f"onnx/{spec.precision}/model.onnx"
    if not onnx.is_file():
        raise UsageError(f"The run '{run.path}' has no ONNX file in {spec.precision}.",
                         f"nmsparse-deploy export {run.path} --precision {spec.precision}")
    shapes = fixed_shapes(graph_inputs(onnx), spec.batch, spec.length, spec.shapes)
    if not spec.allow_fp32:
        refuse_fp32(onnx, gemms(onnx, None, shapes))
    what = f"Building an engine from '{onnx}', which stays as it is,"
    require_cuda(what)
    load_tensorrt(what)
    with run.lock():
        report = _verified(run, onnx, progress)
        settings = Settings(shapes, True, spec.level, spec.timing_iterations, None, spec.allow_fp32)
        arms = {ON: settings, OFF: replace(settings, sparse=False)}
        if spec.route:
            arms[ROUTED] = replace(settings, route=spec.route)
        folder = run / f"engines/{spec.precision}-{'x'.join(map(str, next(iter(shapes.values()))))}"
        rows = [_build_arm(run, onnx, folder, name, arm, report, progress) for name, arm in arms.items()]
        _record(run, rows)
        run.finish("build", time.perf_counter() - start, spec=spec.model_dump(mode="json"))
    return rows


def parse_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Read `NAME=1x3x224x224`. Raises `UsageError` for anything else."""
    found = {}
    for text in texts:
        name, _, sizes = text.rpartition("=")
        if not name or not all(size.isdecimal() for size in sizes.split("x")):
            raise UsageError(f"'{text}' is no shape.", "write it as --shape pixel_values=1x3x224x224")
        found[name] = tuple(int(size) for size in sizes.split("x"))
    return found


def _verified(run: RunDir, onnx: Path, progress: Progress) -> VerifyReport:
    report = verify_onnx(onnx, MaskSet.load(run / "masks.safetensors"), _link(onnx).by_parameter(), progress=progress)
    if not report.ok:
        raise CheckFailed(f"The graph fails verification, so no engine is built from it: {report.summary()}")
    return report


def _link(onnx: Path) -> LinkMap:
    return LinkMap.load(onnx.with_suffix(".link.json"))


def _build_arm(run: RunDir, onnx: Path, folder: Path, name: str, settings: Settings, report: VerifyReport,
               progress: Progress) -> dict[str, Any]:
    progress(f"building {name}; this takes minutes", 0, 0)
    engine = build_engine(onnx, folder, name, settings, progress)
    progress(f"watching {name} run once", 0, 0)
    run.write_json(str(engine.with_suffix(KERNELS).relative_to(run.path)), _watch(engine, settings))
    sidecar = Sidecar.load(engine)
    return {"name": name, "path": str(engine.relative_to(run.path)), "onnx": str(onnx.relative_to(run.path)),
            "bytes": sidecar.engine.bytes, "settings": sidecar.settings, "environment": sidecar.environment,
            "seconds": sidecar.seconds, "statistics": sidecar.statistics,
            "evidence": gather(engine, sidecar, report, _link(onnx)).to_json()}


def _watch(engine: Path, settings: Settings) -> Kernels:
    """Run zeros of the right shape: which kernels run does not depend on the values."""
    batch = {name: np.zeros(tuple(shape), np.float32) for name, shape in settings.shapes.items()}
    return TensorRT.build(engine).observe(batch)


def _record(run: RunDir, rows: list[dict[str, Any]]) -> None:
    """Write `engines.json`, in which engines of other graphs and shapes stay."""
    held = run.read_json("engines.json")["engines"] if (run / "engines.json").is_file() else []
    made = {row["path"] for row in rows}
    run.write_json("engines.json", {"engines": [row for row in held if row["path"] not in made] + rows,
                                    **environment()})


def verify_engine(engine: Path, counters: Path | None = None, progress: Progress = silent) -> EngineEvidence:
    """Read the evidence for an engine file again from what the build left beside it; nothing is loaded or run.

    The graph must be, byte for byte, what the engine was built from, and is verified again: against the masks of its
    run where it lies in one, else by its values. `counters` is the CSV output of Nsight Compute. Raises `UsageError`
    for a file without a sidecar, `CheckFailed` for one that is not what its sidecar says.
    """
    if not engine.is_file():
        raise UsageError(f"There is no engine '{engine}'.")
    sidecar = Sidecar.load(engine)
    sidecar.check(engine)
    onnx = sidecar.onnx_path(engine)
    link = _link(onnx) if onnx.with_suffix(".link.json").is_file() else None
    masks = onnx.parents[2] / "masks.safetensors" if len(onnx.parents) > 2 else None
    if link is not None and masks is not None and masks.is_file():
        report = verify_onnx(onnx, MaskSet.load(masks), link.by_parameter(), progress=progress)
    else:
        report = verify_onnx(onnx, progress=progress)
    return gather(engine, sidecar, report, link, read_counters(counters) if counters else None)


def gather(engine: Path, sidecar: Sidecar, report: VerifyReport, link: LinkMap | None,
           counters: Counters | None = None) -> EngineEvidence:
    """Climb the ladder with everything that lies beside the engine."""
    onnx = sidecar.onnx_path(engine)
    texts = {suffix: engine.with_suffix(suffix).read_text(encoding="utf-8", errors="replace")
             for suffix in (LOG, LAYERS, KERNELS) if engine.with_suffix(suffix).is_file()}
    log = parse_log(texts[LOG]) if LOG in texts else None
    if log is not None and log.memory:
        raise CheckFailed(f"The log of '{engine}' says that tactics were left out for lack of memory, so its choice "
                          f"means nothing: {log.memory[0]}")
    sources = Sources({check.node: check for check in report.checks if check.node},
                      bool(sidecar.settings.get("sparse")), log,
                      parse_inspector(texts[LAYERS], f"'{engine.with_suffix(LAYERS)}'") if LAYERS in texts else None,
                      _kernels(engine, texts[KERNELS]) if KERNELS in texts else None, counters)
    return climb(engine.name, str(onnx), gemms(onnx, link, sidecar.settings.get("shapes", {})), sources)


def _kernels(engine: Path, text: str) -> Kernels:
    try:
        return {str(name): int(count) for name, count in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"'{engine.with_suffix(KERNELS)}' is damaged: {error}.") from error


def read_counters(path: Path) -> Counters:
    """Read the table of metrics of `ncu --csv`: by kernel and counter the value, added up over launches."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line[:1] == '"']
        found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for row in csv.DictReader(lines):
            metric = row["Metric Name"].partition(".")[0]
            if metric.endswith(("sparsity_on", "sparsity_off")):
                found[row["Kernel Name"]][metric] += float(row["Metric Value"].replace(",", ""))
    except (OSError, KeyError, ValueError, AttributeError, csv.Error) as error:
        raise UsageError(f"'{path}' is not the CSV output of Nsight Compute: {error}.") from error
    if not found:
        raise UsageError(f"'{path}' holds no counter that ends in sparsity_on or sparsity_off.",
                         "see docs/tensorrt.md for the command")
    return found
