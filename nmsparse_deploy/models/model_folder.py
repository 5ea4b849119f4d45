"""A folder that holds a model: which of its files are weights, what loading reads, and what a
pruned copy takes over."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".ggml",
    ".h5",
    ".hdf5",
    ".keras",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".onnx.data",
    ".ot",
    ".tflite",
    ".npz",
    ".pkl",
    ".pickle",
    ".pdparams",
    ".nemo",
    ".mlmodel",
    ".pb",
    ".engine",
    ".index.json",
)
"""How files of weights end, in any format, and the indexes of such files."""
LOADED_FORMATS = (".safetensors", ".bin")
"""Weights that the libraries here load; the first format that a folder has."""
DESCRIBING = (".json", ".txt", ".jinja", ".model", ".tiktoken", ".vocab", ".bpe")
"""How the files end that say what a model is, how its inputs are made, and how it answers."""


def is_weight(file: Path) -> bool:
    """Tell whether a file holds weights, or an index of such files."""
    return file.name.lower().endswith(WEIGHTS)


def loaded_files(folder: Path) -> list[Path]:
    """List what loading a model reads from its folder: weights of one format, configuration,
    tokenizer, preprocessing."""
    files = sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
    weights = [[file for file in files if file.suffix == end] for end in LOADED_FORMATS]
    described = [file for file in files if file.suffix in DESCRIBING]
    return [*next(filter(None, weights), []), *described]


def by_name(files: Iterable[Path], root: Path) -> dict[str, Path]:
    """Name files by their paths below `root`; what lies elsewhere keeps its whole path."""
    return {
        (file.relative_to(root) if file.is_relative_to(root) else file).as_posix(): file
        for file in files
    }
