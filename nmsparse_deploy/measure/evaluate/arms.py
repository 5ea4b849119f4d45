"""The models that one evaluation compares, each with how it is run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nmsparse_deploy.errors import MissingExtra, NmsparseError
from nmsparse_deploy.measure.evaluate.features import Runner, onnx_runner, torch_runner
from nmsparse_deploy.measure.evaluate.result import NotChecked
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.models.outputs import Features
from nmsparse_deploy.ship.onnx.onnxruntime import OnnxRuntime
from nmsparse_deploy.system.progress import Progress

BATCH = 16
DENSE, PRUNED = "dense", "pruned"


@dataclass(frozen=True)
class Arm:
    """One variant. `fixed` says that it runs only the shape it was exported for."""

    label: str
    run: Runner
    where: str
    dtype: str
    fixed: bool = False

    def features(
        self,
        batches: Iterable[Mapping[str, torch.Tensor]],
        total: int,
        what: str,
        progress: Progress,
        keep_tokens: bool = False,
    ) -> Features:
        """Run all batches; tokens come back only when asked for, because they are large."""
        parts, seen = [], 0
        for batch in batches:
            progress(f"{what}, {self.label}", seen, total)
            part = self.run(batch)
            parts.append(part if keep_tokens else part._replace(tokens=None))
            seen += len(next(iter(batch.values())))
        progress(f"{what}, {self.label}", total, total)
        return Features(
            *(torch.cat(values) if values[0] is not None else None for values in zip(*parts))
        )


def torch_arm(label: str, model: LoadedModel) -> Arm:
    parameter = next(model.module.parameters())
    return Arm(
        label,
        torch_runner(model),
        parameter.device.type,
        str(parameter.dtype).removeprefix("torch."),
    )


def onnx_arms(model: LoadedModel, paths: Sequence[Path]) -> tuple[list[Arm], list[NotChecked]]:
    """Return an arm per exported graph that runs here, and why the others do not."""
    arms, missing = [], []
    for path in paths:
        try:
            session = OnnxRuntime.build(path)
        except (MissingExtra, NmsparseError) as error:
            missing.append(NotChecked(f"ONNX {path.parent.name}", error.message))
            continue
        arms.append(
            Arm(
                f"pruned, ONNX {path.parent.name}",
                onnx_runner(model, session),
                "onnxruntime",
                path.parent.name,
                fixed=model.family == "vision",
            )
        )
    return arms, missing
