"""Calibration of diffusion models: images or latents with noise at uniformly drawn steps, with and
without condition.

Sampling visits every step of the schedule, and classifier-free guidance runs the model twice at
each, with its condition and with the null class or the empty text (Ho and Salimans 2022,
arXiv:2207.12598). Statistics of one step, or of one of the two branches, are those of other inputs;
so the steps are spread evenly over the schedule, one a sample, and every second sample goes through
the null branch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nmsparse_deploy.data.images import ImageSample, by_value, calibration_images
from nmsparse_deploy.data.tensor_inputs import ENDING, check_counts, read_tensors
from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.models.denoising import INPUT, LABELS, Denoising, Noising, conditions
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.system.progress import Progress, silent

LATENTS = "latents"
MASK = "encoder_attention_mask"
"""May come with embedded text: which of its tokens are there."""
LATENT_HASHES = "latent_sha256"
"""In a record of prepared latents, where images would have `image_sha256`."""
NULL = "null."
"""In a file of prepared latents: `latents`, one tensor an argument that conditions, and
`null.ARGUMENT` for one sample of the branch without condition."""


@dataclass(frozen=True)
class NoisedSample:
    """Inputs of the forward pass, and what they were mixed from: `[samples, ...]` each."""

    inputs: dict[str, torch.Tensor]
    clean: torch.Tensor
    noise: torch.Tensor
    step: torch.Tensor
    """Row of the noising table."""
    given: dict[str, torch.Tensor]
    """Conditions of every sample, also of those that go through the null branch."""
    null: dict[str, torch.Tensor]
    """Of one sample; empty where the model has no null branch."""
    unconditional: torch.Tensor
    """Which samples go through the null branch."""
    source: str
    seed: int
    denoising: Denoising
    images: ImageSample | None = None
    origin: str = ""
    """Fingerprint of prepared latents."""

    def __len__(self) -> int:
        return len(self.step)

    @property
    def target(self) -> torch.Tensor:
        """The answer of a perfect model."""
        return self.denoising.noising.target(self.clean.float(), self.noise, self.step)

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in sorted(self.inputs):
            digest.update(
                name.encode() + self.inputs[name].reshape(-1).view(torch.uint8).numpy().tobytes()
            )
        return digest.hexdigest()[:16]

    @property
    def hashes(self) -> tuple[str, ...]:
        """SHA-256 of each image, or of each prepared latent."""
        if self.images is not None:
            return self.images.hashes
        return tuple(
            hashlib.sha256(row.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
            for row in self.clean
        )

    def record(self) -> dict[str, torch.Tensor]:
        """Return the samples by content, to check later that an evaluation is held out, and their
        steps."""
        digests = torch.tensor(
            [list(bytes.fromhex(digest)) for digest in self.hashes], dtype=torch.uint8
        )
        return {
            "image_sha256" if self.images else LATENT_HASHES: digests,
            "timestep": self.inputs["timestep"].contiguous(),
            "unconditional": self.unconditional,
        }

    def to_json(self) -> dict[str, object]:
        about = (
            self.images.to_json()
            if self.images
            else {"source": Path(self.source).name, "prepared": self.origin}
        )
        return {
            **about,
            "samples": len(self),
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            "timesteps": [round(float(t), 3) for t in self.inputs["timestep"]],
            "unconditional": int(self.unconditional.sum()),
            **self.denoising.to_json(),
        }


def noised(
    loaded: LoadedModel,
    clean: torch.Tensor,
    given: Mapping[str, torch.Tensor],
    null: Mapping[str, torch.Tensor],
    seed: int,
    source: str,
    images: ImageSample | None = None,
    origin: str = "",
) -> NoisedSample:
    """Add noise to `clean` `[samples, ...]` at steps uniform over the schedule, one in each of as
    many equal intervals.

    `given` are the conditions of every sample, `null` those of the branch without; where there is
    none, all samples keep theirs.
    """
    generator = torch.Generator().manual_seed(seed)
    count, noising = len(clean), loaded.processor.noising
    level = (
        torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    ) / count
    step = (level * len(noising)).long().clamp(max=len(noising) - 1)
    noise = torch.randn(clean.shape, generator=generator)
    unconditional = torch.zeros(count, dtype=torch.bool)
    if null:
        unconditional[torch.randperm(count, generator=generator)[: (count + 1) // 2]] = True
    inputs = mixed_inputs(
        noising,
        clean.float(),
        noise,
        step,
        given,
        null,
        unconditional,
        next(loaded.module.parameters()).dtype,
    )
    return NoisedSample(
        inputs,
        clean,
        noise,
        step,
        dict(given),
        dict(null),
        unconditional,
        source,
        seed,
        loaded.processor,
        images,
        origin,
    )


def mixed_inputs(
    noising: Noising,
    clean: torch.Tensor,
    noise: torch.Tensor,
    step: torch.Tensor,
    given: Mapping[str, torch.Tensor],
    null: Mapping[str, torch.Tensor],
    unconditional: torch.Tensor,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Make what the model is asked for `clean` `[samples, ...]` under `noise` at the rows `step` of
    the noising table.

    Where there are `null` conditions, the samples marked in `unconditional` have those.
    """
    inputs = {
        INPUT: noising.mixed(clean, noise, step).to(dtype),
        "timestep": noising.timesteps[step],
    }
    for name, value in given.items():
        chosen = (
            torch.where(unconditional.view(-1, *[1] * (value.ndim - 1)), null[name], value)
            if null
            else value
        )
        inputs[name] = chosen.to(dtype) if chosen.is_floating_point() else chosen
    return inputs


