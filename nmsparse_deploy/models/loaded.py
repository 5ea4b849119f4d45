"""A pretrained model with what the later stages need to know about it, and what a model library has
to answer."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.models.base import Discovery
from nmsparse_deploy.models.discovery import RefusedInputs, discover
from nmsparse_deploy.models.hub_cache import cached_folder
from nmsparse_deploy.models.image_text import ImageTextProcessor
from nmsparse_deploy.models.model_folder import by_name, carried_files, loaded_files
from nmsparse_deploy.models.outputs import Features, primary_output
from nmsparse_deploy.models.preprocess import ImagePipeline
from nmsparse_deploy.models.weight_store import IN_MEMORY, WeightStore
from nmsparse_deploy.prove.stored_views import StoredViews

Batch = dict[str, Any]
"""Keyword arguments of one forward pass."""
Changed = Mapping[str, Callable[[], torch.Tensor]]
"""What gives the weights that are not the checkpoint's any more, by parameter name."""


@dataclass
class LoadedModel:
    """A pretrained model, bound to the library that loaded it."""

    module: nn.Module
    source: str
    """What the user can type to load the same model again."""
    name: str
    """A short name for folders and headings."""
    family: str
    """Which data it eats and which metric it is judged by: `llm`, `encoder`, `seq2seq`, `vision`,
    `diffusion`; of any other it takes inputs that are prepared for it."""
    adapter: ModelAdapter
    processor: Any = None
    """Tokenizer (text) or preprocessing settings (images)."""
    provenance: dict[str, str] = field(default_factory=dict)
    """Revision, file hashes, dtype, library versions."""
    weights: WeightStore = IN_MEMORY
    guess: int | None = None
    """Which of `other_inputs` the model takes; None: the adapter's ordinary ones."""
    stored: StoredViews = field(default_factory=dict)
    """What is saved where it is not each parameter under its own name: the checkpoint's layout."""
    image_text: ImageTextProcessor | None = None
    """Of a vision-language model: what shows it pictures; without, it only reads text."""

    @property
    def streamed(self) -> bool:
        """Do the weights stay in their files?"""
        return self.weights.device is not None

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.weights.device or next(self.module.parameters()).device

    @property
    def input_name(self) -> str:
        """Under which name the forward pass takes its images, latents or token ids."""
        return self.adapter.input_name(self)

    def to(self, device: torch.device) -> None:
        """Compute on `device` from now on."""
        if self.streamed:
            self.weights.to(device)
        else:
            self.module.to(device)

    def sample_inputs(self, batch: int = 2, length: int = 16) -> dict[str, torch.Tensor]:
        """Make keyword arguments for one forward pass of the right shapes; `length` is in tokens
        (text only)."""
        if self.guess is not None:
            guessed = self.adapter.other_inputs(self, batch, length)
            return next(islice(guessed, self.guess, None))
        return self.adapter.sample_inputs(self, batch, length)

    def trial_inputs(self, batch: int = 2, length: int = 16) -> dict[str, torch.Tensor]:
        """Make keyword arguments for one forward pass in which as much as possible of the model
        runs: pictures too, where `sample_inputs` has only text."""
        if self.image_text is None:
            return self.sample_inputs(batch, length)
        return self.adapter.trial_inputs(self, batch, length)

    def batches(self, inputs: Mapping[str, torch.Tensor], size: int) -> list[Batch]:
        """Split inputs `[samples, ...]` into forward passes of `size` samples each, on the model's
        device."""
        return self.adapter.batches(self, inputs, size)

    def discover(self) -> Discovery:
        """Find blocks, targets and what stays dense, by one forward pass. Raises
        `NmsparseError`."""
        if self.image_text is not None:
            try:
                return discover(self.module, self.trial_inputs(), self.weights)
            except NmsparseError as error:  # a processor that is not this model's: text still goes
                self.image_text = None
                self.provenance["pictures"] = f"only text is calibrated: {error.message}"
        try:
            return discover(self.module, self.sample_inputs(), self.weights)
        except RefusedInputs:
            for number, inputs in enumerate(self.adapter.other_inputs(self, 2, 16)):
                with suppress(RefusedInputs):
                    found = discover(self.module, inputs, self.weights)
                    self.guess = number
                    return found
            raise

    def save(self, folder: Path, changed: Changed | None = None) -> None:
        """Write a folder that the stock library loads; of a streamed model `changed` has what is
        not the checkpoint's."""
        self.adapter.save(self, folder, changed)

    def check_length(self, length: int, option: str) -> None:
        """Raise `UsageError` for windows of more tokens than the model has positions for."""
        longest = self.adapter.max_length(self)
        if longest is not None and length > longest:
            raise UsageError(
                f"Windows of {length} tokens are longer than the {longest} that '{self.name}' takes.",
                f"{option} {longest}",
            )


class ClassLabels(NamedTuple):
    """The classes that a model's head tells apart: label -> output, and how many outputs there are
    (None: no head)."""

    numbers: dict[str, int]
    outputs: int | None


class HubCard(NamedTuple):
    """The description of a saved model for a hub: its library, its job if that is known, and the
    code that loads it."""

    library: str
    task: str | None
    usage: str


