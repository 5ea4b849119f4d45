"""Zero-shot tasks of lm-evaluation-harness, on a model in memory or on an exported graph."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nmsparse_deploy.errors import MissingExtra, NmsparseError, UsageError
from nmsparse_deploy.measure.evaluate.result import EvalResult
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.ship.onnx.onnxruntime import OnnxRuntime

UNKNOWN = 2048
"""Tokens at once for a model whose config does not say."""
BOOTSTRAP = 200
"""Resamples behind the standard error of what is no mean; means have theirs in closed form."""


def torch_lm(model: LoadedModel, batch: int = 8) -> Any:
    """Put the model in memory behind the harness's own wrapper. Raises `MissingExtra` without the
    harness."""
    _require()
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=model.module,
        tokenizer=model.processor,
        batch_size=batch,
        max_length=model.adapter.max_length(model) or UNKNOWN,
        device=next(model.module.parameters()).device.type,
    )


def engine_lm(model: LoadedModel, session: OnnxRuntime) -> Any:
    """Put an exported graph of `model` behind the same interface."""
    _require()
    from nmsparse_deploy.measure.evaluate.engine_lm import EngineLM

    def run(ids: Any) -> Any:
        return next(iter(session.run({"input_ids": torch.from_numpy(ids)}).values()))

    return EngineLM(run, model.processor, model.adapter.max_length(model) or UNKNOWN)


def zero_shot(
    lm: Any, tasks: Sequence[str], limit: int | None, where: str, dtype: str
) -> list[EvalResult]:
    """Measure every metric of every task. A task is a name that the harness knows, or a YAML file
    that describes one.

    `limit` takes only the first so many documents of a task; the metric's name then says so. Raises
    `UsageError` for an unknown task, `NmsparseError` when a task's data cannot be had.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    for file in files:
        if not file.is_file():
            raise UsageError(f"There is no task file '{file}'.")
    names = [_name(Path(task)) if Path(task) in files else task for task in tasks]
    # Reading the harness's own thousands of descriptions takes seconds, so it is done only for a
    # name.
    manager = TaskManager(
        include_path=sorted({str(file.parent) for file in files}) or None,
        include_defaults=len(files) < len(tasks),
    )
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise UsageError(f"lm-evaluation-harness has no task '{unknown[0]}'.", "lm-eval ls tasks")
    os.environ.setdefault(
        "DISABLE_MULTIPROC", "1"
    )  # its bootstrap would fork a process with a model in it
    try:
        with redirect_stdout(sys.stderr):  # the harness prints where only results belong
            scores = simple_evaluate(
                lm,
                tasks=names,
                limit=limit,
                bootstrap_iters=BOOTSTRAP,
                log_samples=False,
                task_manager=manager,
            )
    except Exception as error:
        raise _explain(error, names) from error
    return [
        row for name in scores["results"] for row in _results(scores, name, limit, where, dtype)
    ]


def _require() -> None:
    try:
        from lm_eval import simple_evaluate  # noqa: F401
    except ImportError as error:  # the harness, or something that it needs
        raise MissingExtra(
            (error.name or "lm_eval").replace("_", "-"), "eval", "A zero-shot task"
        ) from error


def _name(file: Path) -> str:
    import yaml

    try:
        data = yaml.load(
            file.read_text(), yaml.BaseLoader
        )  # tags name functions; only the harness resolves them
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"'{file}' is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(data, dict) or not isinstance(data.get("task"), str):
        raise UsageError(f"'{file}' describes no task: it has no name under 'task'.")
    return data["task"]


def _explain(error: Exception, names: Sequence[str]) -> NmsparseError:
    text = f"{type(error).__name__} {error}"
    line = next(
        (line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()),
        type(error).__name__,
    )
    if any(
        word in text
        for word in (
            "Offline",
            "offline",
            "Connection",
            "Couldn't reach",
            "LocalEntryNotFound",
            "ConnectError",
            "hub",
        )
    ):
        return NmsparseError(
            f"The data of a task among {', '.join(names)} are not on this machine and cannot be "
            f"reached: {line[:200]}.",
            "run it once with a connection; the data are kept",
        )
    return NmsparseError(f"A task among {', '.join(names)} failed: {line[:200]}.")


def _results(
    scores: dict[str, Any], name: str, limit: int | None, where: str, dtype: str
) -> list[EvalResult]:
    """Read `METRIC,FILTER` beside `METRIC_stderr,FILTER`, as the harness writes them."""
    rows, samples = [], scores.get("n-samples", {}).get(name, {}).get("effective", 0)
    protocol = {
        "harness": version("lm-eval"),
        "task_version": scores.get("versions", {}).get(name),
        "shots": scores.get("n-shot", {}).get(name),
        "limit": limit,
        "dtype": dtype,
    }
    for key, value in scores["results"][name].items():
        metric, _, picked = key.partition(",")
        if not picked or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = scores["results"][name].get(f"{metric}_stderr,{picked}")
        spread = float(error) if isinstance(error, (int, float)) and math.isfinite(error) else 0.0
        first = f"-first{limit}" if limit else ""
        rows.append(
            EvalResult(
                f"{metric}@{name}{first}",
                float(value),
                spread,
                int(samples),
                where,
                {**protocol, "filter": picked},
            )
        )
    return rows
