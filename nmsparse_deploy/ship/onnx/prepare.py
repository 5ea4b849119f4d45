"""A copy of the module that is ready to trace: cast, in evaluation mode, tensors in, one tensor
out."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.models.outputs import primary_output

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def cast_copy(module: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, list[str]]:
    """Return a copy on the CPU with all floating-point parameters in `dtype`, and warnings about
    what the cast lost.

    Only what has to change is copied: a tensor that has the right type already is shared with
    `module`. Buffers that are not part of the state dict are tables computed at load time (rotary
    frequencies); libraries keep them in full precision whatever the model's type, and so does the
    copy, unless the cast loses nothing (masks, zero biases). Raises `NmsparseError` when a mask is
    still a parametrization, or a weight does not fit `dtype`.
    """
    for path, child in module.named_modules():
        if parametrize.is_parametrized(child):
            names = ", ".join(getattr(child, "parametrizations", {}))
            raise NmsparseError(
                f"'{path}' still computes its '{names}' through a parametrization, so the exported "
                "weight would be dense.",
                "bake the mask into the weight before the export",
            )
    lost: dict[str, int] = {}
    memo: dict[int, Any] = {}
    for name, parameter in module.named_parameters():
        value = _cast(name, parameter.detach(), dtype, lost)
        shared = value.data_ptr() == parameter.data_ptr()
        memo[id(parameter)] = parameter if shared else nn.Parameter(value, requires_grad=False)
    kept = set(module.state_dict(keep_vars=True))
    for name, buffer in module.named_buffers():
        memo[id(buffer)] = (
            _cast(name, buffer, dtype, lost) if name in kept else _table(buffer.cpu(), dtype)
        )
    warnings = []
    if lost:
        worst = max(lost, key=lambda name: lost[name])
        warnings.append(
            f"{sum(lost.values()):,} values of {len(lost)} tensors are too small for "
            f"{str(dtype)[6:]} and became 0, most of them in '{worst}'."
        )
    return copy.deepcopy(module, memo).eval(), warnings


def _table(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    cast = value.to(dtype) if value.is_floating_point() else value
    return cast if torch.equal(cast.to(value.dtype), value) else value


def _cast(name: str, value: torch.Tensor, dtype: torch.dtype, lost: dict[str, int]) -> torch.Tensor:
    value = value.cpu()
    if not value.is_floating_point() or value.dtype == dtype or not value.numel():
        return value
    low, high = (float(v) for v in torch.aminmax(value))
    max_value = torch.finfo(dtype).max
    if not (-max_value <= low and high <= max_value):  # also true of NaN
        worst = low if abs(low) > abs(high) else high
        raise NmsparseError(
            f"'{name}' holds the value {worst:g}, which does not fit {str(dtype)[6:]} (at most "
            f"{max_value:g}).",
            "export with --precision bf16 or fp32",
        )
    # A tiny negative weight becomes -0.0, which a byte-wise check does not take for a zero; adding
    # 0.0 makes it +0.0.
    cast = value.to(dtype).add_(0.0)
    zeros = int(torch.count_nonzero(value) - torch.count_nonzero(cast))
    if zeros:
        lost[name] = zeros
    return cast


def take_one_output(module: nn.Module, names: Sequence[str], output: str | None) -> list[str]:
    """Make `module` take its inputs by position and return one tensor; the list gets that tensor's
    name when it runs.

    The forward of this one instance is replaced instead of wrapping it, because a wrapper would put
    its own name in front of every module and parameter name of the graph.
    """
    original = type(module).forward
    fixed = {"use_cache": False} if "use_cache" in inspect.signature(original).parameters else {}
    taken: list[str] = []

    def forward(self: nn.Module, *tensors: torch.Tensor) -> torch.Tensor:
        result = original(self, **dict(zip(names, tensors)), **fixed)
        name, value = primary_output(result, output)
        taken[:] = [name]
        return value

    module.forward = MethodType(forward, module)
    return taken


def trace_inputs(
    inputs: Mapping[str, torch.Tensor], dtype: torch.dtype, dynamic: bool
) -> dict[str, torch.Tensor]:
    """Return the sample as the tracer wants it: floats in `dtype`, and no axis of length 1 that is
    meant to vary.

    Tracing treats a length of 1 as a constant, so a batch of one is doubled.
    """
    if not inputs:
        raise UsageError("An export needs at least one sample input.")
    ready = {
        name: (t.to(dtype) if t.is_floating_point() else t).detach().cpu()
        for name, t in inputs.items()
    }
    if not dynamic:
        return ready
    if any(t.ndim == 2 and not t.is_floating_point() and t.shape[1] < 2 for t in ready.values()):
        raise UsageError("A dynamic sequence needs a tracing sample of at least two tokens.")
    return {
        name: torch.cat([t, t]) if t.ndim and t.shape[0] == 1 else t for name, t in ready.items()
    }


def dynamic_shapes(inputs: Mapping[str, torch.Tensor]) -> tuple[dict[int, Any], ...]:
    """Tell which axes vary: the first of everything is the batch, the second of a 2-D input of
    tokens the sequence.

    A decoder's sequence is another one than its encoder's, and so is that of the text a diffusion
    model reads.
    """
    batch, sequence, decoder, text = (
        torch.export.Dim(name) for name in ("batch", "sequence", "decoder_sequence", "text")
    )

    def axes(name: str, tensor: torch.Tensor) -> dict[int, Any]:
        if tensor.ndim == 3 and name == "encoder_hidden_states":
            return {0: batch, 1: text}
        if tensor.ndim == 2 and not tensor.is_floating_point():  # others hold one vector a sample
            return {0: batch, 1: decoder if name.startswith("decoder_") else sequence}
        return {0: batch} if tensor.ndim else {}

    return tuple(axes(name, tensor) for name, tensor in inputs.items())
