"""timm models: `timm:NAME` with the weights of the hub, `timm:NAME?checkpoint=FILE`, or a folder
that timm wrote."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nmsparse_deploy.errors import MissingExtra, NmsparseError, UsageError, first_line
from nmsparse_deploy.models.hub_cache import cached_folder
from nmsparse_deploy.models.hub_errors import hub_error
from nmsparse_deploy.models.loaded import (
    Changed,
    ClassLabels,
    HubCard,
    LoadedModel,
    ModelAdapter,
    unknown_shapes,
)
from nmsparse_deploy.models.outputs import Features
from nmsparse_deploy.models.preprocess import BICUBIC, RESAMPLE, ImagePipeline, Preprocess
from nmsparse_deploy.models.state_dict import read_state_dict

INPUT = "x"
"""timm's forward takes its images under this name."""


class TimmAdapter(ModelAdapter):
    """Vision models of timm."""

    library = "timm"
    prefix = "timm:"

    def claims(self, source: str) -> bool:
        return source.startswith(self.prefix) or _config(Path(source)) is not None

    def knows(self, name: str) -> bool:
        return find_spec("timm") is not None and bool(_timm().is_model(name.partition(".")[0]))

    def hub_name(self, source: str) -> str | None:
        name = source.removeprefix(self.prefix)
        if "?" in name or not source.startswith(self.prefix):
            return None
        owned = name.removeprefix("hf-hub:").removeprefix("hf_hub:")
        return super().hub_name(owned if "/" in name else f"timm/{name}")

    def folder(self, source: str) -> Path | None:
        if not source.startswith(self.prefix):
            return Path(source)
        name = self.reference(source)
        owned = re.sub("^hf[-_]hub:", "", name)
        if "?" in source:
            return None
        if owned != name:
            return _cached({"hf_hub_id": owned})
        try:
            about = _timm().get_pretrained_cfg(name)
        except RuntimeError:  # loading it says why
            return None
        return _cached(about.to_dict()) if about else None

    def files(self, source: str) -> dict[str, Path]:
        checkpoint = Path(source.partition("?checkpoint=")[2]).expanduser()
        return {checkpoint.name: checkpoint} if checkpoint.is_file() else super().files(source)

    def load(
        self, source: str, dtype: torch.dtype | None = None, stream: bool = False
    ) -> LoadedModel:
        """Load a timm model on the CPU.

        Raises `UsageError` for an unknown name or a checkpoint that does not fit, `MissingExtra`
        without timm, `NmsparseError` when the weights cannot be reached.
        """
        from huggingface_hub.utils import logging

        timm = _timm()
        logging.set_verbosity_error()  # a hub that does not answer is reported once, below
        name, _, query = source.removeprefix(self.prefix).partition("?")
        option, _, checkpoint = query.partition("=")
        if query and (option != "checkpoint" or not checkpoint):
            raise UsageError(f"'{source}' is not understood.", "write timm:NAME?checkpoint=FILE")
        try:
            if not source.startswith(self.prefix):
                module = timm.create_model(f"local-dir:{Path(source).resolve()}", pretrained=True)
                name = Path(source).name
            elif checkpoint:
                module = _from_checkpoint(timm, name, Path(checkpoint).expanduser())
            else:
                module = timm.create_model(name, pretrained=True)
        except NmsparseError:
            raise
        except Exception as error:
            raise _explain(error, source, name, timm) from error
        module = module.eval().to(dtype) if dtype else module.eval()
        commit = (
            None
            if checkpoint or not source.startswith(self.prefix)
            else _cached(module.pretrained_cfg)
        )
        facts = {
            **({"revision": commit.name} if commit else {}),
            "architecture": str(module.pretrained_cfg.get("architecture", name)),
            "dtype": str(next(module.parameters()).dtype).removeprefix("torch."),
        }
        return self._loaded(module, source, name.rpartition("/")[2], facts)

    def meta_model(self, folder: Path, dtype: torch.dtype) -> LoadedModel:
        from accelerate import init_empty_weights

        timm = _timm()
        try:
            with init_empty_weights(include_buffers=False):
                module = (
                    timm.create_model(f"local-dir:{folder.resolve()}", pretrained=False)
                    .eval()
                    .to(dtype)
                )
        except Exception as error:
            raise _explain(error, str(folder), folder.name, timm) from error
        return self._loaded(module, str(folder), folder.name, {})

    def shapes(self, source: str, config: Mapping[str, Any] | None) -> LoadedModel:
        """Build an architecture of timm on the meta device. Raises like `load`."""
        if not source.startswith(self.prefix):
            raise unknown_shapes(source)
        timm, name = _timm(), self.reference(source)
        try:
            with torch.device("meta"):
                module = timm.create_model(name, pretrained=False)
        except Exception as error:
            raise _explain(error, source, name, timm) from error
        return self._loaded(module.eval(), source, name, {})

    def _loaded(
        self, module: nn.Module, source: str, name: str, facts: dict[str, str]
    ) -> LoadedModel:
        return LoadedModel(
            module,
            source,
            name,
            "vision",
            self,
            _preprocess(module),
            {"class": type(module).__name__, **facts},
        )

    def save(self, model: LoadedModel, folder: Path, changed: Changed | None = None) -> None:
        """Write config and weights so that `timm.create_model("local-dir:FOLDER", pretrained=True)`
        loads them."""
        from timm.models import save_for_hf

        save_for_hf(model.module, str(folder), safe_serialization=True)
        for file in folder.iterdir():
            os.chmod(file, 0o644)

    def input_name(self, model: LoadedModel) -> str:
        return INPUT

    def sample_inputs(self, model: LoadedModel, batch: int, length: int) -> dict[str, torch.Tensor]:
        """Make seeded noise in the shape of one batch of images."""
        parameter = next(model.module.parameters())
        shape = (batch, len(model.processor.mean), *model.processor.size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return {INPUT: noise.to(parameter.device, parameter.dtype)}

    def features(self, model: LoadedModel, inputs: Mapping[str, torch.Tensor]) -> Features:
        module: Any = model.module
        features = module.forward_features(*inputs.values())
        tokens = features
        if features.ndim == 4 and features.shape[1] != module.num_features:  # channels last
            tokens = features.permute(0, 3, 1, 2)
        logits = module.forward_head(features) if module.num_classes else None
        return Features(module.forward_head(features, pre_logits=True), tokens, logits)

    def class_labels(self, model: LoadedModel) -> ClassLabels:
        named = getattr(model.module, "pretrained_cfg", {}).get("label_names") or ()
        return ClassLabels(
            {str(name): number for number, name in enumerate(named)},
            int(getattr(model.module, "num_classes", 0)) or None,
        )

    def image_pipeline(self, model: LoadedModel) -> ImagePipeline:
        data = _timm().data.resolve_model_data_config(model.module, use_test_size=True)
        return ImagePipeline(
            input_size=data["input_size"],
            interpolation=data["interpolation"],
            mean=data["mean"],
            std=data["std"],
            crop_pct=data["crop_pct"],
            crop_mode=data["crop_mode"],
        )

    def hub_card(self, folder: Path) -> HubCard:
        job = (
            "image-classification"
            if (_config(folder) or {}).get("num_classes")
            else "image-feature-extraction"
        )
        usage = 'import timm\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True)'
        return HubCard(self.library, job, usage)


ADAPTER = TimmAdapter()


def _config(folder: Path) -> Mapping[str, Any] | None:
    """Return the configuration that timm wrote into a folder, or None."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return (
        config
        if isinstance(config, dict) and "architecture" in config and "model_type" not in config
        else None
    )


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise MissingExtra("timm", "vision", "A timm model") from error
    except RuntimeError as error:
        raise NmsparseError(
            f"timm cannot be imported: {first_line(error)}.",
            "install the torchvision build that belongs to this build of torch",
        ) from error
    return timm


def _cached(about: Mapping[str, Any]) -> Path | None:
    """Return the folder of the hub's commit that the weights come from; timm does not say, so the
    cache is asked."""
    name, _, revision = str(about.get("hf_hub_id") or "").partition("@")
    files = filter(None, (about.get("hf_hub_filename"), "model.safetensors", "pytorch_model.bin"))
    folders = (cached_folder(name, file, revision or None) for file in files) if name else iter(())
    return next((folder for folder in folders if folder), None)


def _from_checkpoint(timm: Any, name: str, path: Path) -> nn.Module:
    state = read_state_dict(path)
    head = timm.create_model(name, pretrained=False).pretrained_cfg.get("classifier") or "head"
    weight = state.get(f"{head if isinstance(head, str) else head[0]}.weight")
    module = timm.create_model(
        name, pretrained=False, num_classes=0 if weight is None else weight.shape[0]
    )
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UsageError(
            f"'{path}' does not fit timm:{name}: {lines[min(1, len(lines) - 1)][:200]}"
        ) from error
    return module


def _explain(error: Exception, source: str, name: str, timm: Any) -> NmsparseError:
    near = ", ".join(timm.list_models(f"*{name.partition('.')[0]}*")[:3])
    prefix = TimmAdapter.prefix
    if (
        source.startswith(prefix)
        and not name.startswith("hf")
        and not timm.is_model(name.partition(".")[0])
    ):
        return UsageError(f"timm has no model '{name}'.", f"did you mean {near}?" if near else None)
    if "No pretrained weights" in str(error):
        return UsageError(
            f"timm has no pretrained weights for '{name}'.", f"{prefix}{name}?checkpoint=FILE"
        )
    if refused := hub_error(error, source, f"{prefix}{name}?checkpoint=FILE"):
        return refused
    return UsageError(f"'{source}' cannot be loaded: {first_line(error)}.")


def _preprocess(module: nn.Module) -> Preprocess:
    data = _timm().data.resolve_model_data_config(module)
    _, height, width = data["input_size"]
    shorter = (
        None
        if data.get("crop_mode") == "squash"
        else int(min(height, width) / data.get("crop_pct", 1.0))
    )
    return Preprocess(
        (height, width),
        shorter,
        tuple(data["mean"]),
        tuple(data["std"]),
        RESAMPLE.get(data["interpolation"], BICUBIC),
    )
