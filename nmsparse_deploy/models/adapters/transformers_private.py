"""What is used of Transformers beyond its documented interface: making a module without weights,
and its loader.

Any release may change these names, so they stand in this file alone, and pyproject.toml says up to
which version.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch


def image_processor_settings(place: str) -> Mapping[str, Any] | None:
    """Return what the preprocessor file of a model says; None where there is none."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        return ImageProcessingMixin.get_image_processor_dict(place)[0]
    except OSError:
        return None


def takes(auto: Any, config: Any) -> bool:
    """Decide whether an automatic class has a model for the configuration."""
    return type(config) in auto._model_mapping


def module_from_config(auto: Any, config: Any, dtype: torch.dtype | None, **options: Any) -> Any:
    """Make the module of `config`, by an automatic class or by the model's own; always with the
    library's code."""
    if auto.__name__.startswith("AutoModel"):
        return auto.from_config(config, dtype=dtype, trust_remote_code=False, **options)
    return auto._from_config(config, dtype=dtype, **options)


def restore_generation(module: Any, place: str) -> None:
    """Give a module that was made from its config what `from_pretrained` reads of its generation
    settings."""
    module.config.name_or_path = place
    if module.can_generate():
        module.adjust_generation_fn(
            None,
            True,
            None,
            place,
            cache_dir=None,
            force_download=False,
            proxies=None,
            local_files_only=True,
            token=None,
            revision="main",
            subfolder="",
            trust_remote_code=False,
        )


def is_saved(module: Any, name: str, parameters: Mapping[str, torch.Tensor]) -> bool:
    """Decide whether `save_pretrained` writes an entry of the state dict: of tied `parameters` it
    writes one."""
    source = module.all_tied_weights_keys.get(name)
    tied = source is not None and parameters.get(name) is parameters.get(source)
    return not tied and name not in (module._keys_to_ignore_on_save or ())


def fill(
    module: Any, tensors: dict[str, torch.Tensor], dtype: torch.dtype, device: torch.device | None
) -> list[str]:
    """Put tensors of a checkpoint into the module, as its loader converts them; return the names
    that do not fit."""
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    settings = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=module._get_dtype_plan(dtype),
        weight_mapping=_conversions(module),
        device_map={"": device},
    )
    info, _ = convert_and_load_state_dict_in_model(module, tensors, settings)
    return [name for name, *_ in info.mismatched_keys] + list(info.conversion_errors)


def checkpoint_targets(module: Any, stored: Collection[str]) -> dict[str, list[str]]:
    """Map each tensor of a checkpoint to the module's parameters and buffers that its loader makes
    of it."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = _conversions(module)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    made_by = {
        pattern: converter for converter in converters for pattern in converter.source_patterns
    }
    own, prefix = module.state_dict(), module.base_model_prefix
    targets: dict[str, list[str]] = {}
    for key in stored:
        name, pattern = rename_source_key(key, renamings, converters, prefix, own)
        if name not in own and key in own:
            name, pattern = rename_source_key(key, [], [], prefix, own)
        names = [name]
        if pattern is not None:
            first, *others = made_by[pattern].target_patterns
            names += [name.replace(first, other) for other in others]
        targets[key] = [name for name in names if name in own]
    return {key: names for key, names in targets.items() if names}


def _conversions(module: Any) -> Any:
    """Return what the library does to names and layouts of older checkpoints of this kind."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(module)
