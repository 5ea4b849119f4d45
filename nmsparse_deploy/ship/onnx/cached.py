"""A decoder as two graphs with a key/value cache: `prefill` reads a text, `decode` adds one token
to it.

    prefill   input_ids, attention_mask, position_ids [batch, sequence]  ->  logits, present.L.key, present.L.value
    decode    the same with one token, and past_key_values.L.key/value [batch, heads, past, width]  ->  the same

The mask of a decode step covers past and new tokens. Positions are inputs where the model takes
them. All graphs of a folder keep their weights in one file (`share_weights`), so a cache costs no
second copy.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import nn

from nmsparse_deploy.models.base import Target
from nmsparse_deploy.prove.agreement import Agreement, agreement
from nmsparse_deploy.ship.onnx.link import LinkMap
from nmsparse_deploy.ship.onnx.prepare import PRECISIONS, cast_copy
from nmsparse_deploy.ship.onnx.tidy import TensorSpec, tensor_specs
from nmsparse_deploy.ship.onnx.trace import write_graph
from nmsparse_deploy.system.progress import Progress, silent

PREFILL, DECODE = "prefill", "decode"
BATCH, LENGTH = 2, 8
"""Of the traced sample. A length of one would be taken for a constant."""


@dataclass(frozen=True)
class CacheGraph:
    """One of the two graphs."""

    name: str
    link: LinkMap
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def export_cached(
    module: nn.Module,
    folder: Path,
    targets: Sequence[Target],
    *,
    precision: str = "fp32",
    opset: int = 20,
    progress: Progress = silent,
) -> tuple[CacheGraph, CacheGraph]:
    """Write `prefill.onnx` and `decode.onnx`, each with its data and its link map, into `folder`.

    The caller's module is left as it is. Raises like `export_onnx`.
    """
    dtype = PRECISIONS[precision]
    made = []
    for name in (PREFILL, DECODE):
        copied, _ = cast_copy(module, dtype)
        sample = tokens(copied, BATCH, LENGTH)
        past = _cache_of(copied, sample) if name == DECODE else {}
        if name == DECODE:
            sample = step(copied, sample["input_ids"][:, :1], LENGTH)
        outputs = take_cache(copied, list(sample), len(past) // 2)
        model, linked, _ = write_graph(
            copied,
            {**sample, **past},
            _shapes(sample, past),
            outputs,
            folder,
            name,
            targets,
            opset,
            _telling(progress, f"exporting {name} {precision}"),
        )
        made.append(
            CacheGraph(
                name, linked, tensor_specs(model.graph.input), tensor_specs(model.graph.output)
            )
        )
    return made[0], made[1]


def _telling(progress: Progress, what: str) -> Callable[[str, int], None]:
    return lambda text, done: progress(f"{what}: {text}", done, 4)


def _takes(module: nn.Module, name: str) -> bool:
    return name in inspect.signature(type(module).forward).parameters


def _inputs(module: nn.Module, ids: torch.Tensor, past: int) -> dict[str, torch.Tensor]:
    """Return ids, a mask over everything up to them, and their positions."""
    batch, length = ids.shape
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones(batch, past + length, dtype=torch.int64),
    }
    if _takes(module, "position_ids"):
        given["position_ids"] = torch.arange(past, past + length).expand(batch, -1).contiguous()
    return given


def tokens(module: nn.Module, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Return inputs of a prefill over made-up ids."""
    config: Any = module.config
    ids = torch.arange(batch * length).view(batch, length) % config.get_text_config().vocab_size
    return _inputs(module, ids, 0)


def step(module: nn.Module, ids: torch.Tensor, past: int) -> dict[str, torch.Tensor]:
    """Return inputs of a decode step over `ids` `[batch, 1]`, but for the cache."""
    return _inputs(module, ids, past)


def take_cache(module: nn.Module, names: Sequence[str], layers: int) -> list[str]:
    """Make `module` take its inputs and the cache by position and return logits and cache; the list
    gets their names.

    The forward of this one instance is replaced, so that names in the graph stay those of the
    model.
    """
    from transformers import DynamicCache

    original = type(module).forward
    outputs: list[str] = []

    def forward(self: nn.Module, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cache, past = DynamicCache(), tensors[len(names) :]
        for layer in range(layers):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        result = original(self, **dict(zip(names, tensors)), past_key_values=cache, use_cache=True)
        present = _flat(result.past_key_values, "present")
        outputs[:] = ["logits", *present]
        return (result.logits, *present.values())

    module.forward = MethodType(forward, module)
    return outputs


def _flat(cache: Any, prefix: str) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}.{number}.{kind}": tensor
        for number, layer in enumerate(cache.layers)
        for kind, tensor in (("key", layer.keys), ("value", layer.values))
    }


@torch.no_grad()
def _cache_of(module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return _flat(module(**inputs, use_cache=True).past_key_values, "past_key_values")


def _shapes(
    sample: Mapping[str, torch.Tensor], past: Mapping[str, torch.Tensor]
) -> tuple[dict[int, Any], ...]:
    """Tell which axes vary: the batch, and the sequence of a prefill or the past of a step."""
    batch = torch.export.Dim("batch")
    if not past:
        sequence = torch.export.Dim("sequence")
        return tuple({0: batch, 1: sequence} for _ in sample)
    before = torch.export.Dim("past")
    axes = {"attention_mask": {0: batch, 1: before + 1}}
    return (
        *(axes.get(name, {0: batch}) for name in sample),
        *({0: batch, 2: before} for _ in past),
    )


@torch.no_grad()
def check_steps(
    module: nn.Module, sessions: Mapping[str, Any], ids: torch.Tensor, steps: int = 4
) -> Agreement:
    """Compare a prefill and `steps` decode steps with one pass of `module` over all of `ids`
    `[batch, length]`."""
    reference = module(input_ids=ids).logits
    start = ids.shape[1] - steps
    given = _inputs(module, ids[:, :start], 0)
    out = sessions[PREFILL].run(given)
    logits = [out["logits"]]
    for position in range(start, ids.shape[1]):
        past = {
            f"past_key_values.{name.removeprefix('present.')}": value
            for name, value in out.items()
            if name != "logits"
        }
        out = sessions[DECODE].run(
            {**step(module, ids[:, position : position + 1], position), **past}
        )
        logits.append(out["logits"])
    return agreement(reference, np.concatenate(logits, 1), "logits")
