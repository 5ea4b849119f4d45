"""What is used of Transformers beyond its documented interface: making a module without weights,
and its loader.

Any release may change these names, so they stand in this file alone, and pyproject.toml says up to
which version.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nmsparse_deploy.prove.stored_views import Pieces, StoredView, shape_of


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
    return _loading(module, stored).targets


@dataclass(frozen=True)
class _Loading:
    """What the loader makes of the names in a checkpoint."""

    targets: dict[str, list[str]]
    """Tensor in the file -> the module's."""
    converted: set[str]
    """Tensors that are not only renamed."""
    used: list[Any]
    """The library's rules that had to do with any."""


def _loading(module: Any, stored: Collection[str]) -> _Loading:
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = _conversions(module)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    made_by = {
        pattern: converter for converter in converters for pattern in converter.source_patterns
    }
    own, prefix = module.state_dict(), module.base_model_prefix
    targets: dict[str, list[str]] = {}
    converted: set[str] = set()
    for key in stored:
        name, pattern = rename_source_key(key, renamings, converters, prefix, own)
        if name not in own and key in own:
            name, pattern = rename_source_key(key, [], [], prefix, own)
        names = [name]
        if pattern is not None:
            first, *others = made_by[pattern].target_patterns
            names += [name.replace(first, other) for other in others]
            converted.add(key)
        targets[key] = [name for name in names if name in own]
    targets = {key: names for key, names in targets.items() if names}
    used = [entry for entry in mapping if entry.was_used()]
    return _Loading(targets, converted & targets.keys(), used)


def stored_views(module: Any, stored: Mapping[str, tuple[int, ...]]) -> dict[str, Pieces]:
    """Map what is saved to parts of the module's parameters, so that it has the names and shapes
    that the checkpoint has; empty where these are the module's own.

    `stored` has the shapes of the checkpoint's tensors. Raises `ValueError` for a conversion that
    cannot be expressed, or that the library cannot turn round.
    """
    loading = _loading(module, stored)
    own = module.state_dict(keep_vars=True)
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    saved = [name for name in own if is_saved(module, name, parameters)]
    views = _converted_views(module, stored, loading, shapes)
    covered = {id(own[view.parameter]) for pieces in views.values() for view in pieces}
    renamed = {
        name: key
        for key, names in loading.targets.items()
        for name in names
        if key not in loading.converted and stored[key] == shapes[name]
    }
    in_file = {id(own[name]) for name in renamed}
    for name in [*saved, *renamed]:  # of tied ones the first that is in the file stands for all
        mark = id(own[name])
        if mark not in covered and (name in renamed or mark not in in_file):
            covered.add(mark)
            views[renamed.get(name, name)] = (StoredView.whole(name, shapes[name]),)
    plain = all(views[name] == (StoredView.whole(name, shapes.get(name, ())),) for name in views)
    return {} if plain else views


def _converted_views(
    module: Any,
    stored: Mapping[str, tuple[int, ...]],
    loading: _Loading,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Pieces]:
    """Turn the library's conversions round on tensors without values, which remember where in
    their parameter they lie."""
    from transformers.core_model_loading import revert_weight_conversion

    sources: dict[str, list[str]] = {}
    for key in loading.converted:
        for name in loading.targets[key]:
            sources.setdefault(name, []).append(key)
    traced = {name: _Traced.of(shapes[name]) for name in sources}
    parameter = {value.untyped_storage()._cdata: name for name, value in traced.items()}
    before = getattr(module, "_weight_conversions", None)
    module._weight_conversions = loading.used
    try:
        parts = revert_weight_conversion(module, {**traced}) if traced else {}
    except Exception as error:  # the library's conversions fail in many ways
        raise ValueError(str(error)) from error
    finally:
        module._weight_conversions = before
    views: dict[str, Pieces] = {}
    held = dict.fromkeys(sources, 0)
    for name, whole in parts.items():
        pieces = tuple(
            StoredView(
                parameter.get(part.untyped_storage()._cdata, ""),
                tuple(part.shape),
                tuple(part.stride()),
                part.storage_offset(),
            )
            for part in (getattr(whole, "joined", ()) or (whole,))
        )
        keys = [key for key in sources.get(pieces[0].parameter, ()) if _same_name(key, name)]
        known = all(view.parameter in held for view in pieces)
        if len(keys) != 1 or not known or stored[keys[0]] != shape_of(pieces):
            raise ValueError(f"'{name}' is in the checkpoint in another layout")
        views[keys[0]] = pieces
        for view in pieces:
            held[view.parameter] += math.prod(view.shape)
    for name, count in held.items():
        if count != math.prod(shapes[name]):
            raise ValueError(f"'{name}' is not made of what the checkpoint has of it alone")
    return views


def _same_name(one: str, two: str) -> bool:
    """Tell whether two names differ in what stands before them at most."""
    return f".{one}".endswith(f".{two}") or f".{two}".endswith(f".{one}")


class _Traced(torch.Tensor):
    """A tensor without values, whose views keep their places in its storage."""

    joined: tuple[torch.Tensor, ...] = ()
    """What it was joined from along the first axis."""

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> _Traced:
        return torch.empty(shape, device="meta").as_subclass(cls)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func is torch.cat and not (kwargs or {}).get("dim"):
            result.joined = tuple(args[0])
        return result

    def contiguous(self, *_args: Any, **_named: Any) -> _Traced:
        """Return the view itself: a copy would say nothing of its place."""
        return self


def _conversions(module: Any) -> Any:
    """Return what the library does to names and layouts of older checkpoints of this kind."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(module)
