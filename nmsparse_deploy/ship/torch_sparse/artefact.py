"""A pruned model for PyTorch whose 2:4 weights are stored without their zeros.

    FOLDER/config.json ...      what describes the model: configuration, tokenizer, preprocessing
    FOLDER/packed.safetensors   NAME.values and NAME.places of every 2:4 weight (packed.py), in 8 bits also NAME.scale
                                and NAME.read; everything else as it is
    FOLDER/decisions.json       by GEMM: sparse or dense, what its timing said, which setting (kernel_choice.py)

Nothing in it belongs to one GPU but the decisions. The dense weights are not needed: a layer's rows
are unpacked, brought into the order of the kernels, and dropped, one after the other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from nmsparse_deploy import models
from nmsparse_deploy.errors import CheckFailed, NmsparseError, UsageError
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.models.base import Target, from_rows, to_rows
from nmsparse_deploy.models.input_trace import group_axis
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.models.meta_model import fits, settle
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.prove import VerifyReport, verify_tensors
from nmsparse_deploy.ship.quantise import BASE, FORMATS, Range, scale_of
from nmsparse_deploy.ship.torch_sparse.kernel_choice import Decisions
from nmsparse_deploy.ship.torch_sparse.linear import EightBit, encoded, make, replace
from nmsparse_deploy.ship.torch_sparse.packed import Packed, pack, packable, unpack
from nmsparse_deploy.ship.torch_sparse.semi_structured import DTYPES, KernelSetting, kernels
from nmsparse_deploy.system.sparse_cores import shape_fits

FILE, DECISIONS, FORMAT = "packed.safetensors", "decisions.json", "nmsparse-packed-1"
Mode = Literal["auto", "sparse", "dense"]
PARTS = ("values", "places", "scale", "read")


@dataclass(frozen=True)
class KernelChoice:
    """A choice whether a GEMM runs on sparse kernels, and how, by the rows of what it reads."""

    sparse: bool
    settings: Mapping[int, KernelSetting]


@dataclass(frozen=True)
class Entry:
    """One packed weight. `layer` is its module where that is an ordinary layer which can be put in
    its place."""

    shape: tuple[int, ...]
    axis: int
    pattern: str
    layer: str | None
    why_not: str | None
    """Why sparse kernels cannot run it; None where they can."""

    @property
    def k(self) -> int:
        """Return the reduction length as `to_rows` has it: a convolution reduces over its kernel as
        well."""
        return math.prod(self.shape[1:]) if len(self.shape) > 3 else self.shape[self.axis]

    @property
    def n(self) -> int:
        return math.prod(self.shape) // self.k


@dataclass(frozen=True)
class Header:
    """The header of `packed.safetensors`."""

    format: str
    precision: str
    packed: dict[str, Entry]
    kept: dict[str, str]
    """What is stored with its zeros, and why."""
    tied: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class PackedSizes:
    """The sizes before and after packing, and the weights that stayed as they were."""

    weights: int
    packed_bytes: int
    dense_bytes: int
    share: float | None = None
    file_bytes: int = 0
    kept: dict[str, str] = field(default_factory=dict)
    """Why a weight is stored with its zeros."""
    not_sparse: dict[str, str] = field(default_factory=dict)
    """Why sparse kernels cannot run a packed weight."""


def write(
    folder: Path,
    loaded: LoadedModel,
    masks: MaskSet,
    targets: Iterable[Target],
    precision: str,
    ranges: Mapping[str, Range],
) -> PackedSizes:
    """Write `packed.safetensors`; returns what that saved. The caller makes it atomic.

    In 8 bits the packed weights of ordinary layers are codes, with `ranges` by module path for what
    they read; everything else is fp16. Raises `CheckFailed` when a weight is not in its pattern or
    leaves the range of fp16.
    """
    known = {target.name: target for target in targets}
    base = DTYPES[BASE if precision in FORMATS else precision]
    tensors: dict[str, torch.Tensor] = {}
    entries: dict[str, Entry] = {}
    kept: dict[str, str] = {}
    owned = dict(loaded.module.named_parameters())
    for name, value in {**owned, **_buffers(loaded.module)}.items():
        mask = masks.masks.get(name)
        why = (
            ""
            if mask is None
            else _stays(mask.pattern.implies(TWO_FOUR), to_rows(value, mask.axis).shape)
        )
        if mask is None or why:
            tensors[name] = _cast(name, value.detach(), base)
            kept |= {name: why} if why else {}
            continue
        layer = _layer(loaded.module, known.get(name))
        eight = precision in FORMATS and layer is not None and layer in ranges
        rows = to_rows(value.detach(), mask.axis)
        read = (
            torch.tensor(float(scale_of(ranges[layer].read, FORMATS[precision])))
            if eight and layer
            else None
        )
        codes, scales = encoded(
            rows if eight else _cast(name, rows, base), precision if eight else _name(base), read
        )
        packed = pack(codes)
        tensors |= {f"{name}.values": packed.values, f"{name}.places": packed.places}
        if scales is not None:
            tensors |= {f"{name}.scale": scales.weight, f"{name}.read": scales.read.reshape(1)}
        entries[name] = Entry(
            mask.shape, mask.axis, str(mask.pattern), layer, _why_not(layer, precision, rows)
        )
    dense = sum(owned[name].numel() * _size(tensors[f"{name}.values"]) for name in entries)
    packed_bytes = sum(
        tensors[f"{name}.{part}"].nbytes for name in entries for part in ("values", "places")
    )
    header = Header(FORMAT, precision, entries, kept, _tied(loaded.module, owned))
    save_file(
        {name: value.contiguous() for name, value in tensors.items()},
        folder / FILE,
        {FORMAT: json.dumps(asdict(header), sort_keys=True)},
    )
    return PackedSizes(
        weights=len(entries),
        packed_bytes=packed_bytes,
        dense_bytes=dense,
        share=packed_bytes / dense if dense else None,
        file_bytes=(folder / FILE).stat().st_size,
        kept=kept,
        not_sparse={name: entry.why_not for name, entry in entries.items() if entry.why_not},
    )


def _name(dtype: torch.dtype) -> str:
    return next(name for name, kind in DTYPES.items() if kind == dtype)


def _size(values: torch.Tensor) -> int:
    return values.element_size()


def _buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that belong to a checkpoint."""
    stored, parameters = (
        module.state_dict(),
        {name for name, _ in module.named_parameters(remove_duplicate=False)},
    )
    return {
        name: value
        for name, value in stored.items()
        if name not in parameters and isinstance(value, torch.Tensor)
    }


