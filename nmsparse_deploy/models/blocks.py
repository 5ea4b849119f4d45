"""Find the repeated blocks of a network from its structure alone.

A *block* is an item of the outermost container whose items share one class and hold weights; a
stage that is little more than such a container is not a block, its items are. Where that finds
hardly any of the weights, containers with items of several classes count too, and after them
whatever follows one another in the network, the layers of a plain chain included. What is seen to
run between two blocks (a change of resolution, the projection from one tower into another) is a
block as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from nmsparse_deploy.models.base import block_index, weights
from nmsparse_deploy.models.experts import is_expert_list
from nmsparse_deploy.models.input_trace import gemms, group_axis

GROUP = 4
MOST, MORE = 0.5, 1.5
"""What holds less than this share of the weights gives way to what holds so many times as many."""


def find_blocks(module: nn.Module) -> tuple[str, ...]:
    """List the paths of the blocks, in module order."""
    sizes = _sizes(module)
    ways: tuple[Callable[[nn.Module], list[str]], ...] = (
        lambda root: _listed(root, mixed=False),
        lambda root: _listed(root, mixed=True),
        _chain,
    )
    best: list[str] = []
    for find in ways:
        blocks = find(module)
        if _held(sizes, blocks) > MORE * _held(sizes, best):
            best = blocks
        if best and _held(sizes, best) >= MOST * sum(sizes.values()):
            break
    return tuple(best)


def _sizes(module: nn.Module) -> dict[str, int]:
    """Count the weights of every GEMM that a pattern may fit, by its path; a head that looks like an
    embedding table does not count."""
    tables = {tuple(m.weight.shape) for m in module.modules() if isinstance(m, nn.Embedding)}
    sizes = {}
    layers: Iterable[tuple[str, Any]] = gemms(module)
    for path, layer in layers:
        shape = tuple(layer.weight.shape)  # computed, where it is parametrised
        if shape not in tables and not shape[group_axis(layer) or 0] % GROUP:
            sizes[path] = math.prod(shape)
    return sizes


def _held(sizes: dict[str, int], blocks: list[str]) -> int:
    inside = tuple(blocks)
    return sum(size for path, size in sizes.items() if block_index(inside, path) is not None)


def _listed(module: nn.Module, mixed: bool) -> list[str]:
    """List the items of the outermost containers; `mixed`: of several classes (attention and state
    space)."""
    blocks: list[str] = []
    lists: list[str] = []
    for path, child in module.named_modules():
        nested = any(not parent or path.startswith(parent + ".") for parent in lists)
        if (
            isinstance(child, (nn.ModuleList, nn.Sequential))
            and not nested
            and _is_repeated(child, mixed)
        ):
            lists.append(path)
            prefix = f"{path}." if path else ""
            items = [(prefix + name, item) for name, item in child.named_children()]
            inner = [_stage(where, item) for where, item in items]
            blocks += (
                [path for paths in inner for path in paths]
                if all(inner)
                else [where for where, _ in items]
            )
    return blocks


def _is_repeated(container: nn.Module, mixed: bool = False) -> bool:
    items = list(container.children())
    alike = len(items) > 1 if mixed else len({type(item) for item in items}) == 1
    if isinstance(container, nn.Sequential) and all(_count(item) < 2 for item in items):
        return False  # the layers of a plain chain
    return alike and all(
        next(item.children(), None) is not None and any(gemms(item)) for item in items
    )


def _stage(path: str, item: nn.Module) -> list[str]:
    """List the blocks of a stage: an item that is a container itself, or one beside at most a
    change of resolution."""
    if isinstance(item, (nn.ModuleList, nn.Sequential)):
        return [f"{path}.{name}" for name, _ in item.named_children()] if _is_repeated(item) else []
    inside = [(name, child) for name, child in item.named_children() if any(gemms(child))]
    lists = [
        (name, child)
        for name, child in inside
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and _is_repeated(child)
    ]
    widest = max(
        lists, key=lambda entry: sum(p.numel() for p in entry[1].parameters()), default=None
    )
    if widest is None or len(inside) > 2 or is_expert_list(item, widest[1]):
        return []
    return [f"{path}.{widest[0]}.{name}" for name, _ in widest[1].named_children()]


def _chain(module: nn.Module) -> list[str]:
    """List what follows one another in a network without containers; what comes first and last, if
    it is a single layer, is its stem and its head."""
    units = _links("", module)
    single = [group_axis(module.get_submodule(path)) is not None for path in units]
    first = 1 if single and single[0] else 0
    last = len(units) - 1 if len(units) > first and single[-1] else len(units)
    return units[first:last]


def _links(path: str, module: nn.Module) -> list[str]:
    """Split a module into its children where it seems to do no more than to run them in turn."""
    inside = [(name, child) for name, child in module.named_children() if any(gemms(child))]
    alike = len({type(child) for _, child in inside}) == 1 and all(
        sum(1 for _ in gemms(child)) > 1 for _, child in inside
    )
    runs_them = isinstance(module, (nn.ModuleList, nn.Sequential)) or not path
    if group_axis(module) is not None or not (runs_them or alike or len(inside) == 1):
        return [path]
    prefix = f"{path}." if path else ""
    return [link for name, child in inside for link in _links(prefix + name, child)]


def between(module: nn.Module, blocks: Sequence[str], entered: Sequence[str]) -> list[str]:
    """List what multiplies between two blocks: the largest modules that were entered and hold
    nothing else.

    `entered` has the blocks and all modules outside them that multiply or hold such, in the order
    in which they were entered.
    """
    inside, last = tuple(blocks), len(entered)
    first = next((place for place, path in enumerate(entered) if path in blocks), last)
    while last > first and entered[last - 1] not in blocks:
        last -= 1
    outside = [path for path in entered[first:last] if path not in blocks]
    elsewhere = {*entered[:first], *entered[last:]}

    def only_between(path: str) -> bool:
        layers = [name for name, _ in gemms(module.get_submodule(path))]
        paths = [f"{path}.{name}" if name else path for name in layers]
        return all(name in outside and name not in elsewhere for name in paths)

    found: list[str] = []
    for path in sorted(set(outside) - elsewhere, key=lambda path: path.count(".")):
        holds_block = any(block.startswith(path + ".") for block in inside)
        if block_index(tuple(found), path) is None and not holds_block and only_between(path):
            found.append(path)
    return found


def _count(module: nn.Module) -> int:
    return sum(1 for _ in weights(module))
