"""The evaluate stage: compare the dense and the pruned model of a run on the data that suits the
family."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import load_file

from nmsparse_deploy.data.latents import LATENT_HASHES
from nmsparse_deploy.data.tensor_inputs import ENDING, SAMPLE_HASHES
from nmsparse_deploy.data.text import check_disjoint, evaluation_sample, load_text, windows
from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.measure.evaluate.arms import DENSE, PRUNED, onnx_arms, torch_arm
from nmsparse_deploy.measure.evaluate.diffusion import evaluate_diffusion
from nmsparse_deploy.measure.evaluate.encoder import evaluate_encoder
from nmsparse_deploy.measure.evaluate.imagenet import evaluate_imagenet
from nmsparse_deploy.measure.evaluate.perplexity import continuations, paired_ratio, perplexity
from nmsparse_deploy.measure.evaluate.prepared import evaluate_prepared
from nmsparse_deploy.measure.evaluate.published_protocols import evaluate_published
from nmsparse_deploy.measure.evaluate.result import Continuation, EvalResult, Evaluation
from nmsparse_deploy.measure.evaluate.vision import evaluate_vision
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.recipe import AUTO, Evaluate
from nmsparse_deploy.runs.inputs import evaluation_inputs
from nmsparse_deploy.runs.load import load_dense, load_pruned
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.system import hardware
from nmsparse_deploy.system.environment import environment
from nmsparse_deploy.system.memory import peak_memory_mb
from nmsparse_deploy.system.progress import Progress, silent


@dataclass(frozen=True)
class _Job:
    """What every kind of evaluation needs. `typed` is the model as the recipe names it."""

    run: RunDir
    pruned: LoadedModel
    typed: str
    spec: Evaluate
    device: torch.device
    compute: torch.dtype
    progress: Progress

    def models(self) -> Iterator[tuple[str, LoadedModel]]:
        """Yield the pruned and then the dense model, ready to run; the caller may hold one at a
        time."""
        for label in (PRUNED, DENSE):
            loaded = self.pruned if label == PRUNED else load_dense(self.run)
            loaded.module.to(self.device, self.compute)
            yield label, loaded

    def calibration(self) -> dict[str, torch.Tensor]:
        """Return what the run keeps of its calibration sample; nothing when the method used no
        data."""
        path = self.run / "calibration.safetensors"
        return load_file(path) if path.is_file() else {}


def evaluate(
    run: RunDir, spec: Evaluate = Evaluate(), progress: Progress = silent
) -> dict[str, Any]:
    """Measure the dense and the pruned model on the same held-out samples: perplexity of a language
    model, continuations of a decoder, accuracy and agreement of a vision model, similarity and
    agreement of an encoder, predictions and samples of a diffusion model. Returns the content of
    `evaluate.json`.

    Raises `NmsparseError` when the samples overlap with the calibration data.
    """
    start, inputs = time.perf_counter(), evaluation_inputs(spec)
    recipe = run.manifest().recipe
    pruned = load_pruned(run)
    if pruned.family == "seq2seq" and pruned.input_name != "input_ids":
        raise NmsparseError(
            f"'{pruned.name}' reads {pruned.input_name}, and no packaged data has that to "
            "evaluate it on; its export is compared with the model."
        )
    _check_protocols(pruned, spec)
    device = hardware.device()
    job = _Job(
        run,
        pruned,
        recipe.model,
        spec,
        device,
        hardware.compute_dtype(recipe.compute, device),
        progress,
    )
    kinds = {
        "llm": _text,
        "seq2seq": _text,
        "diffusion": _diffusion,
        "vision": _features,
        "encoder": _features,
    }
    published = pruned.family == "llm" and (spec.protocols or spec.tasks)
    kind = _published if published else kinds.get(pruned.family, _prepared)
    data = {**kind(job).to_json(), **environment()}
    run.write_json("evaluate.json", data)
    run.finish(
        "evaluate",
        time.perf_counter() - start,
        spec=spec.model_dump(mode="json"),
        inputs=inputs,
        peak_memory_mb=peak_memory_mb(),
    )
    return data


def _text(job: _Job) -> Evaluation:
    spec = job.spec
    source = "bbc" if spec.data == AUTO else spec.data
    job.pruned.check_length(spec.context, "--context")
    job.progress(f"sampling {spec.tokens} tokens of {source}", 0, 0)
    tokenizer = job.pruned.processor
    text = load_text(source, tokenizer)
    sample = evaluation_sample(text, tokenizer, spec.tokens, spec.context)
    calibration = job.calibration()
    chats = (lambda: windows(text, tokenizer, spec.context)) if text.note else None
    compared = check_disjoint(calibration["ids"], sample.ids, chats) if calibration else None
    results: dict[str, EvalResult] = {}
    texts: dict[str, list[Continuation]] = {}
    for label, loaded in job.models():
        results[label] = perplexity(loaded.module, sample, job.device.type, label, job.progress)
        if spec.continuation and loaded.family == "llm":
            job.progress(f"continuing prompts with the {label} model", 0, 0)
            texts[label] = continuations(loaded, spec.continuation)
    return Evaluation(
        {**results},
        {"runs_compared": compared, "overlaps": 0},
        paired_ratio(results[DENSE], results[PRUNED]),
        continuations=texts,
    )


def _check_protocols(pruned: LoadedModel, spec: Evaluate) -> None:
    """Refuse protocols and tasks that this model cannot be judged by, before anything runs."""
    fits = {"llm": {"wikitext2", "ptb", "c4"}, "vision": {"imagenet"}}.get(pruned.family, set())
    wrong = next((name for name in spec.protocols if name not in fits), None)
    if wrong is not None:
        raise UsageError(
            f"The protocol '{wrong}' does not suit '{pruned.name}', which is of the family "
            f"'{pruned.family}'.",
            f"one of: {', '.join(sorted(fits))}" if fits else "leave it out",
        )
    if spec.tasks and pruned.family != "llm":
        raise UsageError(
            f"Zero-shot tasks are for language models, and '{pruned.name}' is of the family "
            f"'{pruned.family}'."
        )
    if "imagenet" in spec.protocols and spec.data == AUTO:
        raise UsageError(
            "The protocol 'imagenet' needs a folder of labelled images.", "--data FOLDER"
        )


def _published(job: _Job) -> Evaluation:
    graphs = job.run.graphs(whole=True) if job.spec.onnx else []
    return evaluate_published(
        job.models(), job.spec, job.calibration().get("ids"), graphs, job.progress
    )


def _features(job: _Job) -> Evaluation:
    """Compare dense, pruned and, when asked, the exported graphs of a vision model or an
    encoder."""
    both, spec = dict(job.models()), job.spec
    graphs, missing = onnx_arms(job.pruned, job.run.graphs(whole=True)) if spec.onnx else ([], [])
    arms = [*(torch_arm(label, both[label]) for label in (DENSE, PRUNED)), *graphs]
    images, ids = (job.calibration().get(key) for key in ("image_sha256", "ids"))
    if "imagenet" in spec.protocols:
        data = evaluate_imagenet(arms, job.pruned, spec.data, spec.limit, images, job.progress)
    elif job.pruned.family == "vision":
        data = evaluate_vision(arms, job.pruned, job.typed, spec, images, job.progress)
    else:
        data = evaluate_encoder(arms, job.pruned, spec.data, ids, job.progress)
    return replace(data, not_checked=[*missing, *data.not_checked])


def _prepared(job: _Job) -> Evaluation:
    if not job.spec.data.endswith(ENDING):
        raise UsageError(
            f"No packaged data suits '{job.pruned.name}', which is of the family '{job.pruned.family}'.",
            f"give inputs of its forward pass: --data FILE{ENDING}",
        )
    both = dict(job.models())
    arms = [torch_arm(label, both[label]) for label in (DENSE, PRUNED)]
    return evaluate_prepared(
        arms, job.spec.data, job.calibration().get(SAMPLE_HASHES), job.progress
    )


def _diffusion(job: _Job) -> Evaluation:
    both, calibration = dict(job.models()), job.calibration()
    return evaluate_diffusion(
        both[DENSE],
        both[PRUNED],
        job.spec,
        calibration.get("image_sha256", calibration.get(LATENT_HASHES)),
        job.progress,
    )
