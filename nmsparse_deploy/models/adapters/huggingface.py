"""Hugging Face models: a hub name, a local folder, or a GGUF file (dequantised once and cached)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from nmsparse_deploy.errors import NmsparseError, UsageError, first_line
from nmsparse_deploy.models.hub_errors import chain, refusal
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.models.preprocess import from_config
from nmsparse_deploy.models.weights import WHOLE, Weights
from nmsparse_deploy.system.assets import cache_dir, digest

HEADS = {"ForCausalLM": "AutoModelForCausalLM", "LMHeadModel": "AutoModelForCausalLM",
         "ForImageClassification": "AutoModelForImageClassification", "ForMaskedLM": "AutoModelForMaskedLM",
         "ForSequenceClassification": "AutoModelForSequenceClassification",
         "ForTokenClassification": "AutoModelForTokenClassification"}
"""How an architecture's name ends -> what loads it with its head; anything else is loaded without one."""
GENERATES = "ForConditionalGeneration"
"""Loaded by its own class: several automatic ones claim this ending."""


def load(source: str, dtype: torch.dtype | None = None, alias: str | None = None,
         name: str | None = None, stream: bool = False) -> LoadedModel:
    """Load a pretrained model and its tokenizer on the CPU, in the checkpoint's dtype unless `dtype` is given.

    `alias` is what the user typed, when that was a shorthand for `source`. With `stream` the weights stay in their
    files until a part of the module is held (`weights.py`).

    Raises `UsageError` for what is not there or not a model, `NmsparseError` for what cannot be reached. Remote code is
    never run.
    """
    path = Path(source)
    if path.suffix == ".gguf":
        folder = _dequantised(path)
        return _from_pretrained(str(folder), alias or source, name or path.stem, dtype, {"gguf_sha256": folder.name},
                                stream)
    if path.exists() and not (path / "config.json").is_file():
        raise UsageError(f"'{source}' is not a model: the folder has no config.json.")
    if not path.exists() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise UsageError(f"There is no model '{source}'.")
    return _from_pretrained(source, alias or source, name or path.name, dtype, {}, stream)


def checkpoint(source: str) -> Path | None:
    """The folder with the safetensors files of `source`, if it is on this machine. Downloads nothing."""
    path = Path(source)
    if path.suffix == ".gguf":
        folder: Path | None = _dequantised(path)
    elif path.exists():
        folder = path
    else:
        folder = snapshot(source)
    return folder if folder is not None and any(folder.glob("*.safetensors")) else None


def download(name: str) -> Path | None:
    """Bring the safetensors files of a hub model here, without loading them, and return their folder.

    None for what has no such files or cannot be had; loading it says why.
    """
    from huggingface_hub import snapshot_download

    try:
        # `model*`: some repositories hold the same weights once more under another name.
        snapshot_download(name, allow_patterns=["*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja"])
    except Exception:  # the hub's clients fail in many ways
        return None
    return checkpoint(name)


def snapshot(name: str, file: str = "config.json", revision: str | None = None) -> Path | None:
    """The folder of a hub model in the cache, if `file` is there; its name is the commit."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, file, revision=revision)
    except ValueError:  # not the name of a model
        found = None
    return Path(found).parent if isinstance(found, str) else None


def _from_pretrained(where: str, source: str, name: str, dtype: torch.dtype | None,
                     provenance: dict[str, str], stream: bool) -> LoadedModel:
    import transformers
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()  # a hub that does not answer is reported once, below
    try:
        config = transformers.AutoConfig.from_pretrained(where)
        auto = auto_class(config)
        weights: Weights = WHOLE
        if stream:
            module, weights = _streamed(where, getattr(transformers, auto), config, dtype)
        else:
            module = getattr(transformers, auto).from_pretrained(where, dtype=dtype or "auto", config=config)
        kind = family(module, auto)
        processor = _processor(where, kind, config)
    except NmsparseError:
        raise
    except Exception as error:
        raise _explain(error, source) from error
    cached = None if Path(where).exists() else snapshot(where)
    facts = {**provenance, **({"revision": cached.name} if cached else {}), "class": type(module).__name__,
             "dtype": str(module.dtype).removeprefix("torch.")}
    return LoadedModel(module.eval(), source, name, kind, processor=processor, provenance=facts,
                       weights=weights)


def _streamed(where: str, auto: Any, config: Any, dtype: torch.dtype | None) -> tuple[Any, Weights]:
    """The module without values, and its weights in the files of the checkpoint."""
    from nmsparse_deploy.models.streamed import Streamed, stored_dtype

    folder = checkpoint(where)
    if folder is None:
        raise UsageError(f"'{where}' has no safetensors files on this machine, so its weights cannot be streamed.",
                         f"hf download {where}")
    if getattr(config, "quantization_config", None):
        raise UsageError(f"'{where}' is quantised; only a dense checkpoint can be streamed.")
    dtype = dtype or config.dtype or stored_dtype(folder)
    module = unfilled(auto, config, dtype)
    module.config.name_or_path = where
    if module.can_generate():
        module.adjust_generation_fn(None, True, None, where, cache_dir=None, force_download=False, proxies=None,
                                    local_files_only=True, token=None, revision="main", subfolder="",
                                    trust_remote_code=False)
    return module, Streamed(module, folder, dtype)


def auto_class(config: Any) -> str:
    """The class of Transformers that loads a model of this config with its head."""
    import transformers

    architecture = (config.architectures or [""])[0]
    if architecture.endswith(GENERATES) and hasattr(transformers, architecture):
        return str(architecture)
    return next((name for end, name in HEADS.items() if architecture.endswith(end)), "AutoModel")


def unfilled(auto: Any, config: Any, dtype: torch.dtype | None) -> Any:
    """The module that `auto` (a class of Transformers) makes of `config`, its parameters without values."""
    from accelerate import init_empty_weights

    make = auto.from_config if auto.__name__.startswith("AutoModel") else auto._from_config
    with init_empty_weights(include_buffers=False):
        module = make(config, dtype=dtype)
    module.tie_weights()
    return module


def empty(folder: Path, dtype: torch.dtype) -> LoadedModel:
    """The model of a folder as its configuration describes it, without its weights. Raises `UsageError`."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        auto = auto_class(config)
        module = unfilled(getattr(transformers, auto), config, dtype)
        kind = family(module, auto)
        processor = _processor(str(folder), kind, config)
    except Exception as error:
        raise _explain(error, str(folder)) from error
    return LoadedModel(module.eval(), str(folder), folder.name, kind, processor=processor,
                       provenance={"class": type(module).__name__})


