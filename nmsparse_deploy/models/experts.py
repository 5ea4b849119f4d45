"""Mixtures of experts: where the experts are, what their router is, and what an expert reads that
no token reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from nmsparse_deploy.models.base import block_index
from nmsparse_deploy.models.input_trace import Read


def is_router(parent: nn.Module, outputs: int, layer: nn.Module | None = None) -> bool:
    """Tell whether a layer in `parent` has one output per expert, where the experts are children of
    `parent`.

    `layer` is the layer asked about; without it, any child of `parent` with so many outputs counts.
    """
    if layer is None:
        return any(
            p.shape[0] == outputs and p.ndim == 2
            for child in parent.children()
            for p in child.parameters(recurse=False)
        )
    for child in parent.children():
        if child is layer:
            continue
        if isinstance(child, nn.ModuleList) and len(child) == outputs > 1:
            return True
        if any(p.ndim == 3 and p.shape[0] == outputs > 1 for p in child.parameters(recurse=False)):
            return True
    return False


def expert_lists(module: nn.Module, blocks: Sequence[str]) -> dict[str, int]:
    """Map the paths of the lists of experts inside blocks, with how many experts each holds."""
    counts = {}
    for path, child in module.named_modules():
        if (
            isinstance(child, nn.ModuleList)
            and len(child) > 1
            and block_index(tuple(blocks), path) is not None
        ):
            parent = module.get_submodule(path.rpartition(".")[0])
            if len({type(item) for item in child}) == 1 and is_router(parent, len(child)):
                counts[path] = len(child)
    return counts


def sibling(reads: Mapping[str, Read], lists: Mapping[str, int], name: str) -> Read | None:
    """Find what the same weight of another expert reads, its group named as in this expert."""
    for place, count in lists.items():
        if not name.startswith(place + "."):
            continue
        mine, _, rest = name.removeprefix(place + ".").partition(".")
        for other in range(count):
            read = reads.get(f"{place}.{other}.{rest}")
            if read is not None:
                return replace(
                    read, group=f"{place}.{mine}.{read.group.removeprefix(f'{place}.{other}.')}"
                )
    return None
