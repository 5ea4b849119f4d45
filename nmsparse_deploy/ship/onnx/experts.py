"""Mixtures of experts in a graph: every expert computes every token, and the router's weights
choose.

A trace cannot hold a loop over the experts that happen to be hit. Each stack of expert weights
becomes one batched product; what the router did not choose is multiplied by zero, so the outputs
are the same. It costs `E / top_k` times the arithmetic of the experts.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn


def unroll_experts(module: nn.Module) -> list[str]:
    """Replace the forward of every experts module that keeps to Transformers' interface; returns a
    warning."""
    count = 0
    for child in module.modules():
        if all(
            hasattr(child, name)
            for name in ("is_transposed", "has_gate", "num_experts", "_apply_gate")
        ):
            child.forward = MethodType(_every_token, child)
            count += 1
    return (
        [f"In {count} mixtures of experts the graph computes every expert for every token."]
        if count
        else []
    )


def _every_token(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Mix the experts: `hidden_states` `[T, hidden]`, `top_k_index` and `top_k_weights`
    `[T, k]`."""
    x = hidden_states.expand(self.num_experts, *hidden_states.shape)
    x = _times(self, "gate_up_proj" if self.has_gate else "up_proj", x)
    x = _times(self, "down_proj", self._apply_gate(x) if self.has_gate else self.act_fn(x))
    if getattr(self, "has_post_expert_norm", False):
        x = self.post_expert_norm(x)
    nothing = torch.zeros(hidden_states.shape[0], self.num_experts, dtype=x.dtype, device=x.device)
    chosen = nothing.scatter(1, top_k_index, top_k_weights.to(x.dtype))  # [T, E]
    return (x * chosen.T.unsqueeze(-1)).sum(0).to(hidden_states.dtype)


def _times(experts: Any, name: str, x: torch.Tensor) -> torch.Tensor:
    """Multiply `x` `[E, T, in]` by the stack `name`, and add its biases."""
    weight, bias = getattr(experts, name), getattr(experts, f"{name}_bias", None)
    product = torch.bmm(x, weight if experts.is_transposed else weight.transpose(1, 2))
    return product if bias is None else product + bias.unsqueeze(1)
