"""Units that a block refinement works on: the whole block, or its two halves one after the
other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import nn

from nmsparse_deploy.find.facts import Json
from nmsparse_deploy.find.refine.base import BlockPair
from nmsparse_deploy.models.capture import capture
from nmsparse_deploy.models.residual_stream import find_middle, parameters_before


@dataclass(frozen=True)
class Unit:
    """A part of a block that is refined together: its parameters, and the way from a block's input
    to the place of the loss."""

    parameters: list[str]
    forward: Callable[[nn.Module, int, torch.Tensor], torch.Tensor]
    leaves: bool = True
    """Is the place of the loss the block's exit?"""


if TYPE_CHECKING:
    from _typeshed import DataclassInstance


T = TypeVar("T", bound="DataclassInstance")


@dataclass(frozen=True)
class UnitFacts(Generic[T]):
    """The report of a refinement that works unit by unit; each unit has a dataclass of its own."""

    units: tuple[T, ...]

    def to_json(self) -> Json:
        return {f"unit {number}": asdict(unit) for number, unit in enumerate(self.units)}


def units(block: BlockPair, size: str) -> list[Unit]:
    """Return the block as one unit, or (`half`, where it has a middle) as two."""
    names = [name for name, value in block.module.named_parameters() if value.is_floating_point()]
    entrance = block.inputs[0]
    middle = (
        find_middle(block.dense, lambda m: block.run(m, 0, entrance), entrance)
        if size == "half"
        else None
    )
    if middle is None:
        return [Unit(names, block.run)]
    first = parameters_before(block.dense, lambda m: block.run(m, 0, entrance), middle)

    def to_the_middle(module: nn.Module, number: int, x: torch.Tensor) -> torch.Tensor:
        states: list[torch.Tensor] = []
        with capture(
            module, {middle: lambda args, _named: states.append(args[0])}, stop=lambda: bool(states)
        ):
            block.run(module, number, x)
        return states[0]

    return [
        Unit([name for name in names if name in first], to_the_middle, False),
        Unit([name for name in names if name not in first], block.run),
    ]
