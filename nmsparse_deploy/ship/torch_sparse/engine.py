"""PyTorch with sparse kernels as a runtime: a packed model that runs."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field
from torch import nn

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.models.outputs import UNNAMED
from nmsparse_deploy.prove import VerifyReport
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.ship.engine import (
    Case,
    Engine,
    EngineSettings,
    Inspection,
    Tensor,
    settings_of,
)
from nmsparse_deploy.ship.torch_sparse.artefact import Artefact, verify_packed
from nmsparse_deploy.ship.torch_sparse.linear import Sparse, SparseCodes
from nmsparse_deploy.ship.torch_sparse.record import packed_models
from nmsparse_deploy.ship.torch_sparse.semi_structured import kernels
from nmsparse_deploy.system import hardware
from nmsparse_deploy.system.cuda_graphs import record
from nmsparse_deploy.system.progress import Progress

AUTO, DENSE = "packed-auto", "packed-dense"


class TorchSparseSettings(EngineSettings):
    """Options of a packed model."""

    mode: Literal["auto", "sparse", "dense"] = Field(
        "auto", description="kernels; auto follows what was timed"
    )
    device: str | None = Field(None, description="left out: cuda where there is one")
    compile: bool = Field(False, description="go through torch.compile")
    cuda_graph: bool = Field(
        False, description="record a batch of every new shape, and replay it for the next ones"
    )


class TorchSparse(Engine):
    """A packed model that runs."""

    name, title, label = "torch-sparse", "PyTorch with sparse kernels", "torch-sparse"
    settings_type = TorchSparseSettings
    exported_by = "export --torch"
    twins: ClassVar[Mapping[str, str]] = {AUTO: DENSE}

    def __init__(
        self, artefact: Artefact, loaded: LoadedModel, settings: TorchSparseSettings
    ) -> None:
        self.artefact, self.loaded, self.settings = artefact, loaded, settings
        self._call: Any = torch.compile(loaded.module) if settings.compile else loaded.module
        self._recorded: dict[Any, tuple[dict[str, torch.Tensor], Any]] = {}

    @classmethod
    def build(cls, artefact: Path, settings: Mapping[str, Any] | None = None) -> Self:
        """Load a packed model. Raises `UsageError` for an unknown setting, `NmsparseError` without
        sparse kernels."""
        chosen = settings_of(cls, TorchSparseSettings, settings)
        device = torch.device(chosen.device or hardware.device())
        if chosen.cuda_graph and device.type != "cuda":
            raise UsageError("A CUDA graph needs a CUDA device.", "leave out cuda_graph")
        opened = Artefact(artefact)
        return cls(opened, opened.load(chosen.mode, device), chosen)

    def inspect(self) -> Inspection:
        layers = self.layers()
        sparse = sum(isinstance(layer, Sparse | SparseCodes) for layer in layers.values())
        return Inspection(
            self.name,
            torch.__version__,
            sparse > 0,
            f"{sparse} of {len(layers)} packed layers keep their compressed weights",
            {
                "kernels": kernels().name,
                "precision": self.artefact.precision,
                **self.settings.model_dump(),
                "gemms": {name: type(layer).__name__ for name, layer in layers.items()},
            },
        )

    @classmethod
    def artefacts(cls, run: RunDir) -> dict[str, Path]:
        """Return the packed models of a run, by precision."""
        return {folder.name: folder for folder in packed_models(run)}

    @classmethod
    def verify(cls, artefact: Path, masks: MaskSet, progress: Progress) -> VerifyReport:
        """Check what a packed model stores against the masks of its run."""
        return verify_packed(artefact, masks)

    @classmethod
    def arms(cls, run: RunDir) -> dict[str, dict[str, Case]]:
        """Return for every packed model what was decided for, and the same weights on dense
        kernels."""
        return {
            f"{cls.label} {name}": {
                arm: Case(folder, {"mode": mode, "cuda_graph": True})
                for arm, mode in ((AUTO, "auto"), (DENSE, "dense"))
            }
            for name, folder in cls.artefacts(run).items()
        }

    def layers(self) -> dict[str, nn.Module]:
        """Return the layers that were put in place, by parameter name."""
        return {
            name: self.loaded.module.get_submodule(entry.layer)
            for name, entry in self.artefact.entries.items()
            if entry.layer
        }

    @torch.inference_mode()
    def run(self, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        module = self.loaded.module
        device = next(
            chain(module.parameters(), module.buffers())
        ).device  # all parameters may be packed
        inputs = {name: torch.as_tensor(value).to(device) for name, value in batch.items()}
        floating = {
            name: value.to(self.artefact.base) if value.is_floating_point() else value
            for name, value in inputs.items()
        }
        output = self._replayed(floating) if self.settings.cuda_graph else self._call(**floating)
        named = {UNNAMED: output} if isinstance(output, torch.Tensor) else dict(output.items())
        return {
            name: value.float().cpu().numpy() if value.is_floating_point() else value.cpu().numpy()
            for name, value in named.items()
            if isinstance(value, torch.Tensor)
        }

    def _replayed(self, inputs: dict[str, torch.Tensor]) -> Any:
        """Replay the recording for these shapes, with these values in its inputs."""
        key = tuple(
            (name, tuple(value.shape), value.dtype) for name, value in sorted(inputs.items())
        )
        if key not in self._recorded:
            held = {name: value.clone() for name, value in inputs.items()}
            self._recorded[key] = held, record(lambda: self._call(**held))
        held, replay = self._recorded[key]
        for name, value in inputs.items():
            held[name].copy_(value)
        return replay()
