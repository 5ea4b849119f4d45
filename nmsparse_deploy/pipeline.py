"""What happens to a run after pruning: verify, export, evaluate, bench, report; and all of it in order."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from nmsparse_deploy import models
from nmsparse_deploy.data.latents import LATENT_HASHES
from nmsparse_deploy.data.text import check_disjoint, evaluation_sample, load_text
from nmsparse_deploy.errors import CheckFailed, NmsparseError, UsageError
from nmsparse_deploy.find.cost import Rates, estimate
from nmsparse_deploy.find.offload import load_fitting
from nmsparse_deploy.find.plan.make_plan import Plan, make_plan
from nmsparse_deploy.find.prune import NOT_CHECKED, compute_dtype, prune
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.measure.bench import CPU_SENTENCE, BenchResult, interleave, ratio, summarise
from nmsparse_deploy.measure.evaluate import (
    continuations,
    evaluate_diffusion,
    evaluate_encoder,
    evaluate_imagenet,
    evaluate_papers,
    evaluate_vision,
    onnx_arms,
    paired_ratio,
    perplexity,
    torch_arm,
)
from nmsparse_deploy.models.base import LoadedModel
from nmsparse_deploy.models.discovery import discover, trace_inputs
from nmsparse_deploy.models.roofline import count_flops, predict
from nmsparse_deploy.models.shapes import shapes
from nmsparse_deploy.pattern import TWO_FOUR, Unstructured, parse_pattern
from nmsparse_deploy.prove import VerifyReport, verify_checkpoint, verify_onnx
from nmsparse_deploy.recipe.recipe import AUTO, DEFAULT_MODEL, Bench, Evaluate, Export, Prune, Recipe
from nmsparse_deploy.runs.load import load_dense, load_pruned
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.ship.onnx import LinkMap
from nmsparse_deploy.ship.onnx.onnxruntime import OnnxRuntime
from nmsparse_deploy.ship.onnx.stage import export_one
from nmsparse_deploy.ship.quantise import Range
from nmsparse_deploy.ship.tensorrt.stage import build
from nmsparse_deploy.ship.torch_sparse.stage import packed_models, verify_packed
from nmsparse_deploy.system.distributed import here
from nmsparse_deploy.system.environment import environment
from nmsparse_deploy.system.memory import peak_memory_mb
from nmsparse_deploy.system.progress import Progress, silent


def inspect(model: str = DEFAULT_MODEL, pattern: str = "2:4", include: Sequence[str] = (), exclude: Sequence[str] = (),
            progress: Progress = silent) -> Plan:
    """What would be pruned, and why the rest stays dense."""
    progress(f"loading {model}", 0, 0)
    loaded = load_fitting(model)
    found = discover(loaded.module, models.sample_inputs(loaded), loaded.weights)
    return make_plan(found, parse_pattern(pattern), include, exclude)


def predict_cost(model: str = DEFAULT_MODEL, spec: Prune = Prune(),  # noqa: B008
                 progress: Progress = silent) -> dict[str, Any]:
    """What pruning would take on this machine, predicted from shapes and the speed of one matrix product."""
    progress(f"loading {model}", 0, 0)
    return _cost(load_fitting(model), spec)


def price(recipe: Recipe, progress: Progress = silent) -> dict[str, Any]:
    """What the prune stage of a recipe would take, from shapes alone: no weight is read, nothing is downloaded.

    Holds `not_priced` with the reason when neither the recipe, this machine nor timm says what the model looks like.
    Raises `UsageError` when the recipe does not fit the model.
    """
    progress(f"shapes of {recipe.model}", 0, 0)
    try:
        loaded = shapes(recipe.model, recipe.config)
    except NmsparseError as error:
        return {"not_priced": error.message}
    return _cost(loaded, recipe.prune)


def _cost(loaded: LoadedModel, spec: Prune) -> dict[str, Any]:
    inputs = models.sample_inputs(loaded)
    found = discover(loaded.module, inputs, loaded.weights)
    plan = make_plan(found, parse_pattern(spec.pattern), spec.include, spec.exclude, spec.patterns)
    if loaded.family == "vision":  # a picture has as many tokens as the model makes of it
        reads = trace_inputs(loaded.module, found.blocks, inputs)
        tokens = max(reads[row.target.name].rows for row in plan.rows) // len(next(iter(inputs.values())))
        spec = spec.model_copy(update={"calibration": spec.calibration.model_copy(update={"length": tokens})})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compute = compute_dtype(spec.compute, device)
    return estimate(loaded, plan, spec, Rates.measure(compute)).to_json()


def verify(run: RunDir, progress: Progress = silent) -> list[VerifyReport]:
    """Check the run's weights, every exported graph and every packed model against its masks. Writes `verify.json`;
    does not raise."""
    masks = MaskSet.load(run / "masks.safetensors")
    reports = [verify_checkpoint(run / "model", masks, progress=progress)]
    for path in run.graphs():
        link = LinkMap.load(path.with_suffix(".link.json")).by_parameter()
        reports.append(verify_onnx(path, masks, link, progress=progress))
    reports += [verify_packed(folder, masks) for folder in packed_models(run)]
    run.write_json("verify.json", {"reports": [report.to_json() for report in reports],
                                   "not_checked": not_checked(run)})
    return reports


def not_checked(run: RunDir) -> list[dict[str, str]]:
    """Steps of the chain that were not taken; a run with engines has its evidence in `engines.json`."""
    return [] if (run / "engines.json").is_file() else list(NOT_CHECKED)


def verify_any(target: Path | None = None, pattern: str = "2:4", expect: Sequence[str] = (),
               progress: Progress = silent) -> tuple[list[VerifyReport], list[dict[str, str]]]:
    """Check a run, or a checkpoint or ONNX file that came from elsewhere; returns reports and what was not checked.

    A file without a run has no masks: its sparse tensors are reported, and `expect` names the ones that must be.
    """
    if target is None or (target / "manifest.json").is_file():
        if expect:
            raise UsageError("--expect is for files without a run; a run knows which tensors have to be sparse.")
        run = RunDir.open(target)
        return verify(run, progress), not_checked(run)
    wanted = parse_pattern(pattern)
    if isinstance(wanted, Unstructured):
        raise UsageError(f"'{target}' has no masks, and zeros alone cannot show that it is {wanted}.",
                         "verify the run that it belongs to")
    check = verify_onnx if target.suffix == ".onnx" else verify_checkpoint
    return [check(target, pattern=wanted, expect=expect, progress=progress)], []


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


def evaluate(run: RunDir, spec: Evaluate = Evaluate(), progress: Progress = silent) -> dict[str, Any]:  # noqa: B008
    """The dense and the pruned model on the same held-out samples: perplexity of a language model, continuations of a
    decoder, accuracy and agreement of a vision model, similarity and agreement of an encoder, predictions and samples
    of a diffusion model.

    Raises `NmsparseError` when the samples overlap with the calibration data.
    """
    start = time.perf_counter()
    recipe = run.manifest()["recipe"]
    pruned = load_pruned(run)
    if pruned.family == "seq2seq" and models.input_name(pruned) != "input_ids":
        raise NmsparseError(f"'{pruned.name}' reads {models.input_name(pruned)}, and no packaged data has that to "
                            "evaluate it on; its export is compared with the model.")
    _check_protocols(pruned, spec)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compute = compute_dtype(recipe["compute"], device)
    stages = {"llm": _evaluate_text, "seq2seq": _evaluate_text, "diffusion": _evaluate_diffusion}
    stage = stages.get(pruned.family, _evaluate_features)
    if pruned.family == "llm" and (spec.protocols or spec.tasks):
        stage = _evaluate_papers
    data = {**stage(run, pruned, recipe["model"], spec, device, compute, progress), **environment()}
    run.write_json("evaluate.json", data)
    run.finish("evaluate", time.perf_counter() - start, spec=spec.model_dump(mode="json"),
               peak_memory_mb=peak_memory_mb())
    return data


def _evaluate_text(run: RunDir, pruned: LoadedModel, model: str, spec: Evaluate, device: torch.device,
                   compute: torch.dtype, progress: Progress) -> dict[str, Any]:
    source = "bbc" if spec.data == AUTO else spec.data
    models.check_length(pruned, spec.context, "--context")
    progress(f"sampling {spec.tokens} tokens of {source}", 0, 0)
    sample = evaluation_sample(load_text(source), pruned.processor, spec.tokens, spec.context)
    record = _calibration_record(run)
    compared = check_disjoint(record["ids"], sample.ids) if record else None
    results, texts = {}, {}
    for label, loaded in (("pruned", pruned), ("dense", None)):
        loaded = loaded or load_dense(run)
        loaded.module.to(device, compute)
        results[label] = perplexity(loaded.module, sample, device.type, label, progress)
        if spec.continuation and loaded.family == "llm":
            progress(f"continuing prompts with the {label} model", 0, 0)
            texts[label] = continuations(loaded, spec.continuation)
        del loaded
    return {"results": {label: result.to_json() for label, result in results.items()},
            "ratio": paired_ratio(results["dense"], results["pruned"]), "continuations": texts,
            "held_out": {"runs_compared": compared, "overlaps": 0}}


def _check_protocols(pruned: LoadedModel, spec: Evaluate) -> None:
    """Protocols and tasks that this model cannot be judged by are refused before anything runs."""
    fits = {"llm": {"wikitext2", "ptb", "c4"}, "vision": {"imagenet"}}.get(pruned.family, set())
    wrong = next((name for name in spec.protocols if name not in fits), None)
    if wrong is not None:
        raise UsageError(f"The protocol '{wrong}' does not suit '{pruned.name}', which is of the family "
                         f"'{pruned.family}'.", f"one of: {', '.join(sorted(fits))}" if fits else "leave it out")
    if spec.tasks and pruned.family != "llm":
        raise UsageError(f"Zero-shot tasks are for language models, and '{pruned.name}' is of the family "
                         f"'{pruned.family}'.")
    if "imagenet" in spec.protocols and spec.data == AUTO:
        raise UsageError("The protocol 'imagenet' needs a folder of labelled images.", "--data FOLDER")


def _evaluate_papers(run: RunDir, pruned: LoadedModel, model: str, spec: Evaluate, device: torch.device,
                     compute: torch.dtype, progress: Progress) -> dict[str, Any]:
    """The papers' protocols and zero-shot tasks, one model at a time in memory."""
    def each() -> Iterator[tuple[str, LoadedModel]]:
        for label, loaded in (("pruned", pruned), ("dense", None)):
            loaded = loaded or load_dense(run)
            loaded.module.to(device, compute)
            yield label, loaded

    graphs = run.graphs(whole=True) if spec.onnx else []
    return evaluate_papers(each(), spec, _calibration_record(run).get("ids"), graphs, progress)


