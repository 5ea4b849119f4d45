"""One view of what a model says about a batch, whether PyTorch or ONNX Runtime ran it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.models.outputs import UNNAMED, Features
from nmsparse_deploy.ship.onnx.onnxruntime import OnnxRuntime

Runner = Callable[[Mapping[str, torch.Tensor]], Features]


def torch_runner(model: LoadedModel) -> Runner:
    """Run the module as it is: its device, its dtype."""
    parameter = next(model.module.parameters())

    @torch.inference_mode()
    def run(inputs: Mapping[str, torch.Tensor]) -> Features:
        ready = {
            name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        return _features(model, inputs, *model.adapter.features(model, ready))

    return run


def onnx_runner(model: LoadedModel, session: OnnxRuntime) -> Runner:
    """Run an exported graph of `model`."""

    def run(inputs: Mapping[str, torch.Tensor]) -> Features:
        name, array = next(iter(session.run(inputs).items()))
        value = torch.from_numpy(array)
        if name == "last_hidden_state":
            return _features(model, inputs, None, value, None)
        headless = name == UNNAMED and not model.adapter.class_labels(model).outputs
        return _features(
            model, inputs, value if headless else None, None, None if headless else value
        )

    return run


def _features(
    model: LoadedModel,
    inputs: Mapping[str, torch.Tensor],
    pooled: torch.Tensor | None,
    tokens: torch.Tensor | None,
    logits: torch.Tensor | None,
) -> Features:
    if tokens is not None:
        tokens = tokens.float().cpu()
        tokens = tokens.flatten(2).transpose(1, 2) if tokens.ndim == 4 else tokens
    if pooled is None and tokens is not None:
        pooled = _pool(model, inputs, tokens)
    return Features(
        None if pooled is None else pooled.float().cpu(),
        tokens,
        None if logits is None or logits.ndim != 2 else logits.float().cpu(),
    )


def _pool(
    model: LoadedModel, inputs: Mapping[str, torch.Tensor], tokens: torch.Tensor
) -> torch.Tensor:
    if model.family == "vision":
        return tokens[:, 0] if has_class_token(model) else tokens.mean(1)
    if "attention_mask" not in inputs:
        return tokens.mean(1)
    mask = inputs["attention_mask"].cpu().unsqueeze(-1).float()
    return (tokens * mask).sum(1) / mask.sum(1).clamp(min=1)


def has_class_token(model: LoadedModel) -> bool:
    return any(
        name.rpartition(".")[2] == "cls_token" for name, _ in model.module.named_parameters()
    )
