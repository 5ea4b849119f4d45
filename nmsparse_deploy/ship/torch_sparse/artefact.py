"""A pruned model for PyTorch whose 2:4 weights are stored without their zeros, and what runs it.

    FOLDER/config.json ...      what describes the model: configuration, tokenizer, preprocessing
    FOLDER/packed.safetensors   NAME.values and NAME.places of every 2:4 weight (packed.py), in 8 bits also NAME.scale
                                and NAME.read; everything else as it is
    FOLDER/decisions.json       by GEMM: sparse or dense, what its timing said, which setting (bench/auto.py)

Nothing in it belongs to one GPU but the decisions. The dense weights are not needed: a layer's rows are unpacked,
brought into the order of the kernels, and dropped, one after the other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
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
from nmsparse_deploy.models.outputs import UNNAMED
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.ship.engine import Tensor
from nmsparse_deploy.ship.quantise import BASE, FORMATS, Range, scale_of
from nmsparse_deploy.ship.torch_sparse.linear import EightBit, encoded, make, replace
from nmsparse_deploy.ship.torch_sparse.packed import Packed, pack, packable, unpack
from nmsparse_deploy.ship.torch_sparse.semi_structured import DTYPES, Setting, kernels
from nmsparse_deploy.system import hardware
from nmsparse_deploy.system.cuda_graphs import record
from nmsparse_deploy.system.sparse_cores import shape_fits

FILE, DECISIONS, FORMAT = "packed.safetensors", "decisions.json", "nmsparse-packed-1"
Mode = Literal["auto", "sparse", "dense"]
PARTS = ("values", "places", "scale", "read")


@dataclass(frozen=True)
class KernelChoice:
    """Whether a GEMM runs on sparse kernels, and how, by the rows of what it reads."""

    sparse: bool
    settings: Mapping[int, Setting]


@dataclass(frozen=True)
class Entry:
    """One packed weight. `layer` is its module where that is an ordinary layer which can be put in its place."""

    shape: tuple[int, ...]
    axis: int
    pattern: str
    layer: str | None
    why_not: str | None
    """Why sparse kernels cannot run it; None where they can."""

    @property
    def k(self) -> int:
        """Return the reduction length as `to_rows` has it: a convolution reduces over its kernel as well."""
        return int(np.prod(self.shape[1:])) if len(self.shape) > 3 else self.shape[self.axis]

    @property
    def n(self) -> int:
        return int(np.prod(self.shape)) // self.k


def write(folder: Path, loaded: LoadedModel, masks: MaskSet, targets: Iterable[Target], precision: str,
          ranges: Mapping[str, Range]) -> dict[str, Any]:
    """Write `packed.safetensors`; returns sizes and what stayed as it was and why. The caller makes it atomic.

    In 8 bits the packed weights of ordinary layers are codes, with `ranges` by module path for what they read;
    everything else is fp16. Raises `CheckFailed` when a weight is not in its pattern or leaves the range of fp16.
    """
    known = {target.name: target for target in targets}
    base = DTYPES[BASE if precision in FORMATS else precision]
    tensors: dict[str, torch.Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}
    kept: dict[str, str] = {}
    owned = dict(loaded.module.named_parameters())
    for name, value in {**owned, **_buffers(loaded.module)}.items():
        mask = masks.masks.get(name)
        why = "" if mask is None else _stays(mask.pattern.implies(TWO_FOUR), to_rows(value, mask.axis).shape)
        if mask is None or why:
            tensors[name] = _cast(name, value.detach(), base)
            kept |= {name: why} if why else {}
            continue
        layer = _layer(loaded.module, known.get(name))
        eight = precision in FORMATS and layer is not None and layer in ranges
        rows = to_rows(value.detach(), mask.axis)
        read = torch.tensor(float(scale_of(ranges[layer].read, FORMATS[precision]))) if eight and layer else None
        codes, scales = encoded(rows if eight else _cast(name, rows, base), precision if eight else _name(base), read)
        packed = pack(codes)
        tensors |= {f"{name}.values": packed.values, f"{name}.places": packed.places}
        if scales is not None:
            tensors |= {f"{name}.scale": scales.weight, f"{name}.read": scales.read.reshape(1)}
        entries[name] = {"shape": list(mask.shape), "axis": mask.axis, "pattern": str(mask.pattern), "layer": layer,
                         "why_not": _why_not(layer, precision, rows)}
    dense = sum(owned[name].numel() * _size(tensors[f"{name}.values"]) for name in entries)
    packed_bytes = sum(tensors[f"{name}.{part}"].nbytes for name in entries for part in ("values", "places"))
    header = {"format": FORMAT, "precision": precision, "packed": entries, "kept": kept,
              "tied": _tied(loaded.module, owned)}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / FILE,
              {FORMAT: json.dumps(header, sort_keys=True)})
    return {"weights": len(entries), "packed_bytes": packed_bytes, "dense_bytes": dense,
            "share": packed_bytes / dense if dense else None, "file_bytes": (folder / FILE).stat().st_size,
            "kept": kept, "not_sparse": {name: row["why_not"] for name, row in entries.items() if row["why_not"]}}


def _name(dtype: torch.dtype) -> str:
    return next(name for name, found in DTYPES.items() if found == dtype)


def _size(values: torch.Tensor) -> int:
    return values.element_size()


def _buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that belong to a checkpoint."""
    stored, parameters = module.state_dict(), {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in stored.items() if name not in parameters and isinstance(value, torch.Tensor)}