def _evaluate_features(run: RunDir, pruned: LoadedModel, model: str, spec: Evaluate, device: torch.device,
                       compute: torch.dtype, progress: Progress) -> dict[str, Any]:
    """Vision models and encoders: dense, pruned and, when asked, the exported graphs on the same samples."""
    dense = load_dense(run)
    for loaded in (dense, pruned):
        loaded.module.to(device, compute)
    graphs, missing = onnx_arms(pruned, run.graphs(whole=True)) if spec.onnx else ([], [])
    arms = [torch_arm("dense", dense), torch_arm("pruned", pruned), *graphs]
    record = _calibration_record(run)
    if "imagenet" in spec.protocols:
        data = evaluate_imagenet(arms, pruned, spec.data, spec.limit, record.get("image_sha256"), progress)
    elif pruned.family == "vision":
        data = evaluate_vision(arms, pruned, model, spec, record.get("image_sha256"), progress)
    else:
        data = evaluate_encoder(arms, pruned, spec.data, record.get("ids"), progress)
    return {**data, "not_checked": [*missing, *data["not_checked"]]}


def _evaluate_diffusion(run: RunDir, pruned: LoadedModel, model: str, spec: Evaluate, device: torch.device,
                        compute: torch.dtype, progress: Progress) -> dict[str, Any]:
    dense = load_dense(run)
    for loaded in (dense, pruned):
        loaded.module.to(device, compute)
    record = _calibration_record(run)
    return evaluate_diffusion(dense, pruned, spec, record.get("image_sha256", record.get(LATENT_HASHES)), progress)


