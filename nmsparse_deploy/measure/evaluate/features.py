"""One view of what a model says about a batch, whether PyTorch or ONNX Runtime ran it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.ship.onnx.onnxruntime import OnnxRuntime


@dataclass(frozen=True)
class Features:
    """fp32 on the CPU, one row a sample; None for what the model or the graph does not return.

    `pooled` [samples, width] is the class token of a vision model that has one, the mean of its tokens otherwise, and
    the mean over a sequence's own tokens for text.
    """

    pooled: torch.Tensor | None
    tokens: torch.Tensor | None
    logits: torch.Tensor | None


Runner = Callable[[Mapping[str, torch.Tensor]], Features]


def torch_runner(model: LoadedModel) -> Runner:
    """Run the module as it is: its device, its dtype."""
    call = _timm_outputs if model.library == "timm" else _transformers_outputs
    parameter = next(model.module.parameters())

    @torch.inference_mode()
    def run(inputs: Mapping[str, torch.Tensor]) -> Features:
        ready = {name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
                 for name, value in inputs.items()}
        tokens, pooled, logits = call(model.module, ready)
        return _features(model, inputs, tokens, pooled, logits)

    return run


def onnx_runner(model: LoadedModel, session: OnnxRuntime) -> Runner:
    """Run an exported graph of `model`."""
    def run(inputs: Mapping[str, torch.Tensor]) -> Features:
        name, array = next(iter(session.run(inputs).items()))
        value = torch.from_numpy(array)
        headless = model.library == "timm" and not getattr(model.module, "num_classes", 0)
        if name == "last_hidden_state":
            return _features(model, inputs, value, None, None)
        return _features(model, inputs, None, value if headless else None, None if headless else value)

    return run


def _transformers_outputs(module: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[Any, Any, Any]:
    """Tokens of the backbone and, where there is a head, logits; one forward pass."""
    seen: list[Any] = []
    backbone = getattr(module, getattr(module, "base_model_prefix", "") or "-", module)
    handle = backbone.register_forward_hook(lambda _m, _args, output: seen.append(output))
    try:
        output = module(**inputs)
    finally:
        handle.remove()
    return seen[0].last_hidden_state, None, getattr(output, "logits", None)


def _timm_outputs(module: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[Any, Any, Any]:
    features = module.forward_features(*inputs.values())
    tokens = features
    if features.ndim == 4 and features.shape[1] != module.num_features:  # channels last
        tokens = features.permute(0, 3, 1, 2)
    logits = module.forward_head(features) if module.num_classes else None
    return tokens, module.forward_head(features, pre_logits=True), logits


def _features(model: LoadedModel, inputs: Mapping[str, torch.Tensor], tokens: torch.Tensor | None,
              pooled: torch.Tensor | None, logits: torch.Tensor | None) -> Features:
    if tokens is not None:
        tokens = tokens.float().cpu()
        tokens = tokens.flatten(2).transpose(1, 2) if tokens.ndim == 4 else tokens
    if pooled is None and tokens is not None:
        pooled = _pool(model, inputs, tokens)
    return Features(None if pooled is None else pooled.float().cpu(), tokens,
                    None if logits is None or logits.ndim != 2 else logits.float().cpu())


def _pool(model: LoadedModel, inputs: Mapping[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    if model.family == "vision":
        return tokens[:, 0] if has_class_token(model) else tokens.mean(1)
    mask = inputs["attention_mask"].cpu().unsqueeze(-1).float()
    return (tokens * mask).sum(1) / mask.sum(1).clamp(min=1)


def has_class_token(model: LoadedModel) -> bool:
    return any(name.rpartition(".")[2] == "cls_token" for name, _ in model.module.named_parameters())


def collect(run: Runner, batches: Iterable[Mapping[str, torch.Tensor]], keep_tokens: bool,
            done: Callable[[int], None] = lambda count: None) -> Features:
    """All batches in one; tokens only when asked for, because they are large."""
    parts: list[Features] = []
    for batch in batches:
        found = run(batch)
        parts.append(found if keep_tokens else Features(found.pooled, None, found.logits))
        done(len(next(iter(batch.values()))))

    def joined(name: str) -> torch.Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    return Features(joined("pooled"), joined("tokens"), joined("logits"))
