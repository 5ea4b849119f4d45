"""Verbs that check, export, build, score and time what a run holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from nmsparse_deploy.cli.app import Run, app, output
from nmsparse_deploy.cli.gpu import bench_gpu, export_torch, use_gpu
from nmsparse_deploy.errors import CheckFailed


@app.command()
def verify(target: Annotated[Path | None, typer.Argument(
               help="run folder, checkpoint (file or folder), .onnx or .engine; left out: the newest run")] = None,
           pattern: Annotated[str, typer.Option(help="keep:group, for files without a run")] = "2:4",
           expect: Annotated[list[str], typer.Option(
               help="glob on tensors that have to be sparse, for files without a run; may be repeated")] = [],  # noqa: B006
           counters: Annotated[Path | None, typer.Option(help="CSV of Nsight Compute, for an .engine")] = None) -> None:
    """Check every tensor of a run or of any checkpoint or ONNX file; for an engine, show which kernels are sparse."""
    if target is not None and target.suffix in (".engine", ".plan"):
        _show_engine(target, counters)
        return
    from nmsparse_deploy.ship.verify_run import verify_any

    reports, missing = verify_any(target, pattern, expect, output.progress)
    failures = [failure for report in reports for failure in report.failures()]
    output.result({"ok": not failures, "reports": [r.to_json() for r in reports], "not_checked": missing},
                  [*(r.summary() for r in reports), *_sparse_set(reports),
                   *(f"not checked here: {row['place']} ({row['why']})" for row in missing)])
    if failures:
        raise CheckFailed(f"{len(failures)} checks failed; the first: {failures[0]}")


@app.command()
def export(run: Run = None,
           precision: Annotated[list[str], typer.Option(
               help="fp32, fp16, bf16, int8 or fp8; may be repeated")] = ["fp32", "fp16"],  # noqa: B006
           opset: Annotated[int, typer.Option(help="20 or 23")] = 20,
           cache: Annotated[bool, typer.Option(
               "--cache", help="language models: also prefill and decode graphs, on the same weights")] = False,
           scales: Annotated[str, typer.Option(
               help="int8 and fp8: channel, or tensor (one for all weights that read the same input)")] = "channel",
           requantise: Annotated[bool, typer.Option(help="int8 and fp8: 8-bit outputs of sparse GEMMs")] = True,
           trt: Annotated[bool, typer.Option("--trt", help="then build TensorRT engines, see build")] = False,
           torch_model: Annotated[bool, typer.Option(
               "--torch", help="instead: a PyTorch model without stored zeros; on a GPU each GEMM is timed")] = False,
           rows: Annotated[list[int], typer.Option(
               help="with --torch: batch times tokens that GEMMs are timed at; may be repeated")] = [128, 4096]  # noqa: B006
           ) -> None:
    """Export a run to ONNX, verify each graph, compare it with the model, and compile it with TensorRT-RTX if here."""
    if torch_model:
        export_torch(run, precision, rows)
        return
    from nmsparse_deploy.recipe import Export, validate
    from nmsparse_deploy.runs.run_dir import RunDir
    from nmsparse_deploy.ship.onnx.stage import export as api
    from nmsparse_deploy.ship.onnx.stage import told

    opened = RunDir.open(run)
    spec = validate(Export, {"precisions": precision, "opset": opset, "cache": cache, "scales": scales,
                             "requantise": requantise})
    files = api(opened, spec, output.progress)
    lines = [*(line for row in files for line in told(row, str(opened / row["path"]))), files[0]["size_note"]]
    if not trt:
        output.result({"run": str(opened.path), "files": files}, lines)
        return
    from nmsparse_deploy.recipe import Build
    from nmsparse_deploy.ship.tensorrt.stage import build as build_api

    for line in lines:
        output.message(line)
    low = next((name for name in precision if name != "fp32"), "fp32")
    _show_engines(build_api(opened, validate(Build, {"precision": low}), output.progress), {"files": files})


@app.command()
def build(run: Run = None,
          precision: Annotated[str, typer.Option(help="which exported graph: fp16, bf16, fp32, int8 or fp8")] = "fp16",
          batch: int = 1, length: Annotated[int, typer.Option(help="tokens per sample")] = 128,
          shape: Annotated[list[str], typer.Option(help="NAME=1x3x224x224, for other inputs; may be repeated")] = [],  # noqa: B006
          level: Annotated[int, typer.Option(help="builder optimisation level, 4 or 5")] = 4,
          timing_iterations: Annotated[int, typer.Option(help="timings per tactic, 8 or more")] = 8,
          route: Annotated[str | None, typer.Option(help="build-route knobs for a third engine, if listed")] = None,
          allow_fp32: Annotated[bool, typer.Option("--allow-fp32", help="build from a graph in fp32")] = False) -> None:
    """Build TensorRT engines with and without sparse weights, and show which layers got sparse kernels."""
    from nmsparse_deploy.recipe import Build, validate
    from nmsparse_deploy.runs.run_dir import RunDir
    from nmsparse_deploy.ship.tensorrt.stage import build as api
    from nmsparse_deploy.ship.tensorrt.stage import parse_shapes

    spec = validate(Build, {"precision": precision, "batch": batch, "length": length, "shapes": parse_shapes(shape),
                            "level": level, "timing_iterations": timing_iterations, "route": route,
                            "allow_fp32": allow_fp32})
    _show_engines(api(RunDir.open(run), spec, output.progress), {})


@app.command()
def evaluate(run: Run = None,
             data: Annotated[str, typer.Option(help="held-out text or images; auto suits the model")] = "auto",
             tokens: Annotated[int, typer.Option(help="tokens to score (language models)")] = 16384,
             context: Annotated[int, typer.Option(help="tokens per window (language models)")] = 1024,
             continuation: Annotated[int, typer.Option(help="tokens of the sample texts; 0 leaves them out")] = 40,
             images: Annotated[int, typer.Option(help="labelled test images (vision models)")] = 600,
             probe: Annotated[int, typer.Option(help="labelled images that the probes learn from")] = 1500,
             size: Annotated[int, typer.Option(help="pixels per side of the labelled images; 0 = the model's own")] = 0,
             photos: Annotated[str, typer.Option(help="images for agreement and saliency maps")] = "photos-20",
             drawn: Annotated[int, typer.Option(help="samples drawn from the same noise (diffusion models)")] = 20,
             steps: Annotated[int, typer.Option(help="denoising steps of a drawn sample")] = 50,
             guidance: Annotated[float, typer.Option(help="guidance of drawn samples; 1 = none")] = 4.0,
             features: Annotated[str, typer.Option(
                 help="vision model whose features compare drawn with real pictures")] = "",
             onnx: Annotated[bool, typer.Option("--onnx", help="also score the exported graphs")] = False,
             protocol: Annotated[list[str], typer.Option(
                 help="instead, as the papers do: wikitext2, ptb, c4, or imagenet; may be repeated. --data is then a "
                 "file or folder of the test set")] = [],  # noqa: B006
             task: Annotated[list[str], typer.Option(
                 help="instead: a zero-shot task of lm-evaluation-harness, or a YAML file; may be repeated")] = [],  # noqa: B006
             paper_context: Annotated[int, typer.Option(help="tokens per window, with --protocol")] = 2048,
             limit: Annotated[int | None, typer.Option(
                 help="only so many windows, images or documents, with --protocol and --task")] = None) -> None:
    """The dense and the pruned model on the same held-out data: perplexity, accuracy, similarity or denoising."""
    from nmsparse_deploy.measure.evaluate.stage import evaluate as api
    from nmsparse_deploy.recipe import Evaluate, validate
    from nmsparse_deploy.runs.run_dir import RunDir

    spec = validate(Evaluate, {"data": data, "tokens": tokens, "context": context, "continuation": continuation,
                               "images": images, "probe": probe, "size": size, "photos": photos, "drawn": drawn,
                               "steps": steps, "guidance": guidance, "features": features, "onnx": onnx,
                               "protocols": protocol, "tasks": task, "paper_context": paper_context, "limit": limit})
    result = api(RunDir.open(run), spec, output.progress)
    rows = [(label, row["metric"], f"{row['value']:.4g} ± {row['standard_error']:.2g}", row["samples"])
            for label, found in result["results"].items() for row in (found if isinstance(found, list) else [found])]
    share = result.get("ratio")
    lines = [f"pruned / dense: {share['ratio']:.2f} (95 % interval {share['low']:.2f} to {share['high']:.2f}) on the "
             "same samples"] if share else []
    lines += [f"{label}: {json.dumps(row)}" for label, row in result.get("timm", {}).items()]
    gap = result.get("difference")
    lines += [f"{gap['metric']}, pruned - dense: {gap['difference']:+.3f} (95 % interval {gap['low']:+.3f} to "
              f"{gap['high']:+.3f}) on the same samples"] if gap else []
    output.table(result, ("model", "metric", "value", "samples"), rows, lines)


@app.command()
def bench(run: Run = None, batch: int = 1, length: Annotated[int, typer.Option(help="tokens per sample")] = 128,
          rounds: Annotated[int, typer.Option(help="timed calls per arm")] = 10,
          device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one")] = "auto",
          precision: Annotated[str, typer.Option(help="on a GPU: fp16, bf16, int8 or fp8")] = "fp16") -> None:
    """Time the dense and the pruned model side by side on this machine; on a GPU in all arms, with kernel names."""
    from nmsparse_deploy.measure.bench.cpu import bench as api
    from nmsparse_deploy.recipe import Bench, validate
    from nmsparse_deploy.runs.run_dir import RunDir

    if use_gpu(device):
        bench_gpu(run, batch, length, rounds, precision)
        return

    result = api(RunDir.open(run), validate(Bench, {"batch": batch, "length": length, "rounds": rounds}),
                 output.progress)
    rows = []
    for arm in result.arms:
        speed = result.ratios.get(arm.name)
        none = "1" if arm.name == "dense" else "no dense twin on these kernels"
        shown = f"{speed['speedup']:.2f} ({speed['low']:.2f} to {speed['high']:.2f})" if speed else none
        rows.append((arm.name, arm.kernel, f"{arm.median_ms:.1f}", f"{arm.p10_ms:.1f} to {arm.p90_ms:.1f}", shown))
    bounds = [f"predicted upper bound, {p['gpu']}, {p['rows']} rows: GEMMs {p['gemm_speedup']:.2f}x, model "
              f"{p['model_speedup']:.2f}x ({p['flop_share']:.0%} of FLOPs in pruned GEMMs)" for p in result.predicted]
    output.table(result.to_json(), ("arm", "kernels", "median ms", "p10 to p90", "speed-up over dense"), rows,
                 [result.verdict, *bounds])


def _show_engines(rows: list[dict[str, Any]], more: dict[str, Any]) -> None:
    lines = [f"{row['path']}: {row['bytes'] / 1e6:.0f} MB, built in {row['seconds']:.0f} s. "
             f"{row['evidence']['verdict']}" for row in rows]
    output.result({**more, "engines": rows}, lines)


def _show_engine(engine: Path, counters: Path | None) -> None:
    from nmsparse_deploy.ship.tensorrt.stage import verify_engine

    found = verify_engine(engine, counters, output.progress)
    rows = [(layer.name, f"{layer.k}x{layer.n}", layer.dtype, layer.level or "none", layer.reason or "",
             layer.why_not) for layer in found.layers]
    output.table(found.to_json(), ("weight", "K x N", "type", "evidence", "stopped because", ""), rows, [found.verdict])
    if found.problems:
        raise CheckFailed(found.problems[0])


def _sparse_set(reports: list[Any]) -> list[str]:
    """What a foreign file turned out to hold; a run's own tensors are known."""
    checks = [check for report in reports for check in report.checks if check.parameter is None and not check.skipped]
    return [f"  {check.tensor}: {check.pattern} along axis {check.axis}, {check.groups:,} groups" for check in checks]
