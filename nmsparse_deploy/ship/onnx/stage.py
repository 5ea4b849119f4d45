"""One precision of an export: trace, quantise, add the graphs with a cache, compare, and compile where that can be."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nmsparse_deploy.errors import CheckFailed, MissingExtra, NmsparseError
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.models.outputs import primary_output
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.prove.agreement import agreement, compared
from nmsparse_deploy.recipe import Export
from nmsparse_deploy.runs.load import load_pruned
from nmsparse_deploy.runs.run_dir import GRAPH, RunDir
from nmsparse_deploy.ship.onnx import ExportResult, LinkMap, export_onnx
from nmsparse_deploy.ship.onnx.cached import CacheGraph, check_steps, export_cached
from nmsparse_deploy.ship.onnx.onnxruntime import OnnxRuntime
from nmsparse_deploy.ship.onnx.qdq import insert_qdq
from nmsparse_deploy.ship.onnx.share import share_weights
from nmsparse_deploy.ship.quantise import BASE, FORMATS, Range, activation_ranges
from nmsparse_deploy.ship.tensorrt.rtx import TensorRtRtx
from nmsparse_deploy.ship.verify_run import verify
from nmsparse_deploy.system.memory import peak_memory_mb
from nmsparse_deploy.system.progress import Progress, silent


def export_one(run: RunDir, loaded: LoadedModel, masks: MaskSet, precision: str, spec: Export,
               ranges: dict[str, Range], progress: Progress) -> dict[str, Any]:
    """Write `onnx/PRECISION/` and return its record. `ranges` is filled by the first 8-bit precision."""
    found = loaded.discover()
    eight = precision in FORMATS
    targets = [target for target in found.targets if eight or target.name in masks.masks]
    if eight and not ranges:
        ranges |= activation_ranges(run, loaded, targets, progress)
    cached: tuple[CacheGraph, ...] = ()
    with run.replacing(f"onnx/{precision}") as folder:
        folder.mkdir()
        result = export_onnx(loaded.module, loaded.sample_inputs(), folder, GRAPH, targets,
                             precision=BASE if eight else precision, opset=spec.opset, progress=progress)
        facts = {key: value for key, value in result.as_dict().items() if key != "link"}
        if loaded.family == "llm" and spec.cache:
            cached = export_cached(loaded.module, folder, targets, precision=BASE if eight else precision,
                                   opset=spec.opset, progress=progress)
        if eight:
            progress(f"quantising to {precision}", 0, 0)
            facts["quantisation"] = _quantise(folder, result, cached, precision, spec, masks, ranges)
        if cached:
            share_weights(folder, [GRAPH, *(graph.name for graph in cached)])
        facts["files"] = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    path = run / f"onnx/{precision}/{GRAPH}.onnx"
    graphs = {graph.name: path.with_name(f"{graph.name}.onnx") for graph in cached}
    progress(f"comparing ONNX {precision} with the model", 0, 0)
    row = {**facts, "precision": precision, "path": f"onnx/{precision}/{GRAPH}.onnx",
           "links": sum(linked.parameter in masks.masks for linked in result.link.rows),
           "agreement": _agreement(path, loaded, eight)}
    if cached:
        row["cached"] = {"graphs": sorted(graphs), "agreement": _steps(graphs, loaded, eight)}
    row["tensorrt_rtx"] = {name: _compiled(file, progress) for name, file in {GRAPH: path, **graphs}.items()}
    return row


def _quantise(folder: Path, result: ExportResult, cached: tuple[CacheGraph, ...], precision: str, spec: Export,
              masks: MaskSet, ranges: dict[str, Range]) -> dict[str, Any]:
    """Rewrite every graph of the folder, and keep the links of what has a mask."""
    sparse = {name for name, mask in masks.masks.items() if spec.requantise and mask.pattern.implies(TWO_FOUR)}
    told: dict[str, Any] = {}
    for name, link in ((GRAPH, result.link), *((graph.name, graph.link) for graph in cached)):
        done = insert_qdq(folder / f"{name}.onnx", link, ranges, precision, sparse, spec.scales == "tensor")
        LinkMap(done.link.onnx, tuple(row for row in done.link.rows if row.parameter in masks.masks)).save(
            folder / f"{name}.link.json")
        told = told or {"gemms": done.gemms, "requantised": done.requantised, "vanished": done.vanished,
                        "scales": spec.scales, "base": BASE}
    return told


@torch.no_grad()
def _agreement(path: Path, loaded: LoadedModel, eight: bool) -> dict[str, Any]:
    """Compare ONNX Runtime with PyTorch in fp32 on other shapes than the traced ones, or say why that is impossible."""
    inputs = loaded.sample_inputs(batch=1, length=48)
    reference = primary_output(loaded.module.float()(**inputs))
    try:
        output = next(iter(_session(path, eight).run(inputs).values()))
    except (MissingExtra, NmsparseError) as error:
        return {"not_checked": error.message}
    return asdict(agreement(reference.value, output, reference.kind))


def _steps(graphs: dict[str, Path], loaded: LoadedModel, eight: bool) -> dict[str, Any]:
    """Compare prefill and decode steps with one pass over the whole text."""
    try:
        sessions = {name: _session(path, eight) for name, path in graphs.items()}
        return asdict(check_steps(loaded.module.float(), sessions, loaded.sample_inputs(2, 16)["input_ids"]))
    except (MissingExtra, NmsparseError) as error:
        return {"not_checked": error.message}


def _session(path: Path, eight: bool) -> OnnxRuntime:
    # Beyond `basic`, ONNX Runtime moves FP8 numbers through operators that it has no FP8 kernels for.
    return OnnxRuntime.build(path, {"optimization": "basic"} if eight else None)


def _compiled(path: Path, progress: Progress) -> dict[str, Any]:
    """Return what TensorRT-RTX makes of a graph, why it refuses it, or that it is not here to ask."""
    progress(f"compiling {path.parent.name}/{path.name} with TensorRT-RTX", 0, 0)
    try:
        return TensorRtRtx.build(path).inspect()
    except MissingExtra as error:
        return {"not_checked": error.message, "hint": error.hint}
    except CheckFailed as error:
        return {"refused": error.message}


def told(row: dict[str, Any], path: str) -> list[str]:
    """Return what `export_one` recorded, as lines."""
    lines = [f"{path}: {sum(row['files'].values()) / 1e6:.0f} MB, {row['links']} weights linked and verified; "
             f"{compared(row['agreement'])}"]
    if "quantisation" in row:
        done = row["quantisation"]
        lines.append(f"  {done['gemms']} GEMMs in {row['precision']} (scales per {done['scales']}), "
                     f"{done['requantised']} with 8-bit outputs; {done['vanished']:,} small weights became 0")
    if "cached" in row:
        lines.append(f"  {' and '.join(row['cached']['graphs'])} on the same weights, prefill and steps: "
                     f"{compared(row['cached']['agreement'])}")
    compiled = row["tensorrt_rtx"]
    if all("not_checked" in found for found in compiled.values()):
        found = compiled[GRAPH]
        return [*lines, f"  not checked here: TensorRT-RTX ({found['hint']})"]
    return lines + [f"  {name}: {found.get('summary') or found.get('refused') or found.get('not_checked')}"
                    for name, found in compiled.items()]


def export(run: RunDir, spec: Export = Export(), progress: Progress = silent) -> list[dict[str, Any]]:  # noqa: B008
    """Export the run's model to ONNX in every asked precision, verify each graph, and compare it with the model.

    Raises `CheckFailed` when an exported graph does not hold the masks.
    """
    start = time.perf_counter()
    masks = MaskSet.load(run / "masks.safetensors")
    loaded = load_pruned(run)
    with run.lock():
        ranges: dict[str, Range] = {}
        rows = [export_one(run, loaded, masks, precision, spec, ranges, progress) for precision in spec.precisions]
        run.write_json("export.json", {"files": rows})
        reports = verify(run, progress)
        bad = [report for report in reports if not report.ok]
        if bad:
            raise CheckFailed(f"An exported graph fails verification: {bad[0].summary()}")
        run.finish("export", time.perf_counter() - start, spec=spec.model_dump(mode="json"),
                   peak_memory_mb=peak_memory_mb())
    return rows
