"""Diffusion transformers of diffusers: the folder of a pipeline or of its transformer, or
`diffusers:OWNER/NAME`.

`...?vae=FOLDER` names an autoencoder for a transformer that comes without its pipeline. What the
forward pass takes is read from its signature and the model's settings, so a new architecture with
known arguments needs no code.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from nmsparse_deploy.errors import MissingExtra, NmsparseError, UsageError, first_line
from nmsparse_deploy.models import quantised
from nmsparse_deploy.models.denoising import (
    INPUT,
    LABELS,
    SCHEDULER,
    WIDTHS,
    Denoising,
    conditions,
    sample_size,
)
from nmsparse_deploy.models.hub_cache import cached_folder
from nmsparse_deploy.models.hub_errors import hub_error
from nmsparse_deploy.models.loaded import Changed, HubCard, LoadedModel, ModelAdapter
from nmsparse_deploy.models.model_folder import by_name, loaded_files
from nmsparse_deploy.models.own_code import diffusers_class
from nmsparse_deploy.models.preprocess import Preprocess

INDEX = "model_index.json"
OPTIONAL = {
    "return_dict",
    "attention_mask",
    "encoder_attention_mask",
    "cross_attention_kwargs",
    "attention_kwargs",
    "joint_attention_kwargs",
    "added_cond_kwargs",
    "block_controlnet_hidden_states",
    "controlnet_block_samples",
    "skip_layers",
    "guidance",
}
"""Arguments that may be left out."""
_MEAN = 0.5
"""Images lie in -1 to 1."""

Settings = Mapping[str, Any]
"""A configuration file of diffusers."""


class DiffusersAdapter(ModelAdapter):
    """Diffusion transformers of diffusers."""

    library = "diffusers"
    prefix = "diffusers:"

    def claims(self, source: str) -> bool:
        path = Path(source)
        return (
            source.startswith(self.prefix)
            or (path / INDEX).is_file()
            or "_diffusers_version" in _settings(path)
        )

    def folder(self, source: str) -> Path | None:
        """Return the transformer's folder; in a pipeline it is one of several."""
        whole = self._whole(source)
        return whole / "transformer" if whole and (whole / INDEX).is_file() else whole

    def files(self, source: str) -> dict[str, Path]:
        whole, place = self._whole(source), self.folder(source)
        if whole is None or place is None:
            return {}
        autoencoder = source.partition("?vae=")[2]
        vae = Path(autoencoder).expanduser() if autoencoder else whole / "vae"
        beside = [file for at in {place, whole} for file in loaded_files(at / SCHEDULER)]
        return by_name([*loaded_files(place), *sorted(beside), *loaded_files(vae)], whole)

    def _whole(self, source: str) -> Path | None:
        local = Path(self.reference(source)).expanduser()
        name = self.hub_name(source)
        if local.exists() or name is None:
            return local if local.is_dir() else None
        return cached_folder(name, INDEX) or cached_folder(name)

    def load(
        self, source: str, dtype: torch.dtype | None = None, stream: bool = False
    ) -> LoadedModel:
        """Load a diffusion transformer on the CPU, in the checkpoint's dtype unless `dtype` is
        given.

        Raises `UsageError` for what is no such model, `MissingExtra` without diffusers,
        `NmsparseError` for what cannot be reached or not be fed. Remote code is never run.
        """
        if find_spec("diffusers") is None:
            raise MissingExtra("diffusers", "diffusion", "A diffusion model")
        name, _, query = source.removeprefix(self.prefix).partition("?")
        option, _, autoencoder = query.partition("=")
        if query and (option != "vae" or not autoencoder):
            raise UsageError(
                f"'{source}' is not understood.", "write FOLDER?vae=FOLDER_OF_AN_AUTOENCODER"
            )
        local = Path(name).expanduser()
        whole = local if local.exists() else _download(name)
        place = whole / "transformer" if (whole / INDEX).is_file() else whole
        module = _module(place, _settings(place), source, dtype)
        _check_arguments(module)
        vae = Path(autoencoder).expanduser() if autoencoder else whole / "vae"
        if autoencoder and not _settings(vae):
            raise UsageError(f"There is no autoencoder '{vae}': it has no config.json.")
        scheduler, assumed = _scheduler([place, whole])
        processor = Denoising(scheduler, assumed, *_images(module, vae))
        revision = {} if local.exists() else {"revision": whole.name}
        facts = {
            **revision,
            "class": type(module).__name__,
            "dtype": str(next(module.parameters()).dtype).removeprefix("torch."),
            "scheduler": type(scheduler).__name__
            + (" (assumed: none came with the model)" if assumed else ""),
        }
        return LoadedModel(
            module.eval(), source, Path(name).name, "diffusion", self, processor, facts
        )

    def meta_model(self, folder: Path, dtype: torch.dtype) -> LoadedModel:
        from accelerate import init_empty_weights

        settings = _settings(folder)
        kind = _class(folder, settings, str(folder))
        with init_empty_weights(include_buffers=False):
            module = kind.from_config(settings).to(dtype)
        processor = Denoising(*_scheduler([folder]), *_images(module, folder / "vae"))
        return LoadedModel(
            module.eval(),
            str(folder),
            folder.name,
            "diffusion",
            self,
            processor,
            {"class": type(module).__name__},
        )

    def save(self, model: LoadedModel, folder: Path, changed: Changed | None = None) -> None:
        """Write the transformer so that its class's `from_pretrained` loads it, with its scheduler
        in a folder below."""
        module: Any = model.module
        module.save_pretrained(folder, safe_serialization=True)
        if not model.processor.assumed:
            model.processor.scheduler.save_pretrained(folder / SCHEDULER)

    def input_name(self, model: LoadedModel) -> str:
        return INPUT

    def sample_inputs(self, model: LoadedModel, batch: int, length: int) -> dict[str, torch.Tensor]:
        """Make seeded noise at steps spread over the schedule; `length` tokens of text where the
        model reads one."""
        module: Any = model.module
        parameter = next(module.parameters())
        generator = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(batch, *shape, generator=generator).to(
                parameter.device, parameter.dtype
            )

        timesteps = model.processor.noising.timesteps
        spread = timesteps[(torch.arange(batch) * 2 + 1) * len(timesteps) // (2 * batch)]
        inputs = {
            INPUT: noise(module.config.in_channels, *sample_size(module)),
            "timestep": spread.to(parameter.device),
        }
        for name, count in conditions(module).items():
            if name == LABELS:
                inputs[name] = torch.arange(batch, device=parameter.device) % count
            else:
                inputs[name] = (
                    noise(length, count) if name == "encoder_hidden_states" else noise(count)
                )
        named = inspect.signature(module.forward).parameters
        return {name: inputs[name] for name in named if name in inputs}

    def hub_card(self, folder: Path) -> HubCard:
        kind = _settings(folder).get("_class_name", "AutoModel")
        return HubCard(
            self.library,
            None,
            f'from diffusers import {kind}\nmodel = {kind}.from_pretrained("FOLDER")',
        )


ADAPTER = DiffusersAdapter()


def _settings(folder: Path, file: str = "config.json") -> Settings:
    try:
        settings = json.loads((folder / file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _download(name: str) -> Path:
    """Bring the parts of a hub repository that are needed here, into a folder that its commit
    names."""
    from huggingface_hub import snapshot_download

    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UsageError(f"There is no diffusion model '{name}'.")
    weights = [
        "transformer/*.safetensors",
        "vae/*.safetensors",
        "diffusion_pytorch_model*.safetensors",
    ]
    try:
        return Path(
            snapshot_download(
                name, allow_patterns=["*.json", *weights], ignore_patterns=["*.fp16.*"]
            )
        )
    except Exception as error:  # the hub's clients fail in many ways
        raise hub_error(error, name, "give a local folder") or NmsparseError(
            f"'{name}' cannot be downloaded: {first_line(error)}."
        ) from error


def _class(place: Path, settings: Settings, source: str) -> Any:
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not settings:
        raise UsageError(
            f"'{source}' holds no diffusion transformer: '{place}' has no config.json."
        )
    return diffusers_class(settings, place, "ModelMixin", "model")


def _module(place: Path, settings: Settings, source: str, dtype: torch.dtype | None) -> Any:
    kind = _class(place, settings, source)
    quantised.refuse(source, place, settings.get("quantization_config"))
    try:
        return kind.from_pretrained(place, torch_dtype=dtype or _stored_dtype(place))
    except Exception as error:
        raise UsageError(f"'{source}' cannot be loaded: {first_line(error)}.") from error


def _stored_dtype(place: Path) -> torch.dtype:
    """Return the dtype of the first weight; diffusers itself would widen everything to fp32."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(place.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                name = next(iter(opened.keys()), None)
                dtype = None if name is None else opened.get_tensor(name).dtype
        except SafetensorError as error:
            raise UsageError(f"The weights '{file}' are damaged or truncated: {error}.") from error
        if dtype is not None and dtype.is_floating_point:
            return dtype
    return torch.float32


def _scheduler(places: list[Path]) -> tuple[Any, bool]:
    """Return the scheduler that lies with the model, or a plain linear DDPM, and whether it was
    assumed."""
    import diffusers

    for place in places:
        file = place / SCHEDULER / diffusers.SchedulerMixin.config_name
        if file.is_file():
            kind = diffusers_class(
                _settings(file.parent, file.name), file.parent, "SchedulerMixin", "scheduler"
            )
            return kind.from_pretrained(file.parent), False
    return diffusers.DDPMScheduler(), True


def _images(module: Any, vae: Path) -> tuple[Preprocess | None, Path | None]:
    """Tell which images the model is trained on, and the autoencoder between."""
    channels, (height, width) = module.config.in_channels, sample_size(module)
    settings = _settings(vae)
    if settings:
        factor = 2 ** (
            len(
                settings.get("block_out_channels")
                or settings.get("encoder_block_out_channels")
                or [0]
            )
            - 1
        )
        channels, height, width = settings.get("in_channels", 3), height * factor, width * factor
    elif channels not in (1, 3):
        return None, None
    middle = (_MEAN,) * channels
    return Preprocess(
        (height, width), min(height, width), middle, middle
    ), vae if settings else None


def _check_arguments(module: Any) -> None:
    named = list(inspect.signature(module.forward).parameters)
    unknown = [
        name for name in named if name not in {INPUT, "timestep", LABELS, *WIDTHS, *OPTIONAL}
    ]
    if getattr(module, "use_additional_conditions", False):
        unknown.append("added_cond_kwargs")
    if INPUT not in named or unknown:
        raise NmsparseError(
            f"The forward pass of {type(module).__name__} takes "
            f"{', '.join(unknown) or 'no ' + INPUT}, which nothing here can fill in."
        )
