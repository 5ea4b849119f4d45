"""One precision of an export: trace, quantise, add the graphs with a cache, compare, and compile
where that can be."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from nmsparse_deploy.errors import CheckFailed, MissingExtra, NmsparseError
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.prove.agreement import Agreement, NotCompared
from nmsparse_deploy.recipe import Export
from nmsparse_deploy.runs.load import load_pruned
from nmsparse_deploy.runs.run_dir import GRAPH, RunDir
from nmsparse_deploy.ship.model_agreement import compare_with_model
from nmsparse_deploy.ship.onnx import ExportResult, LinkMap, export_onnx
from nmsparse_deploy.ship.onnx.cached import CacheGraph, check_steps, export_cached
from nmsparse_deploy.ship.onnx.onnxruntime import OnnxRuntime
from nmsparse_deploy.ship.onnx.qdq import insert_qdq
from nmsparse_deploy.ship.onnx.record import (
    RECORD,
    CachedGraphs,
    CompileOutcome,
    ExportedGraph,
    Quantisation,
    VisionGraph,
)
from nmsparse_deploy.ship.onnx.share import share_weights
from nmsparse_deploy.ship.onnx.towers import VISION, Towers, compare_tower, towers_of
from nmsparse_deploy.ship.quantise import BASE, FORMATS, Range, activation_ranges
from nmsparse_deploy.ship.tensorrt.rtx import TensorRtRtx
from nmsparse_deploy.ship.verify_run import verify
from nmsparse_deploy.system.memory import peak_memory_mb
from nmsparse_deploy.system.progress import Progress, silent


def export_one(
    run: RunDir,
    loaded: LoadedModel,
    masks: MaskSet,
    precision: str,
    spec: Export,
    ranges: dict[str, Range],
    progress: Progress,
) -> ExportedGraph:
    """Write `onnx/PRECISION/` and return its record. `ranges` is filled by the first 8-bit
    precision."""
    discovery = loaded.discover()
    eight = precision in FORMATS
    targets = [target for target in discovery.targets if eight or target.name in masks.masks]
    if eight and not ranges:
        ranges |= activation_ranges(run, loaded, targets, progress)
    towers = towers_of(loaded, discovery.blocks, targets)
    cached: tuple[CacheGraph, ...] = ()
    quantised = None
    with run.replacing(f"onnx/{precision}") as folder:
        folder.mkdir()
        result = export_onnx(
            loaded.module,
            loaded.sample_inputs(),
            folder,
            GRAPH,
            towers.own,
            precision=BASE if eight else precision,
            opset=spec.opset,
            progress=progress,
        )
        vision = _vision(towers, loaded, folder, BASE if eight else precision, spec, progress)
        if loaded.family == "llm" and spec.cache:
            cached = export_cached(
                loaded.module,
                folder,
                towers.own,
                precision=BASE if eight else precision,
                opset=spec.opset,
                progress=progress,
            )
        if eight:
            progress(f"quantising to {precision}", 0, 0)
            more: list[CacheGraph | ExportResult] = [*cached]
            more += [vision] if isinstance(vision, ExportResult) else []
            quantised = _quantise(folder, result, more, precision, spec, masks, ranges)
        if towers.vision is not None:
            _divide(folder, towers, masks)
        if cached:
            share_weights(folder, [GRAPH, *(graph.name for graph in cached)])
        files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    path = run / f"onnx/{precision}/{GRAPH}.onnx"
    graphs = {graph.name: path.with_name(f"{graph.name}.onnx") for graph in cached}
    progress(f"comparing ONNX {precision} with the model", 0, 0)
    same = compare_with_model(loaded, lambda inputs: _session(path, eight).run(inputs))
    steps = CachedGraphs(tuple(sorted(graphs)), _steps(graphs, loaded, eight)) if cached else None
    shown = None
    if isinstance(vision, ExportResult):
        graphs[VISION] = file = path.with_name(f"{VISION}.onnx")
        agreed = compare_tower(towers, loaded, lambda inputs: _session(file, eight).run(inputs))
        shown = VisionGraph(len(vision.link.by_parameter()), agreed)
    elif vision is not None:
        shown = VisionGraph(not_exported=vision)
    compiled = {name: _compiled(file, progress) for name, file in {GRAPH: path, **graphs}.items()}
    return ExportedGraph(
        result.name,
        files,
        precision,
        result.opset,
        result.inputs,
        result.outputs,
        result.dynamic,
        result.dense_bytes,
        result.seconds,
        result.warnings,
        str(path.relative_to(run.path)),
        sum(row.parameter in masks.masks for row in result.link.rows),
        same,
        quantised,
        steps,
        compiled,
        shown,
    )


def _vision(
    towers: Towers,
    loaded: LoadedModel,
    folder: Path,
    precision: str,
    spec: Export,
    progress: Progress,
) -> ExportResult | str | None:
    """Write the graph of the tower that sees pictures, or say why it cannot be traced; None where
    nothing of it is pruned."""
    if towers.vision is None:
        return None
    inputs = towers.inputs(loaded)
    try:
        return export_onnx(
            towers.vision,
            inputs,
            folder,
            VISION,
            towers.seen,
            precision=precision,
            opset=spec.opset,
            progress=progress,
        )
    except CheckFailed:
        raise
    except NmsparseError as error:
        numbers = [name for name, value in inputs.items() if value.dtype == torch.int64]
        if not numbers:
            return error.message
        return (
            f"the sizes in it follow from the values of {', '.join(numbers)}, which no graph allows"
        )


def _divide(folder: Path, towers: Towers, masks: MaskSet) -> None:
    """Write into every link map which pruned weights are not its graph's."""
    for path in folder.glob("*.link.json"):
        others = towers.own if path.name.startswith(f"{VISION}.") else towers.seen
        names = tuple(t.name for t in (*others, *towers.between) if t.name in masks.masks)
        replace(LinkMap.load(path), elsewhere=names).save(path)


