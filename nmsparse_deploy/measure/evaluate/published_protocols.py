"""A language model judged as the papers do: perplexity under their protocols and zero-shot
tasks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from nmsparse_deploy.data.text import TokenSample, check_disjoint
from nmsparse_deploy.errors import MissingExtra, NmsparseError
from nmsparse_deploy.measure.evaluate.arms import DENSE, PRUNED
from nmsparse_deploy.measure.evaluate.harness import engine_lm, torch_lm, zero_shot
from nmsparse_deploy.measure.evaluate.perplexity import paired_ratio
from nmsparse_deploy.measure.evaluate.protocols import (
    PROTOCOLS,
    protocol_perplexity,
    protocol_sample,
)
from nmsparse_deploy.measure.evaluate.result import Evaluation, NotChecked, Results
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.recipe import Evaluate
from nmsparse_deploy.ship.onnx.onnxruntime import OnnxRuntime
from nmsparse_deploy.system.progress import Progress, silent


def evaluate_published(
    models: Iterable[tuple[str, LoadedModel]],
    spec: Evaluate,
    calibration: torch.Tensor | None,
    graphs: Sequence[Path],
    progress: Progress = silent,
) -> Evaluation:
    """Judge `models`, which are labelled `pruned` and `dense`, one at a time in memory.

    `calibration` are the token ids of the run's windows. Raises `NmsparseError` when a test set
    shares text with them.
    """
    results: Results = {}
    samples: dict[str, TokenSample] = {}
    compared = None if calibration is None else 0
    missing: list[NotChecked] = []
    if spec.tasks and calibration is not None:
        missing.append(
            NotChecked(
                "zero-shot tasks", "their documents were not compared with what was calibrated on"
            )
        )
    for label, model in models:
        if not samples:
            samples = _samples(model, spec, progress)
            if calibration is not None:
                compared = sum(
                    check_disjoint(calibration, sample.ids) for sample in samples.values()
                )
        parameter = next(model.module.parameters())
        where, dtype = parameter.device.type, str(parameter.dtype).removeprefix("torch.")
        results[label] = [
            protocol_perplexity(model, PROTOCOLS[name], sample, where, label, spec.limit, progress)
            for name, sample in samples.items()
        ]
        if spec.tasks:
            progress(f"zero-shot tasks, {label}", 0, 0)
            results[label] += zero_shot(torch_lm(model), spec.tasks, spec.limit, where, dtype)
        if spec.tasks and spec.onnx and label == PRUNED:
            of_graphs, absent = _engines(model, graphs, spec, progress)
            results, missing = results | of_graphs, missing + absent
    order = [DENSE, PRUNED, *(label for label in results if label not in (DENSE, PRUNED))]
    ratio = paired_ratio(results[DENSE][0], results[PRUNED][0]) if samples else None
    return Evaluation(
        {label: results[label] for label in order},
        {"runs_compared": compared, "overlaps": 0},
        ratio,
        not_checked=missing,
    )


def _samples(model: LoadedModel, spec: Evaluate, progress: Progress) -> dict[str, TokenSample]:
    if spec.protocols:
        model.check_length(spec.paper_context, "--paper-context")
    samples: dict[str, TokenSample] = {}
    for name in spec.protocols:
        progress(f"reading the test set of {name}", 0, 0)
        samples[name] = protocol_sample(
            PROTOCOLS[name], spec.data, model.processor, spec.paper_context, spec.limit
        )
    return samples


def _engines(
    model: LoadedModel, graphs: Sequence[Path], spec: Evaluate, progress: Progress
) -> tuple[Results, list[NotChecked]]:
    """Run the tasks on every exported graph that runs here; returns why the others do not."""
    results: Results = {}
    missing: list[NotChecked] = []
    for path in graphs:
        label = f"{PRUNED}, ONNX {path.parent.name}"
        try:
            session = OnnxRuntime.build(path)
        except (MissingExtra, NmsparseError) as error:
            missing.append(NotChecked(label, error.message))
            continue
        progress(f"zero-shot tasks, {label}", 0, 0)
        results[label] = zero_shot(
            engine_lm(model, session), spec.tasks, spec.limit, "onnxruntime", path.parent.name
        )
    return results, missing
