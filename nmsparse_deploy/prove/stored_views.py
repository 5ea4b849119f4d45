"""Which part of which parameter a tensor of a saved checkpoint is.

A library may rename and regroup what it loads: experts that lie in files one by one become one
stack. A pruned model is saved as its checkpoint was, masks carry the names of parameters, and this
is what stands between the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from pydantic import TypeAdapter, ValidationError

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.masks import Mask, MaskSet

FILE = "stored.json"
"""In a run whose saved tensors are not its parameters under their own names."""


@dataclass(frozen=True)
class StoredView:
    """A tensor of a checkpoint as a view of a parameter that lies row by row; steps and offset
    count values."""

    parameter: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @classmethod
    def whole(cls, parameter: str, shape: tuple[int, ...]) -> StoredView:
        """Return the view of a whole parameter as it is."""
        return cls(parameter, shape, row_major(shape), 0)

    def of(self, value: torch.Tensor) -> torch.Tensor:
        """Return the view of a parameter's `value`."""
        return value.contiguous().as_strided(self.shape, self.strides, self.offset)

    def axis(self, shape: tuple[int, ...], axis: int) -> int:
        """Return the axis of the view that runs along `axis` of the parameter, all of it.

        Raises `ValueError` where none does.
        """
        wanted = (shape[axis], row_major(shape)[axis])
        return [*zip(self.shape, self.strides)].index(wanted)


StoredViews = Mapping[str, StoredView]
"""By the name in the file."""


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a tensor that lies row by row."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def views_to_json(views: StoredViews) -> dict[str, object]:
    """Return what `stored.json` holds."""
    return {name: asdict(view) for name, view in views.items()}


def views_from_json(data: object, where: str) -> StoredViews:
    """Read what `views_to_json` gave. Raises `UsageError` when it is damaged."""
    try:
        return TypeAdapter(dict[str, StoredView]).validate_python(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"'{where}' is damaged: {place}: {first['msg']}.") from error


def stored_masks(masks: MaskSet, views: StoredViews) -> MaskSet:
    """Return the masks of the tensors in the file. A mask of a parameter that is in no file keeps
    its name."""
    if not views:
        return masks
    parts: dict[str, list[tuple[str, StoredView]]] = {}
    for name, view in views.items():
        parts.setdefault(view.parameter, []).append((name, view))
    stored: dict[str, Mask] = {}
    for parameter, mask in masks.masks.items():
        kept = mask.unpack()
        for name, view in parts.get(
            parameter, [(parameter, StoredView.whole(parameter, mask.shape))]
        ):
            try:
                part, axis = view.of(kept), view.axis(mask.shape, mask.axis)
            except (RuntimeError, ValueError) as error:
                raise UsageError(
                    f"'{name}' of {FILE} is no part of '{parameter}' along its reduction axis."
                ) from error
            stored[name] = Mask.pack(part, axis, mask.pattern, mask.dense_hash)
    return MaskSet(stored, masks.info)