def _calibration_record(run: RunDir) -> dict[str, torch.Tensor]:
    """What the run keeps of its calibration sample; empty when the method used no data."""
    path = run / "calibration.safetensors"
    return load_file(path) if path.is_file() else {}


def bench(run: RunDir, spec: Bench = Bench(), progress: Progress = silent) -> BenchResult:  # noqa: B008
    """Time dense and pruned side by side on this machine's CPU: PyTorch, and ONNX Runtime where exported."""
    start = time.perf_counter()
    pruned, dense = load_pruned(run), load_dense(run)
    inputs = models.sample_inputs(pruned, spec.batch, spec.length)
    calls = {"dense": _forward(dense.module, inputs), "pruned": _forward(pruned.module, inputs)}
    kernels = {"dense": "PyTorch CPU", "pruned": "PyTorch CPU"}
    for path in run.graphs(whole=True):
        name = f"pruned, ONNX {path.parent.name}"
        try:
            calls[name] = OnnxRuntime.build(path).bound(inputs)
        except NmsparseError:
            continue
        kernels[name] = "ONNX Runtime CPU"
    progress(f"timing {len(calls)} arms, {spec.rounds} rounds", 0, 0)
    times = interleave(calls, spec.rounds)
    arms = tuple(summarise(name, kernels[name], times[name]) for name in calls)
    # A speed-up is only ever one over a twin that runs on the same kernels.
    ratios = {name: ratio(times["dense"], times[name]) for name in calls
              if name != "dense" and kernels[name] == kernels["dense"]}
    masked = MaskSet.load(run / "masks.safetensors").masks
    found = discover(dense.module, inputs)
    targets = [t for t in found.targets if t.name in masked and masked[t.name].pattern.implies(TWO_FOUR)]
    rows = trace_inputs(dense.module, found.blocks, inputs)[targets[0].name].rows if targets else 0
    bounds = predict(targets, rows, count_flops(dense.module, inputs)) if targets else []
    result = BenchResult("cpu", {"batch": spec.batch, "length": spec.length}, arms, ratios, CPU_SENTENCE,
                         tuple(bound.to_json() for bound in bounds), environment())
    run.write_json("bench.json", result.to_json())
    run.finish("bench", time.perf_counter() - start, spec=spec.model_dump(mode="json"))
    return result