def family(module: Any, auto: str) -> str:
    """`llm`, `encoder`, `seq2seq` or `vision`."""
    if getattr(module.config, "is_encoder_decoder", False):
        return "seq2seq"
    if module.main_input_name == "pixel_values":
        return "vision"
    return "llm" if auto == "AutoModelForCausalLM" or auto.endswith(GENERATES) else "encoder"


def _processor(where: str, family: str, config: Any) -> Any:
    """The tokenizer, or what a picture goes through before it is seen."""
    if family != "vision":
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(where)
        except (OSError, ValueError, TypeError):
            if family != "seq2seq":
                raise
            return None  # speech comes in as features; calibration data has to be prepared then
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        raw, _ = ImageProcessingMixin.get_image_processor_dict(where)
    except OSError:
        raw = None  # the model comes without a preprocessor file
    return from_config(config, raw)


def _explain(error: Exception, source: str) -> NmsparseError:
    """One sentence for the many ways in which loading fails."""
    from safetensors import SafetensorError

    if refused := refusal(error, source, "give a local folder, or leave MODEL out to use the demo model"):
        return refused
    if any(isinstance(e, SafetensorError) for e in chain(error)):
        return UsageError(f"The weights of '{source}' are damaged or truncated: {first_line(chain(error)[-1])}.")
    if isinstance(error, (OSError, ValueError, KeyError, ImportError, RuntimeError)):
        line = first_line(error)
        hint = f"diffusers:{source} if it is a pipeline of diffusers" if "config.json" in line else None
        return UsageError(f"'{source}' cannot be loaded as a model: {line}.", hint)
    return NmsparseError(f"'{source}' cannot be loaded: {type(error).__name__}: {first_line(error)}.")


def _dequantised(path: Path) -> Path:
    """A folder with the unpacked weights of a GGUF file, cached under the file's SHA-256 (unpacking takes a while)."""
    if not path.is_file():
        raise UsageError(f"There is no file '{path}'.")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UsageError(f"'{path}' is not a GGUF file.")
    folder = cache_dir() / "dequantised" / digest(path)[:32]
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            _unpack_gguf(path, work / "model")
            (work / "model").rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def _unpack_gguf(path: Path, folder: Path) -> None:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    # Without this option the model keeps a quantizer that refuses to be saved.
    options = {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(
        transformers, "GgufConfig") else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        module = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, **options)
    except Exception as error:
        raise UsageError(f"The GGUF file '{path}' cannot be read: {first_line(error)}.") from error
    logging.disable_progress_bar()
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def sample_inputs(model: LoadedModel, batch: int = 2, length: int = 16) -> dict[str, torch.Tensor]:
    """Keyword arguments for one forward pass of the right shapes; `length` is in tokens (text only)."""
    config: Any = model.module.config
    parameter = next(model.module.parameters())
    if model.family == "vision":
        height, width = model.processor.size
        shape = (batch, len(model.processor.mean), height, width)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return {"pixel_values": noise.to(model.device, parameter.dtype)}
    vocabulary = config.get_text_config().vocab_size
    ids = (torch.arange(batch * length, device=model.device) % vocabulary).view(batch, length)
    if model.family == "seq2seq":
        return {**_source(model, ids), "decoder_input_ids": ids.flip(1)}
    # Decoders look into positions for want of a mask, encoders into the mask; without memory there is nothing to see.
    given = model.family == ("llm" if ids.is_meta else "encoder")
    mask = {"attention_mask": torch.ones_like(ids)} if given else {}
    return {"input_ids": ids, **mask}


def _source(model: LoadedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the encoder reads: tokens, or the spectrogram of a stretch of speech of the one length it takes."""
    module: Any = model.module
    if module.main_input_name == "input_ids":
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    parameter = next(module.parameters())
    frames = 2 * getattr(module.config, "max_source_positions", 1500)
    shape = (len(ids), getattr(module.config, "num_mel_bins", 80), frames)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return {module.main_input_name: noise.to(model.device, parameter.dtype)}


def save(model: LoadedModel, folder: Path, changed: Mapping[str, Callable[[], torch.Tensor]] | None = None) -> None:
    """Write config, weights and tokenizer so that stock `from_pretrained` loads them.

    Of a streamed model `changed` gives the weights that are not the checkpoint's.
    """
    from nmsparse_deploy.models.streamed import Streamed

    module: Any = model.module
    if isinstance(model.weights, Streamed):
        model.weights.save(folder, changed or {})
    else:  # the older names that the library would restore are not the ones that masks are stored under
        module.save_pretrained(folder, save_original_format=False)
    if model.processor is not None:
        model.processor.save_pretrained(folder)
