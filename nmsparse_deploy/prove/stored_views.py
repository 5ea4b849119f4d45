"""Which part of which parameter a tensor of a saved checkpoint is.

A library may rename and regroup what it loads: experts that lie in files one by one become one
stack. A pruned model is saved as its checkpoint was, masks carry the names of parameters, and this
is what stands between the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import accumulate

import torch
from pydantic import TypeAdapter, ValidationError

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.masks import Mask, MaskSet
from nmsparse_deploy.prove.scan import FileBytes
from nmsparse_deploy.prove.tensor_files import StoredTensor

FILE = "stored.json"
"""In a run whose saved tensors are not its parameters under their own names."""


@dataclass(frozen=True)
class StoredView:
    """A tensor of a checkpoint, or rows of one, as a view of a parameter that lies row by row;
    strides and offset count values."""

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
        value = value.contiguous()
        start = value.storage_offset() + self.offset
        return value.as_strided(self.shape, self.strides, start)

    def axis(self, shape: tuple[int, ...], axis: int) -> int:
        """Return the axis of the view that runs along `axis` of the parameter, all of it.

        Raises `ValueError` where none does.
        """
        wanted = (shape[axis], row_major(shape)[axis])
        return [*zip(self.shape, self.strides)].index(wanted)


Pieces = tuple[StoredView, ...]
"""A tensor of a checkpoint: a view, or several that are joined along the first axis."""
StoredViews = Mapping[str, Pieces]
"""By the name in the file."""


def shape_of(pieces: Pieces) -> tuple[int, ...]:
    """Return the shape of what the pieces make when they are joined."""
    if len(pieces) == 1:
        return pieces[0].shape
    return (sum(view.shape[0] for view in pieces), *pieces[0].shape[1:])


def labelled(name: str, pieces: Pieces) -> dict[str, StoredView]:
    """Name the pieces of a tensor: one as the tensor, several by their rows."""
    if len(pieces) == 1:
        return {name: pieces[0]}
    ends = [*accumulate(view.shape[0] for view in pieces)]
    return {f"{name}[{end - view.shape[0]}:{end}]": view for view, end in zip(pieces, ends)}


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a tensor that lies row by row."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def views_to_json(views: StoredViews) -> dict[str, object]:
    """Return what `stored.json` holds."""
    return {name: [asdict(view) for view in pieces] for name, pieces in views.items()}


def views_from_json(data: object, where: str) -> StoredViews:
    """Read what `views_to_json` gave. Raises `UsageError` when it is damaged."""
    try:
        return TypeAdapter(dict[str, Pieces]).validate_python(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"'{where}' is damaged: {place}: {first['msg']}.") from error


def stored_pieces(tensor: StoredTensor, views: StoredViews) -> list[StoredTensor]:
    """Cut a tensor that several parameters are joined in into one a parameter; any other stays
    whole. Raises `UsageError` where the views are not of its shape."""
    pieces = views.get(tensor.name, ())
    if not pieces:
        return [tensor]
    if shape_of(pieces) != tensor.shape:
        raise UsageError(f"'{tensor.name}' has another shape than {FILE} says.")
    source, cut, start = tensor.source, [], tensor.source.start
    for label, view in labelled(tensor.name, pieces).items():
        size = source.nbytes * math.prod(view.shape) // max(1, math.prod(tensor.shape))
        cut.append(
            replace(
                tensor, name=label, shape=view.shape, source=FileBytes(source.path, start, size)
            )
        )
        start += size
    return cut


def stored_masks(masks: MaskSet, views: StoredViews) -> MaskSet:
    """Return the masks of the tensors in the file, or of their pieces. A mask of a parameter that
    is in no file keeps its name.

    Raises `UsageError` where the pieces of a parameter are not parts of it, or not all of it.
    """
    if not views:
        return masks
    parts: dict[str, dict[str, StoredView]] = {}
    for name, pieces in views.items():
        for label, view in labelled(name, pieces).items():
            parts.setdefault(view.parameter, {})[label] = view
    stored: dict[str, Mask] = {}
    for parameter, mask in masks.masks.items():
        kept, covered = mask.unpack(), torch.zeros(mask.shape, dtype=torch.bool)
        own = parts.get(parameter, {parameter: StoredView.whole(parameter, mask.shape)})
        for label, view in own.items():
            try:
                part, axis = view.of(kept), view.axis(mask.shape, mask.axis)
            except (RuntimeError, ValueError) as error:
                raise UsageError(
                    f"'{label}' of {FILE} is no part of '{parameter}' along its reduction axis."
                ) from error
            view.of(covered).fill_(True)
            stored[label] = Mask.pack(part, axis, mask.pattern, mask.dense_hash)
        if not bool(covered.all()):
            raise UsageError(f"The parts that {FILE} names are not all of '{parameter}'.")
    return MaskSet(stored, masks.info)
