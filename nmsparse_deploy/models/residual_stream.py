"""Where the residual stream of a transformer block stands alone, found by watching the block run.

The *middle* is the last module without a GEMM that ran after some GEMM, takes hidden states of the block's width, and
whose output is what another GEMM reads: the norm before the MLP (or, in a block that norms afterwards, the one after
attention). Its input is the residual stream between the halves. A block whose attention and MLP read the same input
runs them side by side and has no middle. The other place is the block's exit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from nmsparse_deploy.models.input_trace import group_axis

Run = Callable[[nn.Module], torch.Tensor]
"""Calls a block on one batch of hidden states and returns what leaves it."""
EXIT = ""
"""The name of the place behind the last module."""


class Seen(Exception):
    """Raised to leave a forward pass when everything wanted has been seen."""


@torch.no_grad()
def find_middle(block: nn.Module, run: Run, entrance: torch.Tensor) -> str | None:
    """Path of the module at whose entrance the first half ends, or None; `entrance` is the tensor that `run` feeds."""
    ran: list[str] = []
    writers: dict[int, str] = {}
    alive: list[torch.Tensor] = []  # a freed tensor's address could be used again
    found: list[str] = []

    def before(path: str, layer: nn.Module, args: tuple) -> None:
        if group_axis(layer) is not None:
            writer = writers.get(args[0].data_ptr())
            if writer is not None and ran:
                found.append(writer)
            ran.append(path)

    def after(path: str, layer: nn.Module, args: tuple, output: object) -> None:
        if not ran or group_axis(layer) is not None or not isinstance(output, torch.Tensor) or not args:
            return
        same = args[0].shape[-1] == entrance.shape[-1] and output.shape == args[0].shape
        if same and args[0].data_ptr() != entrance.data_ptr():
            writers[output.data_ptr()] = path
            alive.append(output)

    leaves = [(path, child) for path, child in block.named_modules() if path and not list(child.children())]
    handles = [child.register_forward_pre_hook(lambda m, args, path=path: before(path, m, args))
               for path, child in leaves]
    handles += [child.register_forward_hook(lambda m, args, out, path=path: after(path, m, args, out))
                for path, child in leaves]
    try:
        run(block)
    finally:
        for handle in handles:
            handle.remove()
    return found[-1] if found else None


@torch.no_grad()
def parameters_before(block: nn.Module, run: Run, middle: str) -> set[str]:
    """Names of the parameters that modules use which have run before `middle` starts."""
    ran: set[int] = set()

    def record(module: nn.Module) -> None:
        ran.update(id(value) for value in module.parameters(recurse=False))

    def stop(*_: object) -> None:
        raise Seen

    handles = [child.register_forward_pre_hook(lambda m, _args: record(m)) for child in block.modules()]
    handles.append(block.get_submodule(middle).register_forward_pre_hook(stop, prepend=True))
    try:
        run(block)
    except Seen:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return {name for name, value in block.named_parameters() if id(value) in ran}


@torch.no_grad()
def residual_writers(block: nn.Module, run: Run, entrance: torch.Tensor) -> dict[str, str]:
    """Layers whose output is added to the residual stream just as it is, and the place where the sum then stands.

    The place is the middle or `EXIT`. Each candidate is asked: when its output is moved, does the place move by exactly
    as much? (It does not behind a layer scale, a norm or a gate.)
    """
    middle = find_middle(block, run, entrance)
    width, size = entrance.shape[-1], entrance.numel()
    outputs: dict[str, torch.Tensor] = {}
    order: list[str] = []
    moved: dict[str, torch.Tensor] = {}
    place: dict[str, torch.Tensor] = {}

    def after(path: str, output: torch.Tensor) -> torch.Tensor | None:
        outputs[path] = output
        order.append(path)
        return output + moved[path] if path in moved else None

    def at_middle(args: tuple) -> None:
        place[EXIT if middle is None else middle] = args[0]
        order.append(EXIT)

    handles = [child.register_forward_hook(lambda _m, _a, out, path=path: after(path, out))
               for path, child in block.named_modules() if path and group_axis(child) is not None]
    if middle is not None:
        handles.append(block.get_submodule(middle).register_forward_pre_hook(lambda _m, args: at_middle(args)))
    try:
        place[EXIT] = run(block)
        still, sequence, shapes = dict(place), list(order), {name: out.shape for name, out in outputs.items()}
        found = {}
        for name in (name for name, shape in shapes.items() if shape[-1] == width and shape.numel() == size):
            early = middle is not None and sequence.index(name) < sequence.index(EXIT)
            where = middle if early and middle is not None else EXIT
            noise = torch.randn(shapes[name], generator=torch.Generator().manual_seed(0)).to(entrance.device)
            moved = {name: (noise * outputs[name].float().abs().mean()).to(outputs[name].dtype)}
            place[EXIT] = run(block)
            wanted = moved[name].float().reshape(-1, width)
            change = (place[where].float() - still[where].float()).reshape(-1, width) - wanted
            if change.abs().median() < 0.1 * wanted.abs().median():
                found[name] = where
        return found
    finally:
        for handle in handles:
            handle.remove()
