"""Channel permutations as a small portable file: how to get from the published dense weights to
those that were pruned.

A mask is bound to a hash of the dense weights it was found for. After a permutation these are the
published ones in another order, so a run keeps the orders: per parameter and axis one index,
`new[i] = old[order[i]]`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from nmsparse_deploy.errors import CheckFailed, UsageError
from nmsparse_deploy.models.permutable_channels import reorder

FORMAT = "nmsparse-permutations-1"
"""The one metadata key of a permutation file."""
ORDER = "|order"
"""Follows a parameter's name, and precedes the number of the axis, in a block's file and in this
one."""


@dataclass(frozen=True)
class Permutations:
    """The orders of one model by parameter and axis, and a description of the channels that were
    permuted."""

    orders: Mapping[tuple[str, int], torch.Tensor]
    channels: Sequence[Mapping[str, object]] = ()

    def save(self, path: Path) -> None:
        """Write one safetensors file. The caller makes it atomic."""
        header = {
            "spaces": list(self.channels),
            "rule": "new[i] = old[order[i]] along the axis after the name",
        }
        save_file(to_tensors(self.orders), path, {FORMAT: json.dumps(header, sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> Permutations:
        """Read a permutation file. Raises `UsageError` when it is damaged or of another kind."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if FORMAT not in metadata:
                    raise UsageError(
                        f"'{path}' is not a permutation file of this tool (no '{FORMAT}' in its header)."
                    )
                orders = from_tensors({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
                return cls(orders, list(json.loads(metadata[FORMAT])["spaces"]))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UsageError(f"The permutation file '{path}' is damaged: {error}.") from error

    def apply(self, module: nn.Module) -> None:
        """Bring a dense model into the order that was pruned. Raises `CheckFailed` when it is
        another model."""
        shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        for (name, axis), order in self.orders.items():
            if name not in shapes or axis >= len(shapes[name]) or shapes[name][axis] != len(order):
                raise CheckFailed(
                    f"These permutations belong to another model: '{name}' does not fit."
                )
            if not torch.equal(order.sort().values, torch.arange(len(order))):
                raise CheckFailed(f"The order of '{name}' along axis {axis} is no permutation.")
        reorder(module, self.orders)


def to_tensors(orders: Mapping[tuple[str, int], torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{name}{ORDER}{axis}": order.to(torch.int32) for (name, axis), order in orders.items()}


def from_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[tuple[str, int], torch.Tensor]:
    """Return the orders among `tensors`; whatever has another kind of name is passed over."""
    split = {name: name.rpartition(ORDER) for name in tensors}
    return {
        (name, int(axis)): tensors[key].long() for key, (name, mark, axis) in split.items() if mark
    }