def _tied(module: nn.Module, owned: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return the first name of a parameter by its second ones."""
    first = {id(value): name for name, value in owned.items()}
    return {
        name: first[id(value)]
        for name, value in module.named_parameters(remove_duplicate=False)
        if first[id(value)] != name
    }


def _stays(implies: bool, shape: tuple[int, ...]) -> str:
    if not implies:
        return f"its pattern is not {TWO_FOUR}"
    return (
        ""
        if packable(shape[1], shape[0])
        else f"its rows of {shape[1]} values do not fill whole bytes"
    )


def _layer(module: nn.Module, target: Target | None) -> str | None:
    """Return the path of an ordinary layer: called as such, a matrix, its weight its own."""
    if target is None or target.watched or target.experts > 1:
        return None
    layer = module.get_submodule(target.module)
    ordinary = group_axis(layer) is not None and layer.weight.ndim == 2
    return target.module if ordinary and layer.weight is module.get_parameter(target.name) else None


def _why_not(layer: str | None, precision: str, rows: torch.Tensor) -> str | None:
    if layer is None:
        return "it is not the weight of an ordinary layer"
    n, k = rows.shape
    return (
        None
        if shape_fits(precision, k, n)
        else f"the kernels do not take the shape {k} x {n} in {precision}"
    )


def _cast(name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not value.is_floating_point():
        return value
    cast = value.to(dtype)
    if not torch.isfinite(cast).all():
        raise CheckFailed(
            f"'{name}' has values that {_name(dtype)} cannot hold.", "--precision bf16"
        )
    return cast


class Artefact:
    """A folder that `write` made. Raises `UsageError` when it is missing or damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / FILE).is_file():
            raise UsageError(
                f"'{folder}' holds no packed model (no {FILE}).", "nmsparse-deploy export --torch"
            )
        with self._file() as file:
            header = TypeAdapter(Header).validate_json((file.metadata() or {})[FORMAT])
            self.precision, self.entries, self.tied = header.precision, header.packed, header.tied
            packed = {f"{name}.{part}" for name in self.entries for part in PARTS}
            self.plain = [name for name in file.keys() if name not in packed]  # noqa: SIM118
        self.base = DTYPES[BASE if self.precision in FORMATS else self.precision]

    def _file(self) -> Any:
        return _Reading(self.folder / FILE)

    def rows(self, name: str, device: torch.device) -> tuple[torch.Tensor, EightBit | None]:
        """Return one weight as `[n, k]` with its zeros, and its scales in 8 bits."""
        with self._file() as file:
            held = {part: file.get_tensor(f"{name}.{part}") for part in ("values", "places")}
            packed, entry = (
                Packed(held["values"].to(device), held["places"].to(device)),
                self.entries[name],
            )
            if packed.shape != (entry.n, entry.k):
                raise ValueError(f"'{name}' has the shape {packed.shape}, not {(entry.n, entry.k)}")
            rows = unpack(packed)
            if rows.element_size() > 1:
                return rows, None
            return rows, EightBit(
                *(file.get_tensor(f"{name}.{part}").to(device) for part in ("scale", "read"))
            )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the packed weights in the layout of their masks, as codes in 8 bits, for
        verification."""
        return {
            name: from_rows(self.rows(name, torch.device("cpu"))[0], entry.shape, entry.axis)
            for name, entry in self.entries.items()
        }

    def dense(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Return those of `names` that are stored as they are."""
        with self._file() as file:
            return {name: file.get_tensor(name) for name in names if name in self.plain}

    def choices(self, mode: Mode, device: torch.device) -> dict[str, KernelChoice]:
        """Decide what runs sparse. `auto` follows the decisions. Raises `UsageError` when they are
        of another GPU."""
        able = {name: entry for name, entry in self.entries.items() if entry.why_not is None}
        if mode != "auto":
            return {name: KernelChoice(mode == "sparse", {}) for name in able}
        made = self.decisions()
        if made is None:
            raise UsageError(
                f"The GEMMs of '{self.folder}' were not timed yet.",
                "nmsparse-deploy export --torch on the GPU that will run it, or mode 'sparse'",
            )
        here = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        if made.gpu != here:
            raise UsageError(
                f"The decisions of '{self.folder}' were made on {made.gpu}, and this is {here}.",
                "nmsparse-deploy export --torch times them again",
            )
        return {
            name: KernelChoice(gemm.keep == "sparse", gemm.settings)
            for gemm in made.gemms
            for name in gemm.weights
            if name in able
        }

    def decisions(self) -> Decisions | None:
        path = self.folder / DECISIONS
        try:
            return (
                TypeAdapter(Decisions).validate_json(path.read_bytes()) if path.is_file() else None
            )
        except ValidationError as error:
            raise UsageError(
                f"'{path}' is damaged: {error.errors()[0]['msg']}.",
                "nmsparse-deploy export --torch writes it again",
            ) from error

    def load(self, mode: Mode, device: torch.device) -> LoadedModel:
        """Load the model on `device`, with compressed weights where `mode` says sparse."""
        choices = self.choices(mode, device)
        if any(choice.sparse for choice in choices.values()) and (
            why := kernels().why_not(self.precision)
        ):
            raise NmsparseError(
                f"Sparse kernels cannot run {self.precision} here: {why}.",
                "mode 'dense' runs the same weights without them",
            )
        loaded = models.adapter_for(str(self.folder)).meta_model(self.folder, self.base)
        with self._file() as file:
            held = {name: file.get_tensor(name).to(device) for name in self.plain}
        layers = {entry.layer: name for name, entry in self.entries.items() if entry.layer}
        held |= {
            name: from_rows(self.rows(name, device)[0], entry.shape, entry.axis)
            for name, entry in self.entries.items()
            if not entry.layer
        }
        held |= {alias: held[name] for alias, name in self.tied.items() if name in held}
        try:
            settle(loaded.module, held)
            for name in layers.values():
                fits(loaded.module, name, self.entries[name].shape)
        except (AttributeError, ValueError) as error:
            raise UsageError(
                f"'{self.folder / FILE}' does not fit its config.json: {error}."
            ) from error
        for path, name in layers.items():
            rows, scales = self.rows(name, device)
            choice = choices.get(name, KernelChoice(False, {}))
            bias = held.get(f"{path}.bias")
            replace(
                loaded.module,
                path,
                make(rows, bias, choice.sparse, self.base, scales, dict(choice.settings)),
            )
        held_here = (*loaded.module.named_parameters(), *loaded.module.named_buffers())
        missing = [name for name, value in held_here if value.is_meta]
        if missing:
            raise UsageError(f"'{self.folder / FILE}' is damaged: it lacks '{missing[0]}'.")
        loaded.module.to(device)
        return loaded


def verify_packed(folder: Path, masks: MaskSet) -> VerifyReport:
    """Check every mask against what a packed model really stores."""
    artefact = Artefact(folder)
    plain = artefact.dense([name for name in masks.masks if name not in artefact.entries])
    return verify_tensors({**artefact.tensors(), **plain}, masks, str(folder), "file")


class _Reading:
    """`safe_open` with its errors, and those of what is read from it, as one sentence."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Any:
        try:
            self._file = safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UsageError(f"'{self.path}' is damaged or truncated: {error}.") from error
        return self._file.__enter__()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        self._file.__exit__(kind, error, trace)
        if isinstance(
            error, (SafetensorError, KeyError, TypeError, ValueError, AttributeError, IndexError)
        ):
            raise UsageError(
                f"'{self.path}' is damaged or no packed model of this tool: {error}."
            ) from error
