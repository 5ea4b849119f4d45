"""Adapters of PEFT (`adapter_config.json` beside `adapter_model.safetensors`): loaded on the model
they were trained for, and merged into its weights."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.models.hub_cache import cached_folder
from nmsparse_deploy.system.assets import digest

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
TOKENIZER = "tokenizer_config.json"
FILES = (CONFIG, WEIGHTS, "tokenizer*", "special_tokens_map.json", "*.model", "*.jinja", "vocab*")
"""What is fetched of an adapter on a hub."""
PREFIX = "base_model.model."
"""What the names of an adapter's tensors begin with."""
MERGE = (
    "merge it yourself: PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload()"
    ".save_pretrained(FOLDER), and give FOLDER"
)


@dataclass(frozen=True)
class AdapterFolder:
    """A folder that holds an adapter."""

    source: str
    """What the user typed."""
    folder: Path
    kind: str
    base: str
    """The model that it is merged into: a folder, or a name on a hub."""

    @property
    def has_tokenizer(self) -> bool:
        """Does it bring the tokenizer that it was trained with?"""
        return (self.folder / TOKENIZER).is_file()

    def provenance(self) -> dict[str, str]:
        """Return what a run keeps of it."""
        sha256 = digest(self.folder / WEIGHTS)
        return {"adapter": self.kind, "adapter_base": self.base, "adapter_sha256": sha256}


def adapter_folder(source: str) -> AdapterFolder | None:
    """Return the adapter that a folder, or a name whose files are in the hub's cache, stands for;
    None for anything else.

    Raises `UsageError` for one that cannot be merged: damaged, pickled, without a base.
    """
    path = Path(source)
    if (path / CONFIG).is_file():
        if (path / "config.json").is_file() and any(path.glob("model*.safetensors")):
            raise UsageError(
                f"'{source}' holds a model and a PEFT adapter beside it, and which of them is meant is "
                "not clear.",
                f"move {CONFIG} and {WEIGHTS} into a folder of their own",
            )
        return _read(source, path)
    cached = None if path.exists() else cached_folder(source, CONFIG)
    return None if cached is None or cached_folder(source) else _fetched(source)


def fetch(source: str) -> AdapterFolder | None:
    """Download the adapter that is called `source` on a hub; None where there is none."""
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(source, CONFIG)
    except Exception:  # whoever asked has a better reason why nothing is there
        return None
    return _fetched(source)


def _fetched(source: str) -> AdapterFolder:
    from huggingface_hub import snapshot_download

    return _read(source, Path(snapshot_download(source, allow_patterns=[*FILES])))


def _read(source: str, folder: Path) -> AdapterFolder:
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"it holds {type(settings).__name__} where an object is wanted")
    except (ValueError, RecursionError) as error:
        raise UsageError(f"'{folder / CONFIG}' is damaged: {error}.") from error
    kind, base = settings.get("peft_type"), settings.get("base_model_name_or_path")
    if not isinstance(kind, str):
        raise UsageError(
            f"'{source}' is an adapter, but not one of PEFT: its {CONFIG} names no peft_type."
        )
    what = f"'{source}' is a PEFT adapter ({kind})"
    if not isinstance(base, str) or not base:
        raise UsageError(
            f"{what}, and its {CONFIG} does not name the model that it belongs to.",
            "write the model's folder or name as base_model_name_or_path into it",
        )
    beside = folder / base
    base = str(beside) if not Path(base).exists() and (beside / "config.json").is_file() else base
    what += f" for '{base}'"
    if not (folder / WEIGHTS).is_file():
        if (folder / PICKLED).is_file():
            raise UsageError(
                f"{what} whose weights are pickled ({PICKLED}), and a pickle can run code.",
                f"save it again with safe_serialization=True, as {WEIGHTS}",
            )
        raise UsageError(f"{what}, and its weights are not there: it has no {WEIGHTS}.")
    if (Path(base) / CONFIG).is_file():
        raise UsageError(f"{what}, which is an adapter itself.", MERGE)
    revision = settings.get("revision")
    if revision not in (None, "", "main") and not Path(base).exists():
        raise UsageError(
            f"{what} at the revision '{revision}', and only its newest is loaded.", MERGE
        )
    return AdapterFolder(source, folder, kind, base)


def merged(module: Any, adapter: AdapterFolder) -> Any:
    """Return `module` with the adapter merged into its weights: added in fp32, rounded once.

    Raises `UsageError` for an adapter that does not fit it or cannot be merged, `NmsparseError`
    without PEFT.
    """
    what = f"'{adapter.source}' is a PEFT adapter ({adapter.kind}) for '{adapter.base}'"
    try:
        import peft
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise NmsparseError(
            f"{what}, and merging it needs the package 'peft', which is not installed.",
            f"pip install 'nmsparse-deploy[peft]', or {MERGE}",
        ) from error
    dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = peft.PeftConfig.from_pretrained(str(adapter.folder))
            if config.is_prompt_learning:
                raise UsageError(
                    f"{what}; it adds tokens to the input, and there is nothing to merge."
                )
            config.task_type, config.inference_mode = None, True
            wrapped = peft.PeftModel.from_pretrained(module, str(adapter.folder), config=config)
            _check_tensors(wrapped, adapter, what)
            for layer in wrapped.modules():
                if isinstance(layer, BaseTunerLayer):
                    _merge_layer(layer)
            module = wrapped.merge_and_unload()
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = next((line for line in lines if not line.endswith(":")), type(error).__name__)
            raise UsageError(
                f"{what}, and PEFT {peft.__version__} cannot merge it: {reason.rstrip('.')}."
            ) from error
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
        parameter.requires_grad_(parameter.is_floating_point())
    return module


def _merge_layer(layer: Any) -> None:
    """Add an adapter to a layer's weights in fp32, and round once."""
    own = list(layer.get_base_layer().parameters(recurse=False))
    dtypes = [parameter.dtype for parameter in own]
    for parameter in own:
        parameter.data = parameter.data.float()
    layer.merge(safe_merge=True)
    for parameter, dtype in zip(own, dtypes):
        parameter.data = parameter.data.to(dtype)


def _check_tensors(wrapped: Any, adapter: AdapterFolder, what: str) -> None:
    """Raise `UsageError` unless every tensor of the file has its place, and every place its
    tensor; PEFT only warns."""
    import peft
    from safetensors import safe_open

    with safe_open(adapter.folder / WEIGHTS, framework="numpy") as file:
        stored = set(file.keys())
    expected = set(peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    places = set(wrapped.state_dict())
    name = type(wrapped.get_base_model()).__name__
    if missing := sorted(expected - stored):
        raise UsageError(f"{what}, and '{missing[0]}' is not in its {WEIGHTS}.")
    if unknown := sorted(stored - expected - places):
        tensor = unknown[0].removeprefix(PREFIX)
        raise UsageError(f"{what}, and the {name} there has no place for its '{tensor}'.", MERGE)
