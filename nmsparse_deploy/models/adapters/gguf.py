"""GGUF files: unpacked once into a folder of Transformers, and cached."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

from nmsparse_deploy.errors import UsageError, first_line
from nmsparse_deploy.system.assets import cache_dir, digest

SUFFIX = ".gguf"


def dequantised(path: Path) -> Path:
    """Return a folder with the unpacked weights of a GGUF file, cached under the file's SHA-256 (it
    takes a while)."""
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
            _unpack(path, work / "model")
            (work / "model").rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def _unpack(path: Path, folder: Path) -> None:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    # Without this option the model keeps a quantizer that refuses to be saved.
    options = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)}
        if hasattr(transformers, "GgufConfig")
        else {}
    )
    try:
        # The folder of the file may hold a configuration that brings code along.
        tokenizer = AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, trust_remote_code=False
        )
        module = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            trust_remote_code=False,
            **options,
        )
    except Exception as error:
        raise UsageError(f"The GGUF file '{path}' cannot be read: {first_line(error)}.") from error
    logging.disable_progress_bar()
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