def _quantise(
    folder: Path,
    result: ExportResult,
    others: Sequence[CacheGraph | ExportResult],
    precision: str,
    spec: Export,
    masks: MaskSet,
    ranges: dict[str, Range],
) -> Quantisation:
    """Rewrite every graph of the folder, and keep the links of what has a mask."""
    sparse = {
        name
        for name, mask in masks.masks.items()
        if spec.requantise and mask.pattern.implies(TWO_FOUR)
    }

    def rewrite(name: str, link: LinkMap) -> Quantisation:
        done = insert_qdq(
            folder / f"{name}.onnx", link, ranges, precision, sparse, spec.scales == "tensor"
        )
        LinkMap(
            done.link.onnx, tuple(row for row in done.link.rows if row.parameter in masks.masks)
        ).save(folder / f"{name}.link.json")
        return Quantisation(done.gemms, done.requantised, done.vanished, spec.scales)

    whole = rewrite(GRAPH, result.link)
    for graph in others:
        rewrite(graph.name, graph.link)
    return whole


@torch.no_grad()
def _steps(graphs: dict[str, Path], loaded: LoadedModel, eight: bool) -> Agreement | NotCompared:
    """Compare prefill and decode steps with one pass over the whole text."""
    try:
        sessions = {name: _session(path, eight) for name, path in graphs.items()}
        return check_steps(
            loaded.module.float(), sessions, loaded.sample_inputs(2, 16)["input_ids"]
        )
    except NmsparseError as error:
        return NotCompared(error.message)


def _session(path: Path, eight: bool) -> OnnxRuntime:
    # Beyond `basic`, ONNX Runtime moves FP8 numbers through operators that it has no FP8 kernels
    # for.
    return OnnxRuntime.build(path, {"optimization": "basic"} if eight else None)


def _compiled(path: Path, progress: Progress) -> CompileOutcome:
    """Compile a graph with TensorRT-RTX, if that is here."""
    progress(f"compiling {path.parent.name}/{path.name} with TensorRT-RTX", 0, 0)
    try:
        compiler = TensorRtRtx.build(path)
        return CompileOutcome(
            compiler.compiled.summary(),
            facts={"engine": compiler.name, **compiler.compiled.to_json()},
        )
    except MissingExtra as error:
        return CompileOutcome(not_checked=error.message, hint=error.hint)
    except CheckFailed as error:
        return CompileOutcome(refused=error.message)


def export(
    run: RunDir, spec: Export = Export(), progress: Progress = silent
) -> list[ExportedGraph]:
    """Export the run's model to ONNX in every asked precision, verify each graph, and compare it
    with the model.

    Raises `CheckFailed` when an exported graph does not hold the masks.
    """
    start = time.perf_counter()
    masks = MaskSet.load(run / "masks.safetensors")
    loaded = load_pruned(run)
    with run.lock():
        ranges: dict[str, Range] = {}
        rows = [
            export_one(run, loaded, masks, precision, spec, ranges, progress)
            for precision in spec.precisions
        ]
        run.write_json(RECORD, {"files": [row.to_json() for row in rows]})
        reports = verify(run, progress)
        bad = [report for report in reports if not report.ok]
        if bad:
            raise CheckFailed(f"An exported graph fails verification: {bad[0].summary()}")
        run.finish(
            "export",
            time.perf_counter() - start,
            spec=spec.model_dump(mode="json"),
            peak_memory_mb=peak_memory_mb(),
        )
    return rows