def _tied(module: nn.Module, owned: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return the first name of a parameter by its second ones."""
    first = {id(value): name for name, value in owned.items()}
    return {name: first[id(value)] for name, value in module.named_parameters(remove_duplicate=False)
            if first[id(value)] != name}


def _stays(implies: bool, shape: tuple[int, ...]) -> str:
    if not implies:
        return f"its pattern is not {TWO_FOUR}"
    return "" if packable(shape[1], shape[0]) else f"its rows of {shape[1]} values do not fill whole bytes"


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
    return None if shape_fits(precision, k, n) else f"the kernels do not take the shape {k} x {n} in {precision}"


def _cast(name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not value.is_floating_point():
        return value
    found = value.to(dtype)
    if not torch.isfinite(found).all():
        raise CheckFailed(f"'{name}' has values that {_name(dtype)} cannot hold.", "--precision bf16")
    return found


class Artefact:
    """A folder that `write` made. Raises `UsageError` when it is missing or damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / FILE).is_file():
            raise UsageError(f"'{folder}' holds no packed model (no {FILE}).", "nmsparse-deploy export --torch")
        with self._file() as file:
            header = json.loads((file.metadata() or {})[FORMAT])
            self.precision: str = header["precision"]
            self.entries = {name: Entry(**row | {"shape": tuple(row["shape"])})
                            for name, row in header["packed"].items()}
            self.tied: dict[str, str] = header["tied"]
            packed = {f"{name}.{part}" for name in self.entries for part in PARTS}
            self.plain = [name for name in file.keys() if name not in packed]  # noqa: SIM118
        self.base = DTYPES[BASE if self.precision in FORMATS else self.precision]

    def _file(self) -> Any:
        return _Reading(self.folder / FILE)

    def rows(self, name: str, device: torch.device) -> tuple[torch.Tensor, EightBit | None]:
        """Return one weight as `[n, k]` with its zeros, and its scales in 8 bits."""
        with self._file() as file:
            held = {part: file.get_tensor(f"{name}.{part}") for part in ("values", "places")}
            packed, entry = Packed(held["values"].to(device), held["places"].to(device)), self.entries[name]
            if packed.shape != (entry.n, entry.k):
                raise ValueError(f"'{name}' has the shape {packed.shape}, not {(entry.n, entry.k)}")
            rows = unpack(packed)
            if rows.element_size() > 1:
                return rows, None
            return rows, EightBit(*(file.get_tensor(f"{name}.{part}").to(device) for part in ("scale", "read")))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the packed weights in the layout of their masks, as codes in 8 bits, for verification."""
        return {name: from_rows(self.rows(name, torch.device("cpu"))[0], entry.shape, entry.axis)
                for name, entry in self.entries.items()}

    def dense(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Return those of `names` that are stored as they are."""
        with self._file() as file:
            return {name: file.get_tensor(name) for name in names if name in self.plain}

    def choices(self, mode: Mode, device: torch.device) -> dict[str, KernelChoice]:
        """Decide what runs sparse. `auto` follows the decisions. Raises `UsageError` when they are of another GPU."""
        able = {name: entry for name, entry in self.entries.items() if entry.why_not is None}
        if mode != "auto":
            return {name: KernelChoice(mode == "sparse", {}) for name in able}
        made = self.decisions()
        if made is None:
            raise UsageError(f"The GEMMs of '{self.folder}' were not timed yet.",
                             "nmsparse-deploy export --torch on the GPU that will run it, or mode 'sparse'")
        here = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        if made["gpu"] != here:
            raise UsageError(f"The decisions of '{self.folder}' were made on {made['gpu']}, and this is {here}.",
                             "nmsparse-deploy export --torch times them again")
        found: dict[str, KernelChoice] = {}
        for row in made["gemms"]:
            settings = {int(rows): Setting(**one) for rows, one in (row.get("settings") or {}).items()}
            found |= {name: KernelChoice(row["keep"] == "sparse", settings) for name in row["weights"] if name in able}
        return found

    def decisions(self) -> dict[str, Any] | None:
        path = self.folder / DECISIONS
        try:
            return json.loads(path.read_text()) if path.is_file() else None
        except ValueError as error:
            raise UsageError(f"'{path}' is damaged: {error}.", "nmsparse-deploy export --torch writes it again") \
                from error

    def load(self, mode: Mode, device: torch.device) -> LoadedModel:
        """Load the model on `device`, with compressed weights where `mode` says sparse."""
        choices = self.choices(mode, device)
        if any(choice.sparse for choice in choices.values()) and (why := kernels().why_not(self.precision)):
            raise NmsparseError(f"Sparse kernels cannot run {self.precision} here: {why}.",
                                "mode 'dense' runs the same weights without them")
        loaded = models.adapter_for(str(self.folder)).meta_model(self.folder, self.base)
        with self._file() as file:
            held = {name: file.get_tensor(name).to(device) for name in self.plain}
        layers = {entry.layer: name for name, entry in self.entries.items() if entry.layer}
        held |= {name: from_rows(self.rows(name, device)[0], entry.shape, entry.axis)
                 for name, entry in self.entries.items() if not entry.layer}
        held |= {alias: held[name] for alias, name in self.tied.items() if name in held}
        try:
            settle(loaded.module, held)
            for name in layers.values():
                fits(loaded.module, name, self.entries[name].shape)
        except (AttributeError, ValueError) as error:
            raise UsageError(f"'{self.folder / FILE}' does not fit its config.json: {error}.") from error
        for path, name in layers.items():
            rows, scales = self.rows(name, device)
            choice = choices.get(name, KernelChoice(False, {}))
            bias = held.get(f"{path}.bias")
            replace(loaded.module, path, make(rows, bias, choice.sparse, self.base, scales, dict(choice.settings)))
        held_here = (*loaded.module.named_parameters(), *loaded.module.named_buffers())
        missing = [name for name, value in held_here if value.is_meta]
        if missing:
            raise UsageError(f"'{self.folder / FILE}' is damaged: it lacks '{missing[0]}'.")
        loaded.module.to(device)
        return loaded


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
        if isinstance(error, (SafetensorError, KeyError, TypeError, ValueError, AttributeError, IndexError)):
            raise UsageError(f"'{self.path}' is damaged or no packed model of this tool: {error}.") from error


