"""The file of a finished block: what pruning it changed, and its records. A killed run goes on
after the last one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from pydantic import TypeAdapter
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from nmsparse_deploy.errors import CheckFailed
from nmsparse_deploy.find.calibration.layer_stats import ExpertTokens
from nmsparse_deploy.find.facts import Json, RefinementRecord
from nmsparse_deploy.find.prune_block import PrunedBlock
from nmsparse_deploy.find.refine.permute import Orders
from nmsparse_deploy.masks import Mask, mask_follows, tensor_hash
from nmsparse_deploy.models.base import from_rows, to_rows
from nmsparse_deploy.pattern import Scope, parse_pattern

PARAMETER, MASK, SCALES, ORDER = "parameter/", "mask/", "scales/", "order/"
"""Sections of the file. A parameter's name follows, after the axis in `order/`."""


@dataclass(frozen=True)
class LayerRecord:
    """One pruned matrix: a row of `layers.json`."""

    name: str
    block: int
    axis: int
    pattern: str
    shape: tuple[int, ...]
    dense_hash: str
    relative_error: float | None
    negative_zeros_normalised: int
    seconds: float
    peak_memory_mb: int
    experts: ExpertTokens | None = None

    def to_json(self) -> Json:
        row = asdict(self)
        return row if self.experts else {key: row[key] for key in row if key != "experts"}


@dataclass(frozen=True)
class BlockContent:
    """The outcome of pruning a block: parameters (weights, norms, biases) as they are stored,
    packed masks, scales of rounded weights, orders of permuted channels, and the records."""

    layers: Sequence[LayerRecord]
    refinements: Sequence[RefinementRecord]
    parameters: Mapping[str, torch.Tensor]
    masks: Mapping[str, Mask]
    scales: Mapping[str, torch.Tensor]
    """fp32, `[outputs, runs of inputs that share one]`."""
    orders: Orders

    @classmethod
    def of(cls, pruned: PrunedBlock, module: nn.Module, scope: Scope | None) -> BlockContent:
        """Take over what `prune_block` made of the dense weights in `module`; `scope` is what a
        mask has to keep.

        Raises `CheckFailed` when a mask is not in its pattern, or a rounded weight is off its grid.
        """
        parameters, masks, scales, layers = dict(pruned.others), {}, {}, []
        for name, layer in pruned.layers.items():
            dense, result = module.get_parameter(name).detach(), layer.result
            if not mask_follows(result.mask, layer.pattern, scope=scope):
                raise CheckFailed(f"The recipe broke the pattern {layer.pattern} on '{name}'.")
            weight, negative_zeros = layer.baked(dense.dtype)
            rows = to_rows(weight, layer.axis)
            if result.grid is not None:
                if not result.grid.holds(rows):
                    raise CheckFailed(
                        f"The recipe left the {result.grid.bits}-bit grid on '{name}'."
                    )
                scales[name] = result.grid.scales
            mask = Mask.pack(
                from_rows(result.mask, layer.shape, layer.axis),
                layer.axis,
                layer.pattern,
                tensor_hash(dense),
            )
            parameters[name], masks[name] = weight, mask
            layers.append(
                LayerRecord(
                    name,
                    pruned.number,
                    mask.axis,
                    str(mask.pattern),
                    mask.shape,
                    mask.dense_hash,
                    layer.error(rows.float()),
                    negative_zeros,
                    round(pruned.seconds[name], 3),
                    pruned.peaks[name],
                    layer.stats.expert_tokens(),
                )
            )
        return cls(layers, pruned.refinements, parameters, masks, scales, pruned.orders)


@dataclass(frozen=True)
class BlockFile:
    """A finished block on disk. The records are in memory; tensors are read when they are asked
    for."""

    path: Path
    layers: tuple[LayerRecord, ...]
    refinements: tuple[RefinementRecord, ...]

    @staticmethod
    def save(path: Path, content: BlockContent) -> None:
        """Write one safetensors file. The caller makes it atomic."""
        tensors = {
            PARAMETER + name: value.cpu().contiguous() for name, value in content.parameters.items()
        }
        tensors |= {
            MASK + name: torch.from_numpy(mask.bits) for name, mask in content.masks.items()
        }
        tensors |= {SCALES + name: value.cpu() for name, value in content.scales.items()}
        tensors |= {
            f"{ORDER}{axis}/{name}": order.to(torch.int32)
            for (name, axis), order in content.orders.items()
        }
        save_file(
            tensors,
            path,
            {
                "layers": json.dumps([record.to_json() for record in content.layers]),
                "refinements": json.dumps([record.to_json() for record in content.refinements]),
            },
        )

    @classmethod
    def load(cls, path: Path) -> BlockFile:
        """Read the records of a file that `save` wrote."""
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        return cls(
            path,
            TypeAdapter(tuple[LayerRecord, ...]).validate_json(header["layers"]),
            tuple(RefinementRecord.from_json(row) for row in json.loads(header["refinements"])),
        )

    def parameters(self, module: nn.Module) -> dict[str, Callable[[], torch.Tensor]]:
        """Return how to read each changed parameter, in the dtype that it has in `module`."""
        return {
            name: partial(self._read, PARAMETER + name, module.get_parameter(name).dtype)
            for name in self._names(PARAMETER)
        }

    def masks(self) -> dict[str, Mask]:
        """Read the masks."""
        return {
            row.name: Mask(
                self._read(MASK + row.name).numpy(),
                row.shape,
                row.axis,
                parse_pattern(row.pattern),
                row.dense_hash,
            )
            for row in self.layers
        }

    def scales(self) -> dict[str, torch.Tensor]:
        """Read the scales of rounded weights."""
        return {name: self._read(SCALES + name) for name in self._names(SCALES)}

    def orders(self) -> Orders:
        """Read where the entries of permuted dense weights come from."""
        keys = [(key, *key.split("/", 1)) for key in self._names(ORDER)]
        return {(name, int(axis)): self._read(ORDER + key).long() for key, axis, name in keys}

    def _names(self, section: str) -> list[str]:
        with safe_open(self.path, framework="pt") as file:
            return [key.removeprefix(section) for key in file.keys() if key.startswith(section)]  # noqa: SIM118

    def _read(self, key: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        with safe_open(self.path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(key)
            return tensor.to(dtype or tensor.dtype)  # refinements leave norms and biases in fp32
