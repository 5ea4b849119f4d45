"""Find the repeated blocks of a network and the matrix multiplications in them, from structure alone.

No list of layer names. A *block* is an item of the outermost container whose items share one class and hold weights. A
*fusion group* is what reads the same input tensor in one forward pass (q/k/v, gate/up). The rest is recorded with the
reason why it stays dense.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from ..errors import NmsparseError
from .base import Discovery, Skipped, Target, block_index, weights


def discover(module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Discovery:
    """Discover blocks, targets and what is skipped, by one forward pass on `inputs` (batch of 2 or more).

    Raises `NmsparseError` when the model has no repeated blocks.
    """
    blocks = find_blocks(module)
    if not blocks:
        raise NmsparseError("Found no repeated blocks in this model, so there is nothing to prune block by block.")
    batch = len(next(iter(inputs.values())))
    reads = trace_inputs(module, blocks, inputs)
    owners = _owners(module)
    targets, skipped = [], []
    for path, name, parameter in weights(module):
        layer = module.get_submodule(path)
        reason = _never_pruned(module, path, layer, name, parameter, owners, blocks)
        if reason is None and path not in reads:
            reason = "not used in a forward pass"
        if reason is None and reads[path].rows <= batch:
            reason = "reads one row per sample (modulation, time or label embedding)"
        if reason is not None:
            skipped.append(Skipped(name, tuple(parameter.shape), reason))
            continue
        axis, index = group_axis(layer), block_index(blocks, path)
        assert axis is not None and index is not None
        k = parameter.shape[axis]
        targets.append(Target(name, path, index, axis, k, parameter.numel() // k, reads[path].group))
    return Discovery(blocks, tuple(targets), tuple(skipped))


def find_blocks(module: nn.Module) -> tuple[str, ...]:
    """Paths of the repeated blocks, in module order."""
    lists: list[str] = []
    blocks: list[str] = []
    for path, child in module.named_modules():
        nested = any(path.startswith(parent + ".") for parent in lists)
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and not nested and _is_repeated(child):
            lists.append(path)
            blocks += [f"{path}.{name}" for name, _ in child.named_children()]
    return tuple(blocks)


def _is_repeated(container: nn.Module) -> bool:
    items = list(container.children())
    same_class = len({type(item) for item in items}) == 1
    return same_class and all(next(item.children(), None) is not None and _has_gemm(item) for item in items)


def _has_gemm(module: nn.Module) -> bool:
    return any(group_axis(child) is not None for child in module.modules())


def group_axis(layer: nn.Module) -> int | None:
    """The reduction axis of a layer's weight, or None when the layer is no GEMM.

    Last axis of `nn.Linear`, first of the transposed `Conv1D` of Transformers' GPT-2, input channels of `Conv2d`.
    """
    if isinstance(layer, (nn.Linear, nn.Conv2d)):
        return 1
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf") and getattr(layer, "weight", None) is not None:
        return 0
    return None


def _owners(module: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for _, name, parameter in weights(module):
        owners.setdefault(id(parameter), []).append(name)
    return owners


def _never_pruned(module: nn.Module, path: str, layer: nn.Module, name: str, parameter: nn.Parameter,
                  owners: Mapping[int, list[str]], blocks: tuple[str, ...]) -> str | None:
    others = [owner for owner in owners[id(parameter)] if owner != name]
    if isinstance(layer, nn.Embedding):
        return "embedding table"
    if others:
        return f"tied to {others[0]}"
    if group_axis(layer) is None or not name.endswith("weight"):
        return "not the weight of a Linear, Conv1D or Conv2d"
    if block_index(blocks, path) is None:
        kind = "patch embedding or stem" if isinstance(layer, nn.Conv2d) else "head or projection"
        return f"{kind} outside the repeated blocks"
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        return "grouped or depthwise convolution"
    if _is_router(module, path, parameter):
        return "router of a mixture of experts"
    return None


def _is_router(module: nn.Module, path: str, parameter: nn.Parameter) -> bool:
    """A layer with one output per expert, where the experts are its siblings."""
    parent = module.get_submodule(path.rpartition(".")[0])
    outputs = parameter.shape[0]
    for sibling in parent.children():
        if isinstance(sibling, nn.ModuleList) and len(sibling) == outputs > 1:
            return True
        if any(p.ndim == 3 and p.shape[0] == outputs for p in sibling.parameters(recurse=False)):
            return True
    return False


class Read:
    """What a layer reads: the first layer that read the same tensor, and how many rows it had."""

    def __init__(self, group: str, rows: int) -> None:
        self.group = group
        self.rows = rows


def trace_inputs(module: nn.Module, blocks: tuple[str, ...], inputs: Mapping[str, torch.Tensor]) -> dict[str, Read]:
    """Run one forward pass and see which layers read which tensor."""
    reads: dict[str, Read] = {}
    seen: dict[tuple, str] = {}
    alive: list[torch.Tensor] = []  # a freed tensor's address could be used again

    def record(path: str, layer: nn.Module, x: torch.Tensor) -> None:
        # Convolutions of another geometry see other columns of the same picture.
        geometry = tuple(getattr(layer, name, None) for name in ("kernel_size", "stride", "padding", "dilation"))
        key = (block_index(blocks, path), x.data_ptr(), tuple(x.shape), x.stride(), geometry)
        alive.append(x)
        width = x.shape[1] if x.ndim == 4 else x.shape[-1]
        reads.setdefault(path, Read(seen.setdefault(key, path), x.numel() // width))

    handles = [layer.register_forward_pre_hook(lambda layer, args, path=path: record(path, layer, args[0]))
               for path, layer in _gemms(module)]
    training = module.training
    try:
        with torch.no_grad():
            module.eval()(**inputs)
    finally:
        module.train(training)
        for handle in handles:
            handle.remove()
    return reads


def _gemms(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, child in module.named_modules():
        if group_axis(child) is not None:
            yield path, child
