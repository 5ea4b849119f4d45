"""FSDP2: weights, trained values, gradients and optimiser state split over the processes of a run.

Every process holds a share of each tensor's rows. A block is gathered when its forward or backward
pass needs it and let go afterwards, so what is never whole is what takes most: the values, their
gradients and the optimiser's moments. Inside a forward pass everything looks as in one process;
outside, `whole` and `put` read and write what is split.

Masks are attached to a shell of the model, a second structure around the same parameters, and the
shell is what is split: nothing of FSDP is left on the model when it is thrown away.

Zhao et al., PyTorch FSDP, VLDB 2023, arXiv:2304.11277; `torch.distributed.fsdp.fully_shard`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def shell(module: nn.Module) -> nn.Module:
    """Make the same structure once more, around the same parameters and buffers."""
    return copy.deepcopy(
        module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    )


def shard(
    module: nn.Module, blocks: Sequence[str], optimiser: torch.optim.Optimizer, world: int
) -> None:
    """Split every parameter over `world` processes, a group for every block and one for the rest;
    `optimiser`, which has made no step yet, follows its parameters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    names = {id(value): name for name, value in module.named_parameters()}
    device = next(module.parameters()).device.type
    mesh = init_device_mesh(device, (world,))
    for part in (*(module.get_submodule(path) for path in blocks), module):
        split: Any = fully_shard(part, mesh=mesh, reshard_after_forward=True)
        split.set_force_sum_reduction_for_comms(device == "cpu")  # gloo cannot average
    parameters = dict(module.named_parameters())
    for group in optimiser.param_groups:
        group["params"] = [parameters[names[id(value)]] for value in group["params"]]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole of a tensor that may be split (a `DTensor`); every process has to ask."""
    gather: Any = getattr(tensor, "full_tensor", None)
    gathered: torch.Tensor = tensor if gather is None else gather()
    return gathered


def like(tensor: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """Split `full`, which every process has, as `tensor` is."""
    if not hasattr(tensor, "full_tensor"):
        return full
    from torch.distributed.tensor import distribute_tensor

    split: Any = tensor
    return distribute_tensor(
        full.to(tensor.device), split.device_mesh, split.placements, src_data_rank=None
    )


def put(tensor: torch.Tensor, full: torch.Tensor) -> None:
    """Write `full`, which every process has, into a tensor that may be split."""
    tensor.copy_(like(tensor, full))