class ModelAdapter(Protocol):
    """A model library: which sources it loads, how its models are fed, and how they are saved.

    Subclasses answer what is abstract here, and whatever they know better than the defaults.
    Modules take the inputs of a forward pass as keyword arguments; discovery and the block walk
    need nothing else of a library.
    """

    library: str
    """Its name in records and messages."""
    prefix: str = ""
    """What may stand before a source to say that this library loads it."""

    @abstractmethod
    def claims(self, source: str) -> bool:
        """Decide whether MODEL is this library's, from its spelling or from what a local folder
        holds."""

    @abstractmethod
    def load(
        self, source: str, dtype: torch.dtype | None = None, stream: bool = False
    ) -> LoadedModel:
        """Load MODEL on the CPU, in the checkpoint's dtype unless `dtype` is given. Its own code is
        never run.

        With `stream` the weights stay in their files until they are needed; only for what
        `checkpoint` finds. Raises `UsageError` for what is not there or not a model, `MissingExtra`
        without the library, `NmsparseError` for what cannot be reached.
        """

    @abstractmethod
    def meta_model(self, folder: Path, dtype: torch.dtype) -> LoadedModel:
        """Build the model that the configuration in `folder` describes, its parameters on the meta
        device.

        Buffers are real and have the dtypes that they have when the library loads the model in
        `dtype`. Raises `UsageError` for a folder that describes no model.
        """

    @abstractmethod
    def save(self, model: LoadedModel, folder: Path, changed: Changed | None = None) -> None:
        """Write a folder that the stock library loads; of a streamed model `changed` has what is
        not the checkpoint's."""

    @abstractmethod
    def input_name(self, model: LoadedModel) -> str:
        """Name the argument of the forward pass that takes images, latents or token ids."""

    @abstractmethod
    def sample_inputs(self, model: LoadedModel, batch: int, length: int) -> dict[str, torch.Tensor]:
        """Make keyword arguments for one forward pass of the right shapes; `length` is in tokens
        (text only)."""

    def other_inputs(
        self, model: LoadedModel, batch: int, length: int
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Yield guesses at the inputs of a model that does not take `sample_inputs`."""
        return iter(())

    def knows(self, name: str) -> bool:
        """Decide whether a bare name, which is no model of the hub, is one of this library's
        own."""
        return False

    def reference(self, source: str) -> str:
        """Return the name or path in MODEL, without the library's prefix and without options."""
        return source.removeprefix(self.prefix).partition("?")[0]

    def short_name(self, source: str) -> str:
        """Name MODEL for folders and headings, without loading it."""
        return Path(self.reference(source)).name

    def hub_name(self, source: str) -> str | None:
        """Return OWNER/NAME of MODEL on the hub; None for what is a file, a folder, or in no
        hub."""
        name = self.reference(source)
        return (
            name
            if re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name) and not Path(name).exists()
            else None
        )

    def folder(self, source: str) -> Path | None:
        """Return the folder on this machine that MODEL is loaded from; None where it is a file, or
        is not here."""
        place = Path(source if Path(source).exists() else self.reference(source)).expanduser()
        if place.exists():
            return place if place.is_dir() else None
        name = self.hub_name(source)
        return cached_folder(name) if name else None

    def files(self, source: str) -> dict[str, Path]:
        """List the files on this machine that MODEL is loaded from, by name: weights,
        configuration, tokenizer."""
        folder = self.folder(source)
        return by_name(loaded_files(folder), folder) if folder else {}

    def carried(self, source: str, revision: str | None) -> dict[str, Path]:
        """List what a pruned copy of MODEL takes over as it is, by name; `revision` is the hub's
        commit."""
        folder = self.folder(source)
        return carried_files(folder) if folder else {}

    def checkpoint(self, source: str) -> Path | None:
        """Return the folder of safetensors files that MODEL stands for, if it can be streamed and
        is on this machine."""
        return None

    def download(self, source: str) -> Path | None:
        """Bring the safetensors files of a hub model here, without loading them, and return their
        folder.

        None for what cannot be streamed or cannot be had; loading it says why.
        """
        return None

    def shapes(self, source: str, config: Mapping[str, Any] | None) -> LoadedModel:
        """Build MODEL with every parameter on the meta device; no weight is read and nothing is
        downloaded.

        `config` has entries of a config.json. Raises `UsageError` where neither it nor this machine
        tells the shapes.
        """
        raise unknown_shapes(source)

    def batches(
        self, model: LoadedModel, inputs: Mapping[str, torch.Tensor], size: int
    ) -> list[Batch]:
        """Split inputs `[samples, ...]` into keyword arguments of forward passes, `size` samples
        each."""
        parts = {name: value.to(model.device).split(size) for name, value in inputs.items()}
        return [dict(zip(parts, row)) for row in zip(*parts.values())]

    def trial_inputs(self, model: LoadedModel, batch: int, length: int) -> dict[str, torch.Tensor]:
        """Make inputs in which as much as possible of the model runs."""
        return self.sample_inputs(model, batch, length)

    def max_length(self, model: LoadedModel) -> int | None:
        """Return how many tokens the model reads at once; None where it does not say."""
        return None

    def features(self, model: LoadedModel, inputs: Mapping[str, torch.Tensor]) -> Features:
        """Run one forward pass and return what it says about its inputs; tokens may be a map of
        features."""
        output = primary_output(model.module(**inputs))
        if output.kind == "logits":
            return Features(None, None, output.value)
        return (
            Features(output.value, None, None)
            if output.value.ndim < 3
            else Features(None, output.value, None)
        )

    def class_labels(self, model: LoadedModel) -> ClassLabels:
        """Return the labels that the model's head comes with."""
        return ClassLabels({}, None)

    def image_pipeline(self, model: LoadedModel) -> ImagePipeline:
        """Return how images are prepared where the model is validated."""
        return model.processor.pipeline()

    def hub_card(self, folder: Path) -> HubCard:
        """Describe a saved model to a hub."""
        return HubCard(
            self.library,
            None,
            'from nmsparse_deploy import models\nmodel = models.load("FOLDER").module',
        )


def unknown_shapes(source: str) -> UsageError:
    """Return the error for a model whose shapes nothing here tells."""
    return UsageError(
        f"What '{source}' looks like is not known on this machine, so its cost cannot be predicted.",
        "put its config.json under 'config:' of the recipe",
    )
