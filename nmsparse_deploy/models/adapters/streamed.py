"""A model of Transformers whose weights stay in their safetensors files until a part of it is about
to be used.

The module is built without values (parameters on the meta device, buffers real). A *part* is a
block, or what holds weights outside of the blocks: embedding, final norm, head. Names and layouts
that differ between a checkpoint and the library's module (prefixes, fused experts) are settled by
the library's own loader, which is given the tensors of one part at a time. Files are read, not
mapped: mapped pages would count as this process's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.models.adapters import transformers_private
from nmsparse_deploy.models.adapters.checkpoint_layout import DTYPES, read, save_module
from nmsparse_deploy.models.discovery import find_blocks
from nmsparse_deploy.models.forwards import within
from nmsparse_deploy.prove.stored_views import StoredView, StoredViews
from nmsparse_deploy.prove.tensor_files import find_tensors

SHARD = 256 << 20
"""Bytes of a shard that is written; one is in memory at a time."""


class StreamedWeights:
    """The weights of `module`, whose parameters have no values yet, in the files of `folder`."""

    def __init__(self, module: Any, folder: Path, dtype: torch.dtype) -> None:
        self.module, self.folder = module, folder
        self.device: torch.device | None = torch.device("cpu")
        self._dtype = dtype
        self._stored = {tensor.name: tensor for tensor in find_tensors(folder)}
        self._empty: dict[str, nn.Parameter] = dict(module.named_parameters(remove_duplicate=False))
        self._targets = transformers_private.checkpoint_targets(module, self._stored)
        self._sources: dict[str, list[str]] = {}
        for key, names in self._targets.items():
            for name in names:
                self._sources.setdefault(name, []).append(key)
        self._origin = self._origins()
        self._full: set[str] = set()
        blocks = find_blocks(module)
        self._parts, always = _parts(module, blocks)
        self._fill(
            [*always, *(name for name, _ in module.named_buffers() if name in self._sources)]
        )

    def _origins(self) -> dict[str, str]:
        """Parameter -> the one among those tied to it that the checkpoint has."""
        tied: dict[int, list[str]] = {}
        for name, parameter in self._empty.items():
            tied.setdefault(id(parameter), []).append(name)
        origin: dict[str, str] = {}
        for names in tied.values():
            stored = next((name for name in names if name in self._sources), None)
            if stored is None:
                raise UsageError(
                    f"The checkpoint '{self.folder}' has no '{names[0]}', so it cannot be streamed."
                )
            origin |= dict.fromkeys(names, stored)
        return origin

    def materialise(self, path: str) -> AbstractContextManager[None]:
        return self._filled(self._inside(path))

    def on_demand(self) -> AbstractContextManager[None]:
        return within(
            [self.module.get_submodule(path) for path in self._parts],
            lambda index: self.materialise(self._parts[index]),
        )

    def to(self, device: torch.device) -> None:
        self.device = device
        for name, value in list(self.module.named_buffers()):
            _put(self.module, name, value.to(device))
        for name in self._full:
            _put(self.module, name, nn.Parameter(self.module.get_parameter(name).to(device)))

    def dense(self, name: str) -> torch.Tensor:
        """One parameter or stored buffer, as it is in the checkpoint."""
        if name not in self._empty:
            buffer: torch.Tensor = self.module.get_buffer(name)
            return buffer
        with self._filled([name]):
            value: torch.Tensor = self.module.get_parameter(name).detach()
            return value

    def save(
        self, folder: Path, changed: Mapping[str, Callable[[], torch.Tensor]], stored: StoredViews
    ) -> None:
        """Write config and weights shard by shard, as the checkpoint has them (`stored`, or the
        module's own names); `changed` gives other values by name."""
        own = {
            name: (StoredView.whole(name, tuple(value.shape)),)
            for name, value in self.module.state_dict(keep_vars=True).items()
            if transformers_private.is_saved(self.module, name, self._empty)
        }

        def value(name: str) -> torch.Tensor:
            return changed[name]() if name in changed else self.dense(name)

        save_module(self.module, folder, stored or own, value, SHARD)

    def _inside(self, path: str) -> list[str]:
        prefix = f"{path}." if path else ""
        return [
            prefix + name
            for name, _ in self.module.get_submodule(path).named_parameters(remove_duplicate=False)
        ]

    @contextmanager
    def _filled(self, names: Collection[str]) -> Iterator[None]:
        filled = self._fill([name for name in names if name not in self._full])
        try:
            yield
        finally:
            self._full -= filled
            for name in filled:
                _put(self.module, name, self._empty[name])

    def _fill(self, names: Collection[str]) -> set[str]:
        """Give parameters their values; return the names of all that had none before."""
        wanted = {self._origin.get(name, name) for name in names}
        keys = {key for name in wanted for key in self._sources[name]}
        if keys:
            wrong = transformers_private.fill(
                self.module,
                {key: read(self._stored[key]) for key in keys},
                self._dtype,
                self.device,
            )
            if wrong:
                raise UsageError(
                    f"'{wrong[0]}' in '{self.folder}' does not fit the model that its config.json says."
                )
        for name in names:
            if self._origin.get(name, name) != name:
                _put(self.module, name, self.module.get_parameter(self._origin[name]))
        given = {name for key in keys for name in self._targets[key]} | set(names)
        new = {name for name in given if name in self._empty} - self._full
        self._full |= new
        return new


def _put(module: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, last = name.rpartition(".")
    setattr(module.get_submodule(path), last, value)


def _parts(module: nn.Module, blocks: Collection[str]) -> tuple[list[str], list[str]]:
    """Paths of the blocks and of what lies beside them; names of the parameters that belong to none
    of these."""
    parts: list[str] = []
    always: list[str] = []

    def walk(path: str, child: nn.Module) -> None:
        if path in blocks or not any(
            block.startswith(f"{path}." if path else "") for block in blocks
        ):
            if next(child.parameters(), None) is not None:
                parts.append(path)
            return
        always.extend(
            f"{path}.{name}" if path else name for name, _ in child.named_parameters(recurse=False)
        )
        for name, inner in child.named_children():
            walk(f"{path}.{name}" if path else name, inner)

    walk("", module)
    return parts, always


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the dtype of the first floating-point tensor of a checkpoint, for configurations that
    do not say."""
    dtypes = (DTYPES.get(tensor.dtype) for tensor in find_tensors(folder))
    return next(
        (dtype for dtype in dtypes if dtype is not None and dtype.is_floating_point), torch.float32
    )
