"""A model is saved in the names and the layout that its checkpoint has."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.models.adapters import transformers_private
from nmsparse_deploy.prove.stored_views import StoredView, StoredViews, shape_of
from nmsparse_deploy.prove.tensor_files import StoredTensor, find_tensors

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""By their names in safetensors."""
CHUNK = 16 << 20
"""Bytes that are read at a time."""
PROBED = 64
"""Values of a tensor that are compared with the file."""
PATTERN = "model{suffix}.safetensors"
INDEX = "model.safetensors.index.json"

ReadParameter = Callable[[str], torch.Tensor]


def layout_of(
    module: Any, folder: Path | None, dense: ReadParameter, provenance: dict[str, str]
) -> StoredViews:
    """Return how the checkpoint in `folder` lies in the parameters of `module`, checked on values
    that `dense` reads; empty where it lies there as it is.

    A layout that cannot be restored is told to `provenance`; the model is then saved in the
    library's own.
    """
    shapes, stored = _tensors(folder) if folder else ({}, None)
    try:
        views = transformers_private.stored_views(module, shapes) if stored else {}
        if stored:
            _probe(views, stored, dense)
    except ValueError as error:
        provenance["saved_layout"] = f"{type(module).__name__}'s own: {error}"
        return {}
    return views


def _tensors(folder: Path) -> tuple[dict[str, tuple[int, ...]], ReadParameter | None]:
    """Return the shapes of a checkpoint's tensors, and what reads one; nothing where they cannot
    be had without reading all of them."""
    try:
        tensors = {tensor.name: tensor for tensor in find_tensors(folder)}
        return {name: tensor.shape for name, tensor in tensors.items()}, lambda n: read(tensors[n])
    except UsageError:
        files = sorted(folder.glob("pytorch_model*.bin"))
    try:
        state = {
            name: value
            for file in files
            for name, value in torch.load(file, "cpu", weights_only=True, mmap=True).items()
        }
        return {name: tuple(value.shape) for name, value in state.items()}, state.__getitem__
    except Exception:  # a pickle fails in many ways, and whoever loads the model says how
        return {}, None


def _probe(views: StoredViews, stored: ReadParameter, dense: ReadParameter) -> None:
    """Compare values of one parameter of each kind that is not only renamed with the file; layers
    differ in their numbers alone. Raises `ValueError`."""
    parts: dict[str, list[str]] = {}
    for name, pieces in views.items():
        if pieces != (StoredView.whole(pieces[0].parameter, pieces[0].shape),):
            parts.setdefault(pieces[0].parameter, []).append(name)
    kinds = {re.sub(r"\d+", "0", parameter): parameter for parameter in parts}
    for names in (parts[parameter] for parameter in kinds.values()):
        for name, part in _parts({name: views[name] for name in names}, dense):
            if not _same_values(part, stored(name)):
                raise ValueError(f"'{name}' is not where the library says it is")


def _same_values(part: torch.Tensor, stored: torch.Tensor) -> bool:
    places = np.unique(np.linspace(0, part.numel() - 1, min(PROBED, part.numel())).astype(int))
    index = tuple(torch.from_numpy(axis) for axis in np.unravel_index(places, part.shape))
    there = stored[index].to(part.dtype)
    return bool(torch.equal(part[index].cpu().nan_to_num(), there.nan_to_num()))


def read(tensor: StoredTensor) -> torch.Tensor:
    """Read one tensor of a file. Raises `UsageError` for a type that PyTorch does not compute
    with."""
    if tensor.dtype not in DTYPES:
        raise UsageError(f"Values of type {tensor.dtype} ('{tensor.name}') cannot be streamed.")
    raw, done = torch.empty(tensor.source.nbytes, dtype=torch.uint8), 0
    for chunk in tensor.source.chunks(CHUNK):
        raw[done : done + chunk.size] = torch.from_numpy(chunk)
        done += chunk.size
    return raw.view(DTYPES[tensor.dtype]).reshape(tensor.shape)


def save_module(
    module: Any, folder: Path, views: StoredViews, value: ReadParameter, shard: int
) -> None:
    """Write config and weights, `shard` bytes a file, as the library does; `value` reads one
    parameter at a time."""
    from huggingface_hub import split_torch_state_dict_into_shards

    module.config.dtype = str(module.dtype).removeprefix("torch.")
    module.config.architectures = [type(module).__name__]
    module.config.save_pretrained(folder)
    if module.can_generate():
        module.generation_config.save_pretrained(folder)
    own = module.state_dict(keep_vars=True)
    empty = {
        name: torch.empty(shape_of(pieces), dtype=own[pieces[0].parameter].dtype, device="meta")
        for name, pieces in views.items()
    }
    plan = split_torch_state_dict_into_shards(empty, filename_pattern=PATTERN, max_shard_size=shard)
    for file, names in plan.filename_to_tensors.items():
        parts = dict(_parts({name: views[name] for name in names}, value))
        save_file(parts, folder / file, {"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")


def _parts(views: StoredViews, value: ReadParameter) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors as they are in a file; a parameter is read once for all of its parts."""
    made_of: dict[tuple[str, ...], list[str]] = {}
    for name, pieces in views.items():
        made_of.setdefault(tuple(view.parameter for view in pieces), []).append(name)
    for parameters, names in made_of.items():
        whole = {name: value(name).detach().cpu().contiguous() for name in parameters}
        for name in names:
            parts = [view.of(whole[view.parameter]) for view in views[name]]
            as_it_is = len(parts) == 1 and parts[0].stride() == whole[parameters[0]].stride()
            yield name, parts[0] if as_it_is else torch.cat(parts).contiguous()
