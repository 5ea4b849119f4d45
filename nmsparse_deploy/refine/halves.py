"""Where a transformer block falls into its two halves, found by watching one forward pass.

The middle is the last module without a GEMM that ran after some target, takes hidden states of the block's width, and
whose output is what another target reads: the norm before the MLP (or, in a block that norms afterwards, the one after
attention). Its input is the residual stream between the halves. A block whose attention and MLP read the same input
runs them side by side and has no middle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .base import Block


@dataclass(frozen=True)
class Unit:
    """What is refined together: its parameters, and how to get from a block's input to the place of the loss."""

    parameters: list[str]
    forward: Callable[[nn.Module, int, torch.Tensor], torch.Tensor]


def units(block: Block, size: str) -> list[Unit]:
    """The block as one unit, or (`half`, where it has a middle) as two."""
    names = [name for name, value in block.module.named_parameters() if value.is_floating_point()]
    middle = find_middle(block) if size == "half" else None
    if middle is None:
        return [Unit(names, block.run)]
    first = parameters_before(block, middle)

    def to_the_middle(module: nn.Module, number: int, x: torch.Tensor) -> torch.Tensor:
        seen: list[torch.Tensor] = []

        def stop(_module: nn.Module, args: tuple) -> None:
            seen.append(args[0])
            raise Seen

        handle = module.get_submodule(middle).register_forward_pre_hook(stop)
        try:
            block.run(module, number, x)
        except Seen:
            pass
        finally:
            handle.remove()
        return seen[0]

    return [Unit([name for name in names if name in first], to_the_middle),
            Unit([name for name in names if name not in first], block.run)]


class Seen(Exception):
    """Raised to leave a forward pass when everything wanted has been seen."""


def find_middle(block: Block) -> str | None:
    """Path of the module at whose entrance the first half ends, or None."""
    ran: list[str] = []
    width, entrance = block.inputs[0].shape[-1], block.inputs[0].data_ptr()
    writers: dict[int, str] = {}
    alive: list[torch.Tensor] = []  # a freed tensor's address could be used again
    found: list[str] = []

    def before(path: str, args: tuple) -> None:
        if f"{path}.weight" not in block.layers:
            return
        writer = writers.get(args[0].data_ptr())
        if writer is not None and ran:
            found.append(writer)
        ran.append(path)

    def after(path: str, args: tuple, output: object) -> None:
        if not ran or f"{path}.weight" in block.layers or not isinstance(output, torch.Tensor):
            return
        if args and args[0].data_ptr() != entrance and args[0].shape[-1] == width and output.shape == args[0].shape:
            writers[output.data_ptr()] = path
            alive.append(output)

    leaves = [(path, child) for path, child in block.dense.named_modules() if path and not list(child.children())]
    handles = [child.register_forward_pre_hook(lambda _m, args, path=path: before(path, args))
               for path, child in leaves]
    handles += [child.register_forward_hook(lambda _m, args, out, path=path: after(path, args, out))
                for path, child in leaves]
    try:
        with torch.no_grad():
            block.run(block.dense, 0, block.inputs[0])
    finally:
        for handle in handles:
            handle.remove()
    return found[-1] if found else None


def parameters_before(block: Block, middle: str) -> set[str]:
    """Names of the parameters that modules use which have run before `middle` starts."""
    ran: set[int] = set()

    def record(module: nn.Module) -> None:
        ran.update(id(value) for value in module.parameters(recurse=False))

    def stop(*_: object) -> None:
        raise Seen

    handles = [child.register_forward_pre_hook(lambda m, _args: record(m)) for child in block.dense.modules()]
    handles.append(block.dense.get_submodule(middle).register_forward_pre_hook(stop, prepend=True))
    try:
        with torch.no_grad():
            block.run(block.dense, 0, block.inputs[0])
    except Seen:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return {name for name, value in block.dense.named_parameters() if id(value) in ran}
