"""Find the matrix multiplications in the repeated blocks of a network, from structure alone.

No list of layer names. A *fusion group* is what reads the same input tensor in one forward pass
(q/k/v, gate/up). The rest is recorded with the reason why it stays dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import ParametrizationList

from nmsparse_deploy.errors import NmsparseError, first_line
from nmsparse_deploy.models.base import Discovery, Skipped, Target, block_index, weights
from nmsparse_deploy.models.blocks import between, find_blocks
from nmsparse_deploy.models.experts import expert_lists, is_router, is_stack, sibling
from nmsparse_deploy.models.input_trace import InputTrace, Read, group_axis, trace
from nmsparse_deploy.models.weight_store import IN_MEMORY, WeightStore

__all__ = ["RefusedInputs", "discover", "find_blocks", "group_axis", "trace_inputs"]

MULTIPLY = (
    nn.Linear,
    _ConvNd,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.Bilinear,
    nn.MultiheadAttention,
    ParametrizationList,
)
"""Modules whose weights are multiplied, whether that was observed or not."""


class RefusedInputs(NmsparseError):
    """Inputs that a model does not take, or that nobody knows how to make."""


def discover(
    module: nn.Module, inputs: Mapping[str, torch.Tensor], store: WeightStore = IN_MEMORY
) -> Discovery:
    """Discover blocks, targets and what is skipped, by one forward pass on `inputs` (batch of 2 or
    more).

    Blocks come in the order in which they run. Raises `NmsparseError` when the model has no
    repeated blocks, or does not take the inputs.
    """
    repeated = find_blocks(module)
    if not repeated:
        raise NmsparseError(
            "Found no repeated blocks in this model, so there is nothing to prune block by block."
        )
    traced = _traced(module, repeated, inputs, store)
    if traced.wrapped:
        repeated = _without_wrapped(repeated, traced.wrapped)
        traced = _traced(module, repeated, inputs, store)
    if beside := between(module, repeated, traced.everything):
        repeated = (*repeated, *beside)
        traced = _traced(module, repeated, inputs, store)
    net, batch = _network(module, traced, repeated), len(next(iter(inputs.values())))
    targets, skipped = [], []
    for path, name, parameter in weights(module):
        read = _read(net, path, name, parameter)
        reason = _stays_dense(net, path, name, parameter, read, batch)
        if reason is not None or read is None:
            gemm = _is_multiplied(net, path, name, parameter, read)
            skipped.append(Skipped(name, tuple(parameter.shape), reason or "", gemm))
            continue
        index = block_index(net.blocks, path)
        assert index is not None
        stack = is_stack(module.get_submodule(path), parameter)
        k, experts = parameter.shape[read.axis], parameter.shape[0] if stack else 1
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
                _is_routed(net, path, parameter),
                read.watched,
            )
        )
    shared = tuple(path for path in net.blocks if traced.entered.count(path) > 1)
    return Discovery(net.blocks, tuple(targets), tuple(skipped), shared)


def _traced(
    module: nn.Module,
    blocks: tuple[str, ...],
    inputs: Mapping[str, torch.Tensor],
    store: WeightStore,
) -> InputTrace:
    """Trace a trial pass. Raises `RefusedInputs` when the model does not take the inputs."""
    try:
        return trace(module, blocks, inputs, store)
    except NmsparseError:
        raise
    except Exception as error:  # any code of any model
        given = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
        raise RefusedInputs(
            f"{type(module).__name__} does not take the inputs that its layers are looked for with "
            f"({given}): {type(error).__name__}: {first_line(error)}."
        ) from error


def _without_wrapped(blocks: tuple[str, ...], wrapped: set[str]) -> tuple[str, ...]:
    """Put what is around a block that takes a list in its place: there, a tensor comes in."""
    outer = {path.rpartition(".")[0] or path for path in wrapped}
    kept = [path for path in blocks if block_index(tuple(outer), path) is None]
    return tuple(kept + sorted(outer))


def trace_inputs(
    module: nn.Module, blocks: tuple[str, ...], inputs: Mapping[str, torch.Tensor]
) -> dict[str, Read]:
    """Map each weight to the tensor that it reads in one forward pass, by parameter name."""
    return trace(module, blocks, inputs).reads


@dataclass(frozen=True)
class _Network:
    """A module, what a trial pass of it showed, and where its parameters are."""

    module: nn.Module
    traced: InputTrace
    blocks: tuple[str, ...]
    """In the order in which they run."""
    idle: tuple[str, ...]
    """Those that did not run."""
    lists: Mapping[str, list[str]]
    """Lists of experts, and what each calls its own."""
    owners: Mapping[int, list[str]]
    """All names of each parameter."""


def _network(module: nn.Module, traced: InputTrace, repeated: tuple[str, ...]) -> _Network:
    blocks = traced.order
    owners: dict[int, list[str]] = {}
    for _, name, parameter in weights(module):
        owners.setdefault(id(parameter), []).append(name)
    idle = tuple(path for path in repeated if path not in blocks)
    return _Network(module, traced, blocks, idle, expert_lists(module, blocks), owners)


def _read(net: _Network, path: str, name: str, parameter: nn.Parameter) -> Read | None:
    """Find what a weight reads; an expert that no token reached reads as its siblings do."""
    layer = net.module.get_submodule(path)
    if isinstance(layer, nn.Embedding) or not (
        is_stack(layer, parameter) or name.endswith("weight")
    ):
        return None
    read = net.traced.reads.get(name)
    return read if read is not None else sibling(net.traced.reads, net.lists, name)


def _is_routed(net: _Network, path: str, parameter: nn.Parameter) -> bool:
    return is_stack(net.module.get_submodule(path), parameter) or any(
        path.startswith(place + ".") for place in net.lists
    )


def _is_multiplied(
    net: _Network, path: str, name: str, parameter: nn.Parameter, read: Read | None
) -> bool:
    """Tell whether a weight is a factor of a product, under the first of its names."""
    if net.owners[id(parameter)][0] != name:
        return False
    return read is not None or isinstance(net.module.get_submodule(path), MULTIPLY)


def _stays_dense(
    net: _Network, path: str, name: str, parameter: nn.Parameter, read: Read | None, batch: int
) -> str | None:
    """Return why a weight is never pruned."""
    layer, owners = net.module.get_submodule(path), net.owners[id(parameter)]
    if isinstance(layer, nn.Embedding):
        return "embedding table"
    if owners[0] != name or not all(block_index(net.blocks, owner) is not None for owner in owners):
        others = [owner for owner in owners if owner != name]
        if others:
            return f"tied to {others[0]}"
    inside = block_index(net.blocks, path) is not None
    if inside and is_router(net.module, path, parameter):
        return "router of a mixture of experts"
    unknown = read is None and (group_axis(layer) is None or not name.endswith("weight"))
    if unknown and (inside or not isinstance(layer, _ConvNd)):
        return _kind(layer)
    if block_index(net.idle, path) is not None:
        return "its block did not run in a forward pass"
    if not inside:
        first = isinstance(layer, _ConvNd) and not _runs_last(net, path)
        kind = "patch embedding or stem" if first else "head or projection"
        return f"{kind} outside the repeated blocks"
    if isinstance(layer, _ConvNd) and layer.groups > 1:
        return "grouped or depthwise convolution"
    if parameter.ndim == 2 and parameter.numel() == parameter.shape[group_axis(layer) or 0]:
        return "one output per token (a gate)"
    if read is None:
        return "not used in a forward pass"
    if not _is_routed(net, path, parameter) and read.rows <= batch:
        return "reads one row per sample (modulation, squeeze and excitation, pooling, time or label embedding)"
    return None


def _runs_last(net: _Network, path: str) -> bool:
    """Tell whether a module outside the blocks runs after them."""
    order = net.traced.everything
    return path in order and order.index(path) > order.index(net.blocks[-1])


def _kind(layer: nn.Module) -> str:
    """Say what a weight belongs to that is neither that of a Linear, nor of a convolution whose
    products are known."""
    if isinstance(layer, _ConvTransposeNd):
        return "transposed convolution"
    if isinstance(layer, _ConvNd):
        return (
            "grouped or depthwise convolution"
            if layer.groups > 1
            else "convolution along one axis over several steps, or along three"
        )
    if isinstance(layer, (nn.RNNBase, nn.RNNCellBase)):
        return "recurrent layer"
    if isinstance(layer, ParametrizationList):
        return "part of a weight that is computed (weight norm)"
    return "no product with it was seen: looked up, added, or not used"
