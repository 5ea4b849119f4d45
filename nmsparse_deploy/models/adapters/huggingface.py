"""Hugging Face models: a hub name, a local folder, or a GGUF file (dequantised once and cached)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from nmsparse_deploy.errors import NmsparseError, UsageError, first_line
from nmsparse_deploy.models import own_code, quantised
from nmsparse_deploy.models.adapters import peft, transformers_private
from nmsparse_deploy.models.adapters.architectures import TASKS, auto_class, family, vocabulary
from nmsparse_deploy.models.adapters.checkpoint_layout import layout_of, save_module
from nmsparse_deploy.models.adapters.gguf import SUFFIX, dequantised
from nmsparse_deploy.models.adapters.guessed_inputs import guesses
from nmsparse_deploy.models.discovery import RefusedInputs
from nmsparse_deploy.models.hub_cache import cached_folder, fetch_description
from nmsparse_deploy.models.image_text import image_text_processor, joined
from nmsparse_deploy.models.load_errors import explained
from nmsparse_deploy.models.loaded import (
    Batch,
    Changed,
    ClassLabels,
    HubCard,
    LoadedModel,
    ModelAdapter,
    unknown_shapes,
)
from nmsparse_deploy.models.missing_tokenizer import MissingTokenizer
from nmsparse_deploy.models.model_folder import by_name, carried_files, loaded_files
from nmsparse_deploy.models.outputs import Features
from nmsparse_deploy.models.preprocess import from_config
from nmsparse_deploy.models.weight_store import IN_MEMORY, WeightStore
from nmsparse_deploy.prove.stored_views import StoredViews

SHARD = 50 * 10**9
"""Bytes of a file of weights that is written from memory, as Transformers has it."""


@dataclass(frozen=True)
class Checkpoint:
    """A source as it is known before any of its weights are read."""

    place: str
    """What `from_pretrained` takes: a folder, or a name on the hub."""
    name: str
    config: Any
    auto: str
    """The class of Transformers that loads it with its head."""
    provenance: dict[str, str] = field(default_factory=dict)
    adapter: peft.AdapterFolder | None = None
    """What is merged into its weights."""


class HuggingFaceAdapter(ModelAdapter):
    """Whatever Transformers loads. It is asked last, and takes what no other library claims."""

    library = "transformers"

    def claims(self, source: str) -> bool:
        return True

    def load(
        self, source: str, dtype: torch.dtype | None = None, stream: bool = False
    ) -> LoadedModel:
        """Load a pretrained model and its tokenizer on the CPU, in the checkpoint's dtype unless
        `dtype` is given.

        Raises `UsageError` for what is not there or not a model, `NmsparseError` for what cannot be
        reached. Remote code is never run.
        """
        _quieten()
        with explained(source):
            checkpoint = identify(source)
            place = checkpoint.place
            stored = Path(place) if Path(place).exists() else cached_folder(place)
            scheme = getattr(checkpoint.config, "quantization_config", None)
            quantised.refuse(place if checkpoint.adapter else source, stored, scheme)
            module, weights, layout = (_stream if stream else _load)(checkpoint, stored, dtype)
            facts = {
                **checkpoint.provenance,
                "class": type(module).__name__,
                "dtype": str(module.dtype).removeprefix("torch."),
            }
            loaded = self._loaded(module, source, checkpoint, facts, weights)
            loaded.stored = layout
            return loaded

    def meta_model(self, folder: Path, dtype: torch.dtype) -> LoadedModel:
        with explained(str(folder)):
            checkpoint = identify(str(folder))
            module = unfilled(checkpoint, dtype)
            return self._loaded(module, str(folder), checkpoint, {"class": type(module).__name__})

    def shapes(self, source: str, config: Mapping[str, Any] | None) -> LoadedModel:
        import transformers
        from transformers.utils import logging

        if (adapter := peft.adapter_folder(source)) is not None:
            source = adapter.base
        local = config is None and (Path(source) / "config.json").is_file()
        if config is None and not local:
            raise unknown_shapes(source)
        if config is not None and "model_type" not in config:
            raise UsageError("The section config of the recipe names no model_type.")
        logging.set_verbosity_error()
        try:
            settings = (
                read_config(source, local_files_only=True)
                if config is None
                else transformers.AutoConfig.for_model(**config)
            )
            auto = auto_class(settings)
            with torch.device("meta"):
                # Other attention implementations look into the mask, and there is nothing to see.
                module: Any = transformers_private.module_from_config(
                    getattr(transformers, auto),
                    settings,
                    getattr(settings, "dtype", None) or torch.float32,
                    attn_implementation="eager",
                )
        except NmsparseError:
            raise
        except Exception as error:
            raise UsageError(
                f"The config of '{source}' makes no model: {first_line(error)}."
            ) from error
        kind = family(module, auto)
        processor = from_config(settings) if kind == "vision" else None
        return LoadedModel(module.eval(), source, source.rpartition("/")[2], kind, self, processor)

    def _loaded(
        self,
        module: Any,
        source: str,
        checkpoint: Checkpoint,
        provenance: dict[str, str],
        weights: WeightStore = IN_MEMORY,
    ) -> LoadedModel:
        kind = family(module, checkpoint.auto)
        processor = _processor(checkpoint, kind)
        loaded = LoadedModel(
            module.eval(), source, checkpoint.name, kind, self, processor, provenance, weights
        )
        if kind == "llm":  # and none that only compares pictures with text
            place, config = checkpoint.place, checkpoint.config
            loaded.image_text = image_text_processor(place, config, provenance)
        return loaded

    def save(self, model: LoadedModel, folder: Path, changed: Changed | None = None) -> None:
        """Write config, weights and tokenizer so that stock `from_pretrained` loads them."""
        from nmsparse_deploy.models.adapters.streamed import StreamedWeights

        module: Any = model.module
        if isinstance(model.weights, StreamedWeights):
            model.weights.save(folder, changed or {}, model.stored)
        elif model.stored:
            save_module(module, folder, model.stored, module.state_dict().__getitem__, SHARD)
        else:
            module.save_pretrained(folder, save_original_format=False)
        if not isinstance(model.processor, MissingTokenizer):
            model.processor.save_pretrained(folder)

    def short_name(self, source: str) -> str:
        name = super().short_name(source)
        return name.removesuffix(SUFFIX)

    def hub_name(self, source: str) -> str | None:
        return None if source.endswith(SUFFIX) else super().hub_name(source)

    def files(self, source: str) -> dict[str, Path]:
        if (adapter := peft.adapter_folder(source)) is not None:
            base = self.files(adapter.base)
            under = {f"{adapter.base}/{name}": file for name, file in base.items()}
            return by_name(loaded_files(adapter.folder), adapter.folder) | under
        path = Path(source)
        return {path.name: path} if path.is_file() else super().files(source)

    def carried(self, source: str, revision: str | None) -> dict[str, Path]:
        if (adapter := peft.adapter_folder(source)) is not None:
            return self.carried(adapter.base, revision) | carried_files(adapter.folder)
        if revision is None:
            return super().carried(source, None)
        fetch_description(source, revision)
        folder = cached_folder(source, revision=revision)
        return carried_files(folder) if folder else {}

    def checkpoint(self, source: str) -> Path | None:
        path = Path(source)
        folder = (
            dequantised(path)
            if path.suffix == SUFFIX
            else path
            if path.exists()
            else cached_folder(source)
        )
        if folder is None or (folder / peft.CONFIG).is_file():  # what is merged is not streamed
            return None
        return folder if any(folder.glob("*.safetensors")) else None

    def download(self, source: str) -> Path | None:
        from huggingface_hub import snapshot_download

        name = self.hub_name(source)
        if name is None:
            return None
        try:
            # `model*`: some repositories hold the same weights once more under another name.
            snapshot_download(
                name, allow_patterns=["*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja"]
            )
        except Exception:  # the hub's clients fail in many ways
            return None
        return self.checkpoint(name)

    def input_name(self, model: LoadedModel) -> str:
        return str(getattr(model.module, "main_input_name", "input_ids"))

    def sample_inputs(self, model: LoadedModel, batch: int, length: int) -> dict[str, torch.Tensor]:
        config: Any = model.module.config
        batch = 1 if _one_at_a_time(model) else batch
        if model.family == "vision":
            height, width = model.processor.size
            return {
                "pixel_values": _noise(model, (batch, len(model.processor.mean), height, width))
            }
        tokens = vocabulary(config)
        if tokens is None:
            raise RefusedInputs(
                f"{type(model.module).__name__} reads neither text nor single images "
                f"({model.module.main_input_name}), and nothing else is known of its inputs."
            )
        ids = (torch.arange(batch * length, device=model.device) % tokens).view(batch, length)
        if model.family == "seq2seq":
            return {**_encoder_inputs(model, ids), "decoder_input_ids": ids.flip(1)}
        # Decoders look into positions for want of a mask, encoders into the mask; without memory
        # nothing is to be seen.
        given = model.family == ("llm" if ids.is_meta else "encoder")
        mask = {"attention_mask": torch.ones_like(ids)} if given else {}
        return {"input_ids": ids, **mask}

    def other_inputs(
        self, model: LoadedModel, batch: int, length: int
    ) -> Iterator[dict[str, torch.Tensor]]:
        return guesses(model.module, batch, length)

    def trial_inputs(self, model: LoadedModel, batch: int, length: int) -> dict[str, torch.Tensor]:
        given = self.sample_inputs(model, batch, length)
        assert model.image_text is not None
        dtype = next(model.module.parameters()).dtype
        return model.image_text.trial(given["input_ids"], model.device, dtype)

    def batches(
        self, model: LoadedModel, inputs: Mapping[str, torch.Tensor], size: int
    ) -> list[Batch]:
        # A cache would only cost memory.
        extra: Batch = {"use_cache": False} if model.family in ("llm", "seq2seq") else {}
        size = 1 if _one_at_a_time(model) else size
        split = super().batches(model, inputs, size)
        if model.image_text is not None and inputs["input_ids"].ndim == 3:
            split = [joined(batch) for batch in split]
        return [{**batch, **extra} for batch in split]

    def max_length(self, model: LoadedModel) -> int | None:
        config: Any = getattr(model.module, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        return getattr(text, "max_position_embeddings", None)

    def features(self, model: LoadedModel, inputs: Mapping[str, torch.Tensor]) -> Features:
        """Run one forward pass: tokens of the backbone and, where there is a head, logits."""
        seen: list[Any] = []
        backbone = getattr(
            model.module, getattr(model.module, "base_model_prefix", "") or "-", model.module
        )
        handle = backbone.register_forward_hook(lambda _m, _args, output: seen.append(output))
        try:
            output = model.module(**inputs)
        finally:
            handle.remove()
        return Features(None, seen[0].last_hidden_state, getattr(output, "logits", None))

    def class_labels(self, model: LoadedModel) -> ClassLabels:
        config: Any = model.module.config
        labels = getattr(config, "label2id", None) or {}
        return ClassLabels(
            {str(name): int(number) for name, number in labels.items()},
            getattr(config, "num_labels", None),
        )

    def hub_card(self, folder: Path) -> HubCard:
        try:
            names = json.loads((folder / "config.json").read_text()).get("architectures") or [""]
        except (OSError, ValueError):
            names = [""]
        task = next((task for end, task in TASKS.items() if names[0].endswith(end)), None)
        kind = names[0] or "AutoModel"
        usage = f'from transformers import {kind}\nmodel = {kind}.from_pretrained("FOLDER")'
        return HubCard(self.library, task, usage)


ADAPTER = HuggingFaceAdapter()


def identify(source: str) -> Checkpoint:
    """Decide what a source is and what would load it; of a GGUF file by unpacking it, else without
    reading a weight.

    Raises `UsageError` for what is no model, and what Transformers raises for a configuration that
    it does not take.
    """
    path, place, provenance = Path(source), source, {}
    if (adapter := peft.adapter_folder(source)) is not None:
        return _under(adapter)
    if path.suffix == SUFFIX:
        folder = dequantised(path)
        place, provenance = str(folder), {"gguf_sha256": folder.name}
    elif path.exists() and not (path / "config.json").is_file():
        raise UsageError(f"'{source}' is not a model: the folder has no config.json.")
    elif not path.exists() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise UsageError(f"There is no model '{source}'.")
    try:
        config = read_config(place)
    except OSError:
        if path.exists() or (adapter := peft.fetch(source)) is None:
            raise
        return _under(adapter)
    commit = None if Path(place).exists() else cached_folder(place)
    provenance |= {"revision": commit.name} if commit else {}
    return Checkpoint(
        place,
        path.stem if path.suffix == SUFFIX else path.name,
        config,
        auto_class(config),
        provenance,
    )


def _under(adapter: peft.AdapterFolder) -> Checkpoint:
    """Return the base of an adapter, which will be merged into it."""
    try:
        with explained(adapter.base):
            base = identify(adapter.base)
    except NmsparseError as error:
        message = (
            f"'{adapter.source}' is a PEFT adapter, and its base is not to be had: {error.message}"
        )
        raise type(error)(message, peft.MERGE) from error
    name = Path(adapter.source).name
    provenance = {**base.provenance, **adapter.provenance()}
    return replace(base, name=name, provenance=provenance, adapter=adapter)


def read_config(place: str, **options: Any) -> Any:
    """Read the configuration of a model, and forget which code it brings along.

    Raises `UsageError` where its architecture is only to be had by running that code.
    """
    import transformers

    config = own_code.without(transformers.AutoConfig, place, **options)
    if hasattr(config, "auto_map"):
        auto, architecture = (
            getattr(transformers, auto_class(config)),
            (config.architectures or [None])[0],
        )
        own_code.check_architecture(auto, config, architecture, place)
        del config.auto_map
    return config


def _load(
    checkpoint: Checkpoint, folder: Path | None, dtype: torch.dtype | None
) -> tuple[Any, WeightStore, StoredViews]:
    import transformers

    auto = getattr(transformers, checkpoint.auto)
    module, info = own_code.without(
        auto,
        checkpoint.place,
        dtype=dtype or "auto",
        config=checkpoint.config,
        output_loading_info=True,
    )
    # Tied ones are not among them. A pooler is never pruned, and no metric reads it.
    missing = sorted(key for key in info["missing_keys"] if "pooler." not in key)
    if missing:
        raise UsageError(
            f"The checkpoint '{checkpoint.place}' is incomplete: '{missing[0]}' of "
            f"{type(module).__name__} is in none of its files ({len(missing)} missing in all).",
            "fetch the missing files, or start from a complete checkpoint",
        )
    if info["unexpected_keys"]:
        unused = sorted(info["unexpected_keys"])
        checkpoint.provenance["unused_tensors"] = f"{len(unused)}: {', '.join(unused[:10])}"
    folder = folder or cached_folder(checkpoint.place)  # it may have just been downloaded
    layout = layout_of(module, folder, module.state_dict().__getitem__, checkpoint.provenance)
    if checkpoint.adapter is not None:
        module = peft.merged(module, checkpoint.adapter)
    return module, IN_MEMORY, layout


def _stream(
    checkpoint: Checkpoint, folder: Path | None, dtype: torch.dtype | None
) -> tuple[Any, WeightStore, StoredViews]:
    """Make the module without values, and its weights in the files of the checkpoint."""
    from nmsparse_deploy.models.adapters.streamed import StreamedWeights, stored_dtype

    place, config = checkpoint.place, checkpoint.config
    if checkpoint.adapter is not None:
        raise UsageError("An adapter is merged in memory, so it cannot be streamed.", peft.MERGE)
    folder = ADAPTER.checkpoint(place)
    if folder is None:
        raise UsageError(
            f"'{place}' has no safetensors files on this machine, so its weights cannot be streamed.",
            f"hf download {place}",
        )
    dtype = dtype or config.dtype or stored_dtype(folder)
    module = unfilled(checkpoint, dtype)
    transformers_private.restore_generation(module, place)
    weights = StreamedWeights(module, folder, dtype)
    return module, weights, layout_of(module, folder, weights.dense, checkpoint.provenance)


def unfilled(checkpoint: Checkpoint, dtype: torch.dtype | None) -> Any:
    """Make the module of a checkpoint, its parameters without values."""
    import transformers
    from accelerate import init_empty_weights

    auto = getattr(transformers, checkpoint.auto)
    with init_empty_weights(include_buffers=False):
        module = transformers_private.module_from_config(auto, checkpoint.config, dtype)
    module.tie_weights()
    return module


def _processor(checkpoint: Checkpoint, kind: str) -> Any:
    """Load the tokenizer, or what an image goes through before it is seen."""
    if kind == "vision":
        return from_config(
            checkpoint.config, transformers_private.image_processor_settings(checkpoint.place)
        )
    from transformers import AutoTokenizer

    adapter = checkpoint.adapter
    own = adapter is not None and adapter.has_tokenizer
    place = str(adapter.folder) if adapter is not None and own else checkpoint.place
    try:
        tokenizer = own_code.without(AutoTokenizer, place)
        tokenizer.init_kwargs.pop(
            "auto_map", None
        )  # it would be saved with a model, and the code it names would not
        return tokenizer
    except (OSError, ValueError, TypeError, ImportError) as error:
        return MissingTokenizer(checkpoint.place, first_line(error))


def _quieten() -> None:
    """Keep the libraries from drawing bars, and the hub from saying more than once that it does not
    answer."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()


def _one_at_a_time(model: LoadedModel) -> bool:
    """Is this a classifier that looks for the last token before the padding, and knows no
    padding?"""
    named = type(model.module).__name__.endswith("ForSequenceClassification")
    config: Any = model.module.config
    return named and config.get_text_config().pad_token_id is None


def _noise(model: LoadedModel, shape: tuple[int, ...]) -> torch.Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return noise.to(model.device, next(model.module.parameters()).dtype)


def _encoder_inputs(model: LoadedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Make what the encoder reads: tokens, or the spectrogram of a piece of speech of the one
    length it takes."""
    module: Any = model.module
    if module.main_input_name == "input_ids":
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    frames = 2 * getattr(module.config, "max_source_positions", 1500)
    return {
        module.main_input_name: _noise(
            model, (len(ids), getattr(module.config, "num_mel_bins", 80), frames)
        )
    }
