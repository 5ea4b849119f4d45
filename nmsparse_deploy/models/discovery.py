"""Find the repeated blocks of a network and the matrix multiplications in them, from structure
alone.

No list of layer names. A *block* is an item of the outermost container whose items share one class
and hold weights; a stage that is little more than such a container is not a block, its items are. A
*fusion group* is what reads the same input tensor in one forward pass (q/k/v, gate/up). The rest is
recorded with the reason why it stays dense.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from nmsparse_deploy.errors import NmsparseError, first_line
from nmsparse_deploy.models.base import Discovery, Skipped, Target, block_index, weights
from nmsparse_deploy.models.experts import expert_lists, is_router, sibling
from nmsparse_deploy.models.input_trace import InputTrace, Read, group_axis, trace
from nmsparse_deploy.models.weight_store import IN_MEMORY, WeightStore

__all__ = ["discover", "find_blocks", "group_axis", "trace_inputs"]


def discover(
    module: nn.Module, inputs: Mapping[str, torch.Tensor], store: WeightStore = IN_MEMORY
) -> Discovery:
    """Discover blocks, targets and what is skipped, by one forward pass on `inputs` (batch of 2 or
    more).

    Blocks come in the order in which they run. Raises `NmsparseError` when the model has no
    repeated blocks, or runs one of them more than once.
    """
    repeated = find_blocks(module)
    if not repeated:
        raise NmsparseError(
            "Found no repeated blocks in this model, so there is nothing to prune block by block."
        )
    traced = _traced(module, repeated, inputs, store)
    again = next((path for path in traced.order if traced.order.count(path) > 1), None)
    if again is not None:
        raise NmsparseError(
            f"The block '{again}' runs several times in one forward pass; shared blocks are not "
            "supported."
        )
    blocks = traced.order
    batch = len(next(iter(inputs.values())))
    owners, lists = _owners(module), expert_lists(module, blocks)
    targets, skipped = [], []
    for path, name, parameter in weights(module):
        layer = module.get_submodule(path)
        read = _read(traced, lists, path, name, parameter, layer)
        routed = parameter.ndim == 3 or any(path.startswith(place + ".") for place in lists)
        reason = _never_pruned(
            module, path, layer, name, parameter, read, owners, blocks, set(repeated) - set(blocks)
        )
        if reason is None and read is None:
            reason = "not used in a forward pass"
        if reason is None and read is not None and not routed and read.rows <= batch:
            reason = "reads one row per sample (modulation, time or label embedding)"
        if reason is not None or read is None:
            skipped.append(Skipped(name, tuple(parameter.shape), reason or ""))
            continue
        index = block_index(blocks, path)
        assert index is not None
        k, experts = parameter.shape[read.axis], parameter.shape[0] if parameter.ndim == 3 else 1
        targets.append(
            Target(
                name,
                path,
                index,
                read.axis,
                k,
                parameter.numel() // k,
                read.group,
                experts,
                routed,
                read.watched,
            )
        )
    return Discovery(blocks, tuple(targets), tuple(skipped))


def _traced(
    module: nn.Module,
    blocks: tuple[str, ...],
    inputs: Mapping[str, torch.Tensor],
    store: WeightStore,
) -> InputTrace:
    """Trace a trial pass. Raises `NmsparseError` when the model does not take the inputs."""
    try:
        return trace(module, blocks, inputs, store)
    except NmsparseError:
        raise
    except Exception as error:  # any code of any model
        given = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
        raise NmsparseError(
            f"{type(module).__name__} does not take the inputs that its layers are looked for with "
            f"({given}): {type(error).__name__}: {first_line(error)}."
        ) from error


def trace_inputs(
    module: nn.Module, blocks: tuple[str, ...], inputs: Mapping[str, torch.Tensor]
) -> dict[str, Read]:
    """Map each weight to the tensor that it reads in one forward pass, by parameter name."""
    return trace(module, blocks, inputs).reads


def _read(
    traced: InputTrace,
    lists: Mapping[str, int],
    path: str,
    name: str,
    parameter: nn.Parameter,
    layer: nn.Module,
) -> Read | None:
    """Find what a weight reads; an expert that no token reached reads as its siblings do."""
    if parameter.ndim != 3 and group_axis(layer) is None:
        return None
    read = traced.reads.get(name)
    return read if read is not None else sibling(traced.reads, lists, name)


def find_blocks(module: nn.Module) -> tuple[str, ...]:
    """List the paths of the repeated blocks, in module order."""
    for mixed in (
        False,
        True,
    ):  # blocks of several classes (attention and state space) only where there are no others
        blocks: list[str] = []
        lists: list[str] = []
        for path, child in module.named_modules():
            nested = any(path.startswith(parent + ".") for parent in lists)
            if (
                isinstance(child, (nn.ModuleList, nn.Sequential))
                and not nested
                and _is_repeated(child, mixed)
            ):
                lists.append(path)
                items = [(f"{path}.{name}", item) for name, item in child.named_children()]
                inner = [_stage(where, item) for where, item in items]
                blocks += (
                    [path for paths in inner for path in paths]
                    if all(inner)
                    else [where for where, _ in items]
                )
        if blocks:
            return tuple(blocks)
    return ()


def _is_repeated(container: nn.Module, mixed: bool = False) -> bool:
    items = list(container.children())
    alike = len(items) > 1 if mixed else len({type(item) for item in items}) == 1
    return alike and all(
        next(item.children(), None) is not None and _has_gemm(item) for item in items
    )


def _stage(path: str, item: nn.Module) -> list[str]:
    """List the blocks of a stage: an item that is a container itself, or one beside at most a
    change of resolution."""
    if isinstance(item, (nn.ModuleList, nn.Sequential)):
        return [f"{path}.{name}" for name, _ in item.named_children()] if _is_repeated(item) else []
    inside = [(name, child) for name, child in item.named_children() if _has_gemm(child)]
    lists = [
        (name, child)
        for name, child in inside
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and _is_repeated(child)
    ]
    widest = max(
        lists, key=lambda entry: sum(p.numel() for p in entry[1].parameters()), default=None
    )
    if widest is None or len(inside) > 2 or is_router(item, len(list(widest[1].children()))):
        return []
    return [f"{path}.{widest[0]}.{name}" for name, _ in widest[1].named_children()]


def _has_gemm(module: nn.Module) -> bool:
    return any(group_axis(child) is not None for child in module.modules())


def _owners(module: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for _, name, parameter in weights(module):
        owners.setdefault(id(parameter), []).append(name)
    return owners


def _never_pruned(
    module: nn.Module,
    path: str,
    layer: nn.Module,
    name: str,
    parameter: nn.Parameter,
    read: Read | None,
    owners: Mapping[int, list[str]],
    blocks: tuple[str, ...],
    idle: set[str],
) -> str | None:
    others = [owner for owner in owners[id(parameter)] if owner != name]
    if isinstance(layer, nn.Embedding):
        return "embedding table"
    if others:
        return f"tied to {others[0]}"
    inside = block_index(blocks, path) is not None
    if inside and is_router(
        module.get_submodule(path.rpartition(".")[0]), parameter.shape[0], layer
    ):
        return "router of a mixture of experts"
    if (group_axis(layer) is None or not name.endswith("weight")) and (
        read is None or parameter.ndim != 3
    ):
        return "not the weight of a Linear, Conv1D or Conv2d"
    if block_index(tuple(idle), path) is not None:
        return "its block did not run in a forward pass"
    if not inside:
        kind = "patch embedding or stem" if isinstance(layer, nn.Conv2d) else "head or projection"
        return f"{kind} outside the repeated blocks"
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        return "grouped or depthwise convolution"
    if parameter.ndim == 2 and parameter.numel() == parameter.shape[group_axis(layer) or 0]:
        return "one output per token (a gate)"
    return None
