"""The tower of a vision-language model that sees pictures, as a module and a graph of its own.

The model's own graph reads text, as its tokens come; what only runs where a picture is given is not
in it. That part is exported alone, on the inputs that the model calls it with.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from nmsparse_deploy.errors import NmsparseError, first_line
from nmsparse_deploy.models.base import Target
from nmsparse_deploy.models.capture import capture
from nmsparse_deploy.models.input_trace import trace
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.models.outputs import primary_output
from nmsparse_deploy.prove.agreement import Agreement, NotCompared, agreement

Arrays = Mapping[str, np.ndarray]

VISION = "vision"
"""The name of its graph."""


class VisionTower(nn.Module):
    """One submodule of a model, under the names that it has there."""

    def __init__(self, path: str, tower: nn.Module) -> None:
        super().__init__()
        self.path = path
        place: nn.Module = self
        *around, last = path.split(".")
        for name in around:
            place.add_module(name, nn.Module())
            place = place.get_submodule(name)
        place.add_module(last, tower)

    def forward(self, **inputs: torch.Tensor) -> Any:
        return self.get_submodule(self.path)(**inputs)


@dataclass(frozen=True)
class Towers:
    """Targets by the graph that they are in; `vision` is None where all are in the model's own."""

    own: list[Target]
    seen: list[Target]
    vision: VisionTower | None = None
    between: tuple[Target, ...] = ()
    """In no graph: what leads from one tower to the other."""

    def inputs(self, loaded: LoadedModel, batch: int = 2) -> dict[str, torch.Tensor]:
        """Return the tensors that the model calls the tower with, for `batch` pictures of noise."""
        assert self.vision is not None
        given: dict[str, torch.Tensor] = {}
        tower = loaded.module.get_submodule(self.vision.path)

        def called(args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            bound = inspect.signature(tower.forward).bind(*args, **named).arguments
            tensors = {
                key: value for key, value in bound.items() if isinstance(value, torch.Tensor)
            }
            given.update(tensors)

        with (
            torch.no_grad(),
            capture(loaded.module, {self.vision.path: called}, stop=lambda: bool(given)),
        ):
            loaded.module(**loaded.trial_inputs(batch))
        return given


def towers_of(loaded: LoadedModel, blocks: Sequence[str], targets: Sequence[Target]) -> Towers:
    """Sort targets by whether their blocks run on text alone."""
    if loaded.image_text is None:
        return Towers(list(targets), [])
    reading = set(trace(loaded.module, tuple(blocks), loaded.sample_inputs()).order)
    own = [target for target in targets if blocks[target.block] in reading]
    seen = [target for target in targets if blocks[target.block] not in reading]
    if not seen:
        return Towers(own, [])
    path = blocks[seen[0].block]
    while (around := path.rpartition(".")[0]) and not any(
        block.startswith(around + ".") for block in reading
    ):
        path = around
    inside = [target for target in seen if target.name.startswith(f"{path}.")]
    between = tuple(target for target in seen if target not in inside)
    return Towers(own, inside, VisionTower(path, loaded.module.get_submodule(path)), between)


@torch.no_grad()
def compare_tower(
    towers: Towers, loaded: LoadedModel, run: Callable[[Mapping[str, torch.Tensor]], Arrays]
) -> Agreement | NotCompared:
    """Compare what a runtime makes of another number of pictures with the tower in fp32, or say why
    that is impossible here."""
    assert towers.vision is not None
    inputs = {
        name: value.float() if value.is_floating_point() else value
        for name, value in towers.inputs(loaded, 3).items()
    }
    reference = primary_output(towers.vision.float()(**inputs))
    try:
        output = next(iter(run(inputs).values()))
    except NmsparseError as error:
        return NotCompared(error.message)
    except (RuntimeError, NotImplementedError) as error:  # a processor without this precision
        return NotCompared(first_line(error))
    return agreement(reference.value, output, reference.kind)
