"""A folder that holds a model: which of its files are weights, what loading reads, and what a
pruned copy takes over."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from nmsparse_deploy.prove.tensor_files import stays_inside

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


LEFT_BEHIND = re.compile(r"quant\w*_config\.json$|^adapter_config\.json$|^\.DS_Store$")
"""Names of files that describe weights as they are not any more."""


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


def carried_files(folder: Path) -> dict[str, Path]:
    """List what a pruned copy of a model takes over from its folder, by name: everything that is
    no weight, and the modules that stand behind the model in a folder of sentence-transformers.

    Hidden folders, other runs, a trainer's checkpoints, descriptions of quantised or adapted
    weights, and links to files elsewhere stay behind: what a stranger's link leads to is not to be
    published with the model.
    """
    snapshot = folder.parent.name == "snapshots"  # of the hub's cache, whose files are links
    home = (folder.parents[1] if snapshot else folder).resolve()
    own = [folder / path for path in _modules(folder)]
    carried: dict[str, Path] = {}
    for place, inner, names in os.walk(folder):
        inner[:] = sorted(name for name in inner if _belongs(Path(place, name)))
        for file in sorted(Path(place, name) for name in names):
            wanted = not is_weight(file) or any(file.is_relative_to(module) for module in own)
            inside = Path(os.path.realpath(file)).is_relative_to(home)
            if wanted and inside and file.is_file() and not LEFT_BEHIND.search(file.name):
                carried[file.relative_to(folder).as_posix()] = file
    return carried


def _belongs(folder: Path) -> bool:
    """Decide whether a folder inside of a model's is part of the model."""
    odd = folder.name.startswith((".", "__pycache__")) or re.fullmatch(
        r"checkpoint-\d+", folder.name
    )
    return not odd and not (folder / "manifest.json").is_file()


def _modules(folder: Path) -> list[str]:
    """Return the sub-folders that sentence-transformers runs after the model itself."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        paths = [str(module["path"]) for module in modules]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [path for path in paths if stays_inside(path) and path.strip("./")]


def by_name(files: Iterable[Path], root: Path) -> dict[str, Path]:
    """Name files by their paths below `root`; what lies elsewhere keeps its whole path."""
    return {
        (file.relative_to(root) if file.is_relative_to(root) else file).as_posix(): file
        for file in files
    }
