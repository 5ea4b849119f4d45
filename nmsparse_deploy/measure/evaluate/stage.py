"""The evaluate stage: compare the dense and the pruned model of a run on the data that suits the family."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import load_file

from nmsparse_deploy.data.latents import LATENT_HASHES
from nmsparse_deploy.data.text import check_disjoint, evaluation_sample, load_text
from nmsparse_deploy.errors import NmsparseError, UsageError
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
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.recipe import AUTO, Evaluate
from nmsparse_deploy.runs.load import load_dense, load_pruned
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.system import hardware
from nmsparse_deploy.system.environment import environment
from nmsparse_deploy.system.memory import peak_memory_mb
from nmsparse_deploy.system.progress import Progress, silent


def evaluate(run: RunDir, spec: Evaluate = Evaluate(), progress: Progress = silent) -> dict[str, Any]:  # noqa: B008
    """The dense and the pruned model on the same held-out samples: perplexity of a language model, continuations of a
    decoder, accuracy and agreement of a vision model, similarity and agreement of an encoder, predictions and samples
    of a diffusion model.

    Raises `NmsparseError` when the samples overlap with the calibration data.
    """
    start = time.perf_counter()
    recipe = run.manifest().recipe
    pruned = load_pruned(run)
    if pruned.family == "seq2seq" and pruned.input_name != "input_ids":
        raise NmsparseError(f"'{pruned.name}' reads {pruned.input_name}, and no packaged data has that to "
                            "evaluate it on; its export is compared with the model.")
    _check_protocols(pruned, spec)
    device = hardware.device()
    compute = hardware.compute_dtype(recipe.compute, device)
    stages = {"llm": _evaluate_text, "seq2seq": _evaluate_text, "diffusion": _evaluate_diffusion}
    stage = stages.get(pruned.family, _evaluate_features)
    if pruned.family == "llm" and (spec.protocols or spec.tasks):
        stage = _evaluate_papers
    data = {**stage(run, pruned, recipe.model, spec, device, compute, progress), **environment()}
    run.write_json("evaluate.json", data)
    run.finish("evaluate", time.perf_counter() - start, spec=spec.model_dump(mode="json"),
               peak_memory_mb=peak_memory_mb())
    return data


def _evaluate_text(run: RunDir, pruned: LoadedModel, model: str, spec: Evaluate, device: torch.device,
                   compute: torch.dtype, progress: Progress) -> dict[str, Any]:
    source = "bbc" if spec.data == AUTO else spec.data
    pruned.check_length(spec.context, "--context")
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