def _forward(module: nn.Module, inputs: dict[str, torch.Tensor]) -> Any:
    def call() -> None:
        with torch.inference_mode():
            module(**inputs)

    return call


def report(run: RunDir) -> Path:
    """Write the report and the model card of everything the run holds so far; returns the HTML page."""
    from nmsparse_deploy.measure.report.build import build_report
    from nmsparse_deploy.measure.report.card import write_card

    page = build_report(run)
    write_card(run)
    return page


def publish(run: RunDir, repo: str, private: bool = False, progress: Progress = silent) -> str:
    """Verify the run once more, and publish weights, card and masks to a model hub; returns the address.

    Raises `CheckFailed` when a tensor does not hold the pattern, `NmsparseError` when the hub cannot be written to.
    """
    from nmsparse_deploy.measure.report.hub import push, require_token

    require_token(repo)
    bad = [found for found in verify(run, progress) if not found.ok]
    if bad:
        raise CheckFailed(f"The run fails verification and is not published: {bad[0].summary()}")
    return push(run, repo, private, progress)


def run_recipe(recipe: Recipe, out: Path | None = None, force: bool = False, progress: Progress = silent) -> RunDir:
    """Every stage of a recipe in order; finished stages of the same run are kept. Several processes prune together, and
    the first one does the rest."""
    run = prune(recipe.model, recipe.prune, out, force, progress)
    if not here().first:  # this process has only helped another one to prune
        return run
    stages: dict[str, tuple[Any, Any]] = {"export": (export, recipe.export), "evaluate": (evaluate, recipe.evaluate),
                                          "build": (build, recipe.build), "bench": (bench, recipe.bench)}
    done = run.manifest()["stages"]
    for name, (stage, spec) in stages.items():
        if spec is not None and done.get(name, {}).get("spec") != spec.model_dump(mode="json"):
            stage(run, spec, progress)
    progress("writing the report", 0, 0)
    report(run)
    return run