class TorchSparse:
    """A packed model that runs.

    With `compile` it goes through torch.compile; with `cuda_graph` a batch of every new shape is recorded, and replayed
    for the next ones.
    """

    SETTINGS: Mapping[str, Any] = {"mode": "auto", "device": None, "compile": False, "cuda_graph": False}

    def __init__(self, artefact: Artefact, loaded: LoadedModel, settings: Mapping[str, Any]) -> None:
        self.artefact, self.loaded, self.settings = artefact, loaded, dict(settings)
        self._call: Any = torch.compile(loaded.module) if settings["compile"] else loaded.module
        self._recorded: dict[Any, tuple[dict[str, torch.Tensor], Any]] = {}

    @classmethod
    def build(cls, artefact: Path, settings: Mapping[str, Any] | None = None) -> Self:
        """Load a packed model. Raises `UsageError` for an unknown setting, `NmsparseError` without sparse kernels."""
        unknown = set(settings or {}) - set(cls.SETTINGS)
        if unknown:
            raise UsageError(f"torch-sparse has no setting '{min(unknown)}'; it has {', '.join(cls.SETTINGS)}.")
        chosen = {**cls.SETTINGS, **(settings or {})}
        device = torch.device(chosen["device"] or hardware.device())
        if chosen["cuda_graph"] and device.type != "cuda":
            raise UsageError("A CUDA graph needs a CUDA device.", "leave out cuda_graph")
        opened = Artefact(artefact)
        return cls(opened, opened.load(chosen["mode"], device), chosen)

    def inspect(self) -> dict[str, Any]:
        return {"engine": "torch-sparse", "kernels": kernels().name, "precision": self.artefact.precision,
                **self.settings, "gemms": {name: type(layer).__name__ for name, layer in self.layers().items()}}

    def layers(self) -> dict[str, nn.Module]:
        """Return the layers that were put in place, by parameter name."""
        return {name: self.loaded.module.get_submodule(entry.layer) for name, entry in self.artefact.entries.items()
                if entry.layer}

    @torch.inference_mode()
    def run(self, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        module = self.loaded.module
        device = next(chain(module.parameters(), module.buffers())).device  # all parameters may be packed
        inputs = {name: torch.as_tensor(value).to(device) for name, value in batch.items()}
        floating = {name: value.to(self.artefact.base) if value.is_floating_point() else value
                    for name, value in inputs.items()}
        output = self._replayed(floating) if self.settings["cuda_graph"] else self._call(**floating)
        named = {UNNAMED: output} if isinstance(output, torch.Tensor) else dict(output.items())
        return {name: value.float().cpu().numpy() if value.is_floating_point() else value.cpu().numpy()
                for name, value in named.items() if isinstance(value, torch.Tensor)}

    def _replayed(self, inputs: dict[str, torch.Tensor]) -> Any:
        """Replay the recording for these shapes, with these values in its inputs."""
        key = tuple((name, tuple(value.shape), value.dtype) for name, value in sorted(inputs.items()))
        if key not in self._recorded:
            held = {name: value.clone() for name, value in inputs.items()}
            self._recorded[key] = held, record(lambda: self._call(**held))
        held, replay = self._recorded[key]
        for name, value in inputs.items():
            held[name].copy_(value)
        return replay()