def calibration_latents(
    loaded: LoadedModel, source: str, samples: int, seed: int, progress: Progress = silent
) -> NoisedSample:
    """Draw `samples` images of the training part of `source`, or read prepared latents. Raises
    `UsageError`."""
    if source.endswith(ENDING):
        return prepared_latents(loaded, source, samples, seed)
    if loaded.processor.preprocess is None:
        raise UsageError(
            f"'{loaded.source}' denoises latents, and no autoencoder came with it.",
            f"MODEL?vae=FOLDER, or --data FILE{ENDING} with '{LATENTS}'",
        )
    images = calibration_images(source, loaded.processor.preprocess, INPUT, samples, seed, progress)
    return noised_images(loaded, images, seed, progress)


def noised_images(
    loaded: LoadedModel, images: ImageSample, seed: int, progress: Progress = silent
) -> NoisedSample:
    """Add noise to images as the model is trained on them, each with its class number where the
    model knows classes."""
    wanted = conditions(loaded.module)
    texts = [name for name in wanted if name != LABELS]
    if texts:
        raise UsageError(
            f"'{loaded.source}' is conditioned on embedded text ({', '.join(texts)}), which images do "
            "not have.",
            f"--data FILE{ENDING} with '{LATENTS}', {', '.join(texts)} and {NULL}{texts[0]}",
        )
    given = {LABELS: class_numbers(images, wanted[LABELS])} if LABELS in wanted else {}
    null = (
        {LABELS: torch.tensor(wanted[LABELS])}
        if given and _has_null(loaded, wanted[LABELS])
        else {}
    )
    progress(f"preparing {len(images)} images", 0, 0)
    clean = loaded.processor.encode(images.inputs[INPUT])
    return noised(loaded, clean, given, null, seed, images.source, images)


def _has_null(loaded: LoadedModel, classes: int) -> bool:
    """Tell whether the class table has a row behind the last class: that is the null class."""
    return any(
        isinstance(module, torch.nn.Embedding) and module.num_embeddings == classes + 1
        for module in loaded.module.modules()
    )


def class_numbers(sample: ImageSample, classes: int) -> torch.Tensor:
    """Give the classes of the whole source numbers in order, numbers as numbers.

    Raises `UsageError` where they do not fit the model.
    """
    names = {label for images, _ in sample.chosen for label in images.labels}
    if None in names:
        raise UsageError(
            f"The images of '{sample.source}' have no classes, and this model is conditioned on one.",
            "give a folder with one folder per class",
        )
    ordered = sorted((str(name) for name in names), key=by_value)
    if len(ordered) > classes:
        raise UsageError(
            f"'{sample.source}' has {len(ordered)} classes, and this model knows {classes}."
        )
    return torch.tensor([ordered.index(str(label)) for label in sample.labels])


def prepared_latents(loaded: LoadedModel, source: str, samples: int, seed: int) -> NoisedSample:
    """Read clean latents and their conditions from a file. Raises `UsageError` for one that does
    not fit the model."""
    tensors, origin = read_tensors(source)
    null = {
        name.removeprefix(NULL): tensors.pop(name)
        for name in list(tensors)
        if name.startswith(NULL)
    }
    check_counts(source, tensors)
    wanted = {**conditions(loaded.module), **{name: 0 for name in tensors if name == MASK}}
    if set(tensors) != {LATENTS, *wanted}:
        raise UsageError(
            f"'{source}' holds {', '.join(tensors)}; the model takes {LATENTS} with "
            f"{', '.join(wanted) or 'nothing else'}."
        )
    _check_widths(loaded, tensors, source)
    clean = tensors.pop(LATENTS)[:samples]
    if LABELS in wanted and not null and _has_null(loaded, wanted[LABELS]):
        null = {LABELS: torch.tensor(wanted[LABELS])}
    if null and set(null) != set(wanted):
        needed = ", ".join(NULL + name for name in wanted)
        raise UsageError(f"The branch without condition in '{source}' needs {needed}.")
    given = {name: tensor[:samples] for name, tensor in tensors.items()}
    for name in null:
        if null[name].shape not in (given[name].shape[1:], (1, *given[name].shape[1:])):
            raise UsageError(
                f"'{NULL}{name}' of '{source}' is not shaped as one sample of '{name}'."
            )
    return noised(loaded, clean, given, null, seed, source, origin=origin)


def _check_widths(loaded: LoadedModel, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Raise `UsageError` for latents of other channels or text of another width than the model
    takes."""
    module: Any = loaded.module
    channels, latents = module.config.in_channels, tensors[LATENTS]
    if latents.ndim < 3 or latents.shape[1] != channels:
        raise UsageError(
            f"The latents of '{source}' have the shape {tuple(latents.shape)}; the model takes samples of "
            f"{channels} channels."
        )
    for name, width in conditions(module).items():
        if name != LABELS and tensors[name].shape[-1] != width:
            raise UsageError(
                f"'{name}' of '{source}' is {tensors[name].shape[-1]} wide; the model takes {width}."
            )


def holds_latents(source: str) -> bool:
    """Tell whether a file of prepared inputs holds clean latents, to be noised here."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(source, framework="pt") as file:
            return LATENTS in file.keys()  # noqa: SIM118 - it is no mapping
    except (SafetensorError, OSError):
        return False  # whoever reads it says why
