"""Mixtures of experts: where the experts are, what their router is, and what an expert reads that
no token reached.

Experts are the items of a list of modules of one class that multiply, or the matrices of a stack
`[experts, in, out]`. The weight of a convolution along one axis has three axes too, and is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn
from torch.nn.modules.conv import _ConvNd

from nmsparse_deploy.models.base import block_index
from nmsparse_deploy.models.input_trace import Read, gemms


def is_stack(owner: nn.Module, parameter: nn.Parameter) -> bool:
    """Tell whether a parameter has the shape of a stack of matrices, which a convolution's weight
    only seems to have."""
    return parameter.ndim == 3 and min(parameter.shape) > 1 and not isinstance(owner, _ConvNd)


def is_router(module: nn.Module, path: str, parameter: nn.Parameter) -> bool:
    """Tell whether `parameter` of the module at `path` has one output for each of the experts
    beside it.

    A router that is wrapped in a module of its own may have its experts beside the wrapper.
    """
    if parameter.ndim != 2:
        return False
    outputs, own = parameter.shape[0], module.get_submodule(path)
    inner = own
    while path:
        path = path.rpartition(".")[0]
        around = module.get_submodule(path)
        if any(_experts(child) == outputs for child in around.children() if child is not inner):
            return True
        if [layer for _, layer in gemms(around)] not in ([], [own]):
            return False
        inner = around
    return False


def is_expert_list(parent: nn.Module, items: nn.Module) -> bool:
    """Tell whether `parent` has a router for the items of one of its lists."""
    count = len(list(items.children()))
    return any(
        parameter.ndim == 2 and parameter.shape[0] == count > 1
        for child in parent.children()
        if child is not items and not isinstance(child, (nn.ModuleList, nn.Sequential))
        for layer in child.modules()
        if not isinstance(layer, nn.Embedding)
        for parameter in layer.parameters(recurse=False)
    )


def expert_lists(module: nn.Module, blocks: Sequence[str]) -> dict[str, list[str]]:
    """Map the paths of the lists of experts inside blocks to the names of their experts."""
    lists = {}
    for path, child in module.named_modules():
        if (
            isinstance(child, (nn.ModuleList, nn.ModuleDict))
            and _experts(child)
            and block_index(tuple(blocks), path) is not None
            and is_expert_list(module.get_submodule(path.rpartition(".")[0]), child)
        ):
            lists[path] = [name for name, _ in child.named_children()]
    return lists


def sibling(reads: Mapping[str, Read], lists: Mapping[str, list[str]], name: str) -> Read | None:
    """Find what the same weight of another expert reads, its group named as in this expert."""
    for place, experts in lists.items():
        if not name.startswith(place + "."):
            continue
        mine, _, rest = name.removeprefix(place + ".").partition(".")
        for other in experts:
            read = reads.get(f"{place}.{other}.{rest}")
            if read is not None:
                return replace(
                    read, group=f"{place}.{mine}.{read.group.removeprefix(f'{place}.{other}.')}"
                )
    return None


def _experts(child: nn.Module) -> int | None:
    """Count the experts that a module holds; None where it holds none."""
    if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
        items = list(child.children())
        alike = len(items) > 1 and len({type(item) for item in items}) == 1
        made_of = [sum(1 for path, _ in gemms(item) if path) for item in items]
        return len(items) if alike and all(made_of) else None
    stacks = [p for p in child.parameters(recurse=False) if is_stack(child, p)]
    return stacks[0].shape[0] if stacks else None
