"""The link map: parameter <-> ONNX node <-> initializer <-> axis, each row proven by value.

The exporter renames and transposes most weights, so names alone say nothing. A row is found through
the module path that the exporter leaves on each node, and counts only if the stored values are the
parameter's, bit for bit, along the same reduction axis.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from nmsparse_deploy.errors import CheckFailed, UsageError
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.models.base import Target
from nmsparse_deploy.prove import VerifyReport, verify_onnx
from nmsparse_deploy.prove.group_counter import TORCH_ELEMENTS
from nmsparse_deploy.system.progress import Progress, silent

if TYPE_CHECKING:
    from nmsparse_deploy.prove.onnx_graph import OnnxGraph, WeightUse

FORMAT = "nmsparse-link-1"
BAKE = "bake the mask into the weight before the export"


@dataclass(frozen=True)
class LinkRow:
    """One use of one target in the graph. `axis`, `shape` and `sha256` (of the bytes) are of the
    stored tensor."""

    parameter: str
    module: str
    node: str
    op: str
    tensor: str
    axis: int
    shape: tuple[int, ...]
    dtype: str
    sha256: str


_ROWS = TypeAdapter(tuple[LinkRow, ...])
_NAMES = TypeAdapter(tuple[str, ...])


@dataclass(frozen=True)
class LinkMap:
    """The places of a model's targets in an ONNX file. A target that is used twice has two rows."""

    onnx: str
    rows: tuple[LinkRow, ...]
    elsewhere: tuple[str, ...] = ()
    """Pruned parameters that this graph has no use for: those of the model's other tower."""

    def of(self, parameter: str) -> tuple[LinkRow, ...]:
        return tuple(row for row in self.rows if row.parameter == parameter)

    def by_parameter(self) -> dict[str, tuple[LinkRow, ...]]:
        """Return the rows as `verify_onnx` takes them."""
        return {name: self.of(name) for name in dict.fromkeys(row.parameter for row in self.rows)}

    def as_dict(self) -> dict[str, object]:
        rows = [asdict(row) for row in self.rows]
        elsewhere = {"elsewhere": list(self.elsewhere)} if self.elsewhere else {}
        return {"format": FORMAT, "onnx": self.onnx, "rows": rows, **elsewhere}

    def masks_here(self, masks: MaskSet) -> MaskSet:
        """Return the masks of what this graph should hold."""
        here = {name: mask for name, mask in masks.masks.items() if name not in self.elsewhere}
        return MaskSet(here, masks.info)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> LinkMap:
        """Read a link file. Raises `UsageError` when it is missing or damaged."""
        if not path.is_file():
            raise UsageError(f"There is no link file '{path}'.")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise ValueError(f"its format is '{data['format']}', not '{FORMAT}'")
            return cls(
                data["onnx"],
                _ROWS.validate_json(json.dumps(data["rows"]), strict=True),
                _NAMES.validate_python(data.get("elsewhere", [])),
            )
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(str(part) for part in first["loc"])
            raise UsageError(
                f"The link file '{path}' is damaged: row {field}: {first['msg']}."
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"The link file '{path}' is damaged: {error}.") from error


def verify_linked(
    path: Path, masks: MaskSet, links: LinkMap, progress: Progress = silent
) -> VerifyReport:
    """Verify an exported graph against the masks of what it should hold."""
    return verify_onnx(path, links.masks_here(masks), links.by_parameter(), progress=progress)


def link(path: Path, module: nn.Module, targets: Sequence[Target]) -> LinkMap:
    """Return the link map of `path`, which was exported from exactly this (cast) `module`.

    Raises `CheckFailed` for a target without a proven row, or with a use whose values are not the
    parameter's.
    """
    from nmsparse_deploy.prove.onnx_graph import OnnxGraph

    graph = OnnxGraph(path)
    modules = {name for name, _ in module.named_modules()}
    uses: dict[str, list[WeightUse]] = {}
    for use in graph.uses:
        if use.problems:
            raise CheckFailed(
                f"The ONNX node '{use.node}' does not multiply by what is stored: {use.problems[0]}.",
                BAKE,
            )
        uses.setdefault(_innermost(use.scopes, modules), []).append(use)
    rows = [
        row
        for target in targets
        for row in _rows(graph, target, _own_tensors(module, target), _candidates(target, uses))
    ]
    return LinkMap(path.name, tuple(rows))


def _candidates(target: Target, uses: dict[str, list[WeightUse]]) -> list[WeightUse]:
    """Return uses in the target's own module, or where that is not called in the nearest one around
    it that has any."""
    place = target.module
    while target.watched and place and place not in uses:
        place = place.rpartition(".")[0]
    return uses.get(place, [])


def _rows(
    graph: OnnxGraph, target: Target, own: dict[str, torch.Tensor], uses: list[WeightUse]
) -> Iterator[LinkRow]:
    """Yield one row per use in the target's own module whose values are the target's."""
    parameter = own[target.name]
    bits, axis, linked = _tensor_bits(parameter), target.axis % parameter.ndim, False
    for use in uses:
        if sorted(use.shape) != sorted(parameter.shape):
            continue
        raw = _array_bits(graph.read(use.tensor))
        if (
            _same(raw, bits.swapaxes(axis, use.axis))
            and use.dtype == TORCH_ELEMENTS[parameter.dtype]
        ):
            linked = True
            yield LinkRow(
                target.name,
                target.module,
                use.node,
                use.op,
                use.tensor,
                use.axis,
                tuple(use.shape),
                use.dtype,
                hashlib.sha256(np.ascontiguousarray(raw).data).hexdigest(),
            )
        elif not target.watched and not any(
            _same(raw, view) for tensor in own.values() for view in _views(_tensor_bits(tensor))
        ):
            raise CheckFailed(
                f"The ONNX node '{use.node}' multiplies by other values than the parameter "
                f"'{target.name}' holds: its module changes the weight while it runs.",
                BAKE,
            )
    if not linked:
        raise CheckFailed(
            f"The parameter '{target.name}' was not found in the ONNX graph, so its pattern cannot be "
            "followed there."
        )


def _own_tensors(module: nn.Module, target: Target) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers that lie directly in the target's module, by full name."""
    prefix = f"{target.module}." if target.module else ""
    try:
        child = module.get_submodule(target.module)
    except AttributeError:
        raise UsageError(f"The model has no module '{target.module}'.") from None
    own = {
        prefix + name: tensor
        for named in (child.named_parameters, child.named_buffers)
        for name, tensor in named(recurse=False, remove_duplicate=False)
    }
    if target.name not in own:
        raise UsageError(f"The model has no parameter '{target.name}'.")
    return own


def _innermost(scopes: Sequence[str], modules: set[str]) -> str:
    """Return the deepest module a node belongs to; the last scopes of a node name operators, not
    modules."""
    return next((scope for scope in reversed(scopes) if scope in modules), "")


def _tensor_bits(tensor: torch.Tensor) -> np.ndarray:
    """Return the values as unsigned integers: bf16 has no NumPy type, and bits tell minus zero from
    zero."""
    tensor = tensor.detach()
    return (
        tensor.view(
            {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
        )
        .numpy()
        .view(f"u{tensor.itemsize}")
    )


def _array_bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.itemsize}")


def _views(bits: np.ndarray) -> tuple[np.ndarray, ...]:
    return (bits, bits.swapaxes(-1, -2)) if bits.ndim >= 2 else (bits,)


def _same(stored: np.ndarray, bits: np.ndarray) -> bool:
    return stored.dtype == bits.dtype and np.array_equal(stored, bits)
