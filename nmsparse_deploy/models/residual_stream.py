"""Where the residual stream of a transformer block stands alone, found by watching the block run.

The *middle* is the last module without a GEMM that ran after some GEMM, takes hidden states of the
block's width, and whose output is what another GEMM reads: the norm before the MLP (or, in a block
that norms afterwards, the one after attention). Its input is the residual stream between the two. A
block whose attention and MLP read the same input runs them side by side and has no middle. The
other place is the block's exit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from nmsparse_deploy.models.capture import OnInput, capture
from nmsparse_deploy.models.input_trace import group_axis

Run = Callable[[nn.Module], torch.Tensor]
"""Calls a block on one batch of hidden states and returns what leaves it."""
EXIT = ""
"""The name of the place behind the last module."""


@torch.no_grad()
def find_middle(block: nn.Module, run: Run, entrance: torch.Tensor) -> str | None:
    """Return the path of the module at whose entrance the first half ends, or None.

    `entrance` is the tensor that `run` feeds.
    """
    gemms: list[str] = []
    writers: dict[int, str] = {}
    alive: list[torch.Tensor] = []  # a freed tensor's address could be used again
    candidates: list[str] = []

    def multiplies(path: str, args: tuple[Any, ...], _named: Mapping[str, Any]) -> None:
        writer = writers.get(args[0].data_ptr())
        if writer is not None and gemms:
            candidates.append(writer)
        gemms.append(path)

    def passes(path: str, args: tuple[Any, ...], output: object) -> None:
        if not gemms or not isinstance(output, torch.Tensor) or not args:
            return
        same = args[0].shape[-1] == entrance.shape[-1] and output.shape == args[0].shape
        if same and args[0].data_ptr() != entrance.data_ptr():
            writers[output.data_ptr()] = path
            alive.append(output)

    leaves = {
        path: group_axis(child)
        for path, child in block.named_modules()
        if path and not list(child.children())
    }
    with capture(
        block,
        {path: partial(multiplies, path) for path, axis in leaves.items() if axis is not None},
        {path: partial(passes, path) for path, axis in leaves.items() if axis is None},
    ):
        run(block)
    return candidates[-1] if candidates else None


@torch.no_grad()
def parameters_before(block: nn.Module, run: Run, middle: str) -> set[str]:
    """Return the names of the parameters that modules use which have run before `middle` starts."""
    used: set[int] = set()
    reached: list[str] = []

    def record(module: nn.Module, _args: tuple[Any, ...], _named: Mapping[str, Any]) -> None:
        used.update(id(value) for value in module.parameters(recurse=False))

    inputs: dict[str, OnInput] = {
        path: partial(record, module) for path, module in block.named_modules()
    }
    inputs[middle] = lambda _args, _named: reached.append(middle)
    with capture(block, inputs, stop=lambda: bool(reached)):
        run(block)
    return {name for name, value in block.named_parameters() if id(value) in used}


@torch.no_grad()
def residual_writers(block: nn.Module, run: Run, entrance: torch.Tensor) -> dict[str, str]:
    """Find the layers whose output is added to the residual stream just as it is, and the place
    where the sum then stands.

    The place is the middle or `EXIT`. Each candidate is asked: when its output is moved, does the
    place move by exactly as much? (It does not behind a layer scale, a norm or a gate.)
    """
    middle = find_middle(block, run, entrance)
    width, size = entrance.shape[-1], entrance.numel()
    outputs: dict[str, torch.Tensor] = {}
    order: list[str] = []
    moved: dict[str, torch.Tensor] = {}
    place: dict[str, torch.Tensor] = {}

    def writes(path: str, _args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        outputs[path] = output
        order.append(path)
        return output + moved[path] if path in moved else None

    def arrives(args: tuple[Any, ...], _named: Mapping[str, Any]) -> None:
        place[EXIT if middle is None else middle] = args[0]
        order.append(EXIT)

    layers = [
        path for path, child in block.named_modules() if path and group_axis(child) is not None
    ]
    with capture(
        block,
        {} if middle is None else {middle: arrives},
        {path: partial(writes, path) for path in layers},
    ):
        place[EXIT] = run(block)
        still, sequence, shapes = (
            dict(place),
            list(order),
            {name: out.shape for name, out in outputs.items()},
        )
        writers = {}
        for name in (
            name for name, shape in shapes.items() if shape[-1] == width and shape.numel() == size
        ):
            early = middle is not None and sequence.index(name) < sequence.index(EXIT)
            where = middle if early and middle is not None else EXIT
            noise = torch.randn(shapes[name], generator=torch.Generator().manual_seed(0)).to(
                entrance.device
            )
            moved = {name: (noise * outputs[name].float().abs().mean()).to(outputs[name].dtype)}
            place[EXIT] = run(block)
            wanted = moved[name].float().reshape(-1, width)
            change = (place[where].float() - still[where].float()).reshape(-1, width) - wanted
            if change.abs().median() < 0.1 * wanted.abs().median():
                writers[name] = where
    return writers
