"""Draw the calibration sample that a model's family eats: token windows, whole sequences, images,
or noised ones."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Protocol

import torch

from nmsparse_deploy.data.image_source import SUFFIXES
from nmsparse_deploy.data.image_text import image_text_sample, sources
from nmsparse_deploy.data.images import ImageSample, calibration_images
from nmsparse_deploy.data.latents import calibration_latents, holds_latents
from nmsparse_deploy.data.self_generated import GENERATED, generated
from nmsparse_deploy.data.sequences import calibration_sequences, max_tokens, paired
from nmsparse_deploy.data.table_rows import TABLES
from nmsparse_deploy.data.tensor_inputs import ENDING, prepared, tensors_hash
from nmsparse_deploy.data.text import MIX, TokenSample, calibration_sample, load_text, mixed
from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.recipe import AUTO, Calibration
from nmsparse_deploy.system.progress import Progress, silent

DEFAULTS = {
    "llm": "wikipedia",
    "encoder": "wikipedia",
    "seq2seq": "wikipedia",
    "vision": "fashion-mnist+tiny-photos",
    "diffusion": "fashion-mnist",
}
"""What `auto` means for each family."""
DATASETS = "datasets:"
MAX_HASHED = 16 << 30
"""Bytes of calibration data that are hashed whole."""


class Sample(Protocol):
    """Calibration data, whatever the family."""

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """Keyword arguments of a forward pass, `[samples, ...]`."""
        ...

    def record(self) -> dict[str, torch.Tensor]:
        """Return what is kept to prove later that an evaluation is held out."""
        ...

    def to_json(self) -> dict[str, object]: ...


def draw(
    loaded: LoadedModel,
    spec: Calibration,
    progress: Progress = silent,
    compute: torch.dtype = torch.float32,
) -> Sample:
    """Draw the calibration sample of `loaded`; a model that writes its own does so in `compute`.

    Raises `UsageError` when there is too little data.
    """
    source = DEFAULTS.get(loaded.family, "wikipedia") if spec.data == AUTO else spec.data
    if source.endswith(ENDING):
        progress(f"reading {source}", 0, 0)
        if loaded.family == "diffusion" and holds_latents(source):
            return calibration_latents(loaded, source, spec.samples, spec.seed)
        return _in_vocabulary(prepared(source, spec.samples), loaded)
    if loaded.family == "diffusion":
        progress(f"sampling {spec.samples} images of {source}", 0, 0)
        return calibration_latents(loaded, source, spec.samples, spec.seed, progress)
    if loaded.family == "vision":
        progress(f"sampling {spec.samples} images of {source}", 0, 0)
        return calibration_images(
            source, loaded.processor, loaded.input_name, spec.samples, spec.seed, progress
        )
    if loaded.processor is None or loaded.input_name != "input_ids":
        raise UsageError(
            f"'{loaded.source}' reads {loaded.input_name}, so it cannot be calibrated on text.",
            f"give inputs of its forward pass: --data FILE{ENDING}",
        )
    if loaded.image_text is not None:
        return _pictures_and_text(loaded, source, spec, compute, progress)
    progress(f"sampling {spec.samples} x {spec.length} tokens of {source}", 0, 0)
    drawn = _text(loaded, source, spec, compute, progress)
    return _in_vocabulary(
        paired(drawn, loaded.module.config) if loaded.family == "seq2seq" else drawn, loaded
    )


def sample_hash(sample: Sample) -> str:
    """Return the SHA-256 of what a sample is recorded as: its tokens or the content of its
    images, and where they are from."""
    described = json.dumps(sample.to_json(), sort_keys=True)
    return hashlib.sha256((described + tensors_hash(sample.record())).encode()).hexdigest()


def source_files(source: str) -> dict[str, Path]:
    """List the local files that calibration data is read from, by name.

    None of a source that holds more than `MAX_HASHED` bytes: of such a one the sample alone is
    compared.
    """
    files: dict[str, Path] = {}
    for part in _sources(source):
        place = next(filter(Path.exists, _places(part)), None)
        inside = sorted(place.rglob("*")) if place and place.is_dir() else [place] if place else []
        files |= {str(file): file for file in inside if file.is_file() and _is_read(file, place)}
    return files if sum(file.stat().st_size for file in files.values()) <= MAX_HASHED else {}


def _places(source: str) -> list[Path]:
    """Return where a source may lie: `FILE`, `FILE#FIELD`, `datasets:FOLDER@SPLIT#FIELD`."""
    bare = source.removeprefix(DATASETS)
    names = (bare, bare.rpartition("#")[0], bare.partition("#")[0].partition("@")[0])
    return [Path(name).expanduser() for name in names if name]


def _is_read(file: Path, source: Path | None) -> bool:
    """Decide whether data is read from a file of a folder; a file that is named itself is."""
    name = file.name.lower()
    return file == source or name.endswith((".txt", *TABLES, *SUFFIXES)) or "-ubyte" in name


def some(sample: Sample, count: int) -> dict[str, torch.Tensor]:
    """Return inputs of `count` samples, evenly spaced, or of all when there are no more; no other
    image is decoded."""
    if isinstance(sample, ImageSample):
        return sample.without((), count).inputs
    inputs = sample.inputs
    total = len(next(iter(inputs.values())))
    if count >= total:
        return inputs
    chosen = torch.linspace(0, total - 1, count).round().long().tolist()
    return {name: value[chosen] for name, value in inputs.items()}


def _text(
    loaded: LoadedModel, source: str, spec: Calibration, compute: torch.dtype, progress: Progress
) -> TokenSample:
    """Draw windows of one text or of several; what the model writes itself fills up what the texts
    lack."""
    names = _sources(source)
    whole = loaded.family in ("encoder", "seq2seq")
    sample = calibration_sequences if whole else calibration_sample
    loaded.check_length(
        min(spec.length, max_tokens(loaded.processor)) if whole else spec.length, "--length"
    )
    fill = GENERATED in names
    parts, left = [], spec.samples
    for number, name in enumerate(sorted(names, key=GENERATED.__eq__)):
        wanted = left // (len(names) - number)
        if not wanted and spec.samples:  # fewer samples than sources
            continue
        parts.append(
            generated(loaded, wanted, spec.length, spec.seed, compute, progress)
            if name == GENERATED
            else sample(
                load_text(name, loaded.processor),
                loaded.processor,
                wanted,
                spec.length,
                spec.seed,
                fill,
            )
        )
        left -= len(parts[-1].ids)
    return mixed(parts, spec.seed) if len(parts) > 1 else parts[0]


def _pictures_and_text(
    loaded: LoadedModel, source: str, spec: Calibration, compute: torch.dtype, progress: Progress
) -> Sample:
    """Draw pictures and text; what the source does not name of both is packaged."""
    assert loaded.image_text is not None
    pictures, words = sources(
        "" if spec.data == AUTO else source, DEFAULTS["vision"], DEFAULTS["llm"]
    )
    progress(f"sampling {spec.samples} pictures of {pictures} and text of {words}", 0, 0)
    text = _text(loaded, words, spec, compute, progress)
    drawn = image_text_sample(
        loaded.image_text, pictures, text, loaded.processor, spec.seed, progress
    )
    loaded.check_length(drawn.inputs["input_ids"].shape[-1], "--length")
    return _in_vocabulary(drawn, loaded)


def _sources(source: str) -> list[str]:
    """Split `A+B` into its parts, if it is not the name of a file."""
    parts = source.split(MIX)
    return [source] if Path(source.partition("#")[0]).exists() or not all(parts) else parts


def _in_vocabulary(sample: Sample, loaded: LoadedModel) -> Sample:
    """Raise `UsageError` for tokens that the model has no embedding for."""
    ids, table = (
        sample.inputs.get("input_ids"),
        getattr(loaded.module, "get_input_embeddings", lambda: None)(),
    )
    count = getattr(table, "num_embeddings", None)
    if ids is not None and count is not None and not ids.is_floating_point() and ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= count:
            raise UsageError(
                f"The data holds the token {low if low < 0 else high}, and the vocabulary of "
                f"'{loaded.source}' has {count}: another model's tokenizer made it.",
                "take the tokenizer that belongs to the model, or text instead of token ids",
            )
    return sample
