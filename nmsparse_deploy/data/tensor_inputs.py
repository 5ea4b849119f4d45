"""Calibration data that is ready for the forward pass: a safetensors file with one tensor
`[samples, ...]` an argument.

For what no text and no image can stand for: spectrograms of a speech model, latents of a diffusion
model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from nmsparse_deploy.errors import NmsparseError, UsageError

ENDING = ".safetensors"
SAMPLE_HASHES = "sample_sha256"
"""In a record of prepared inputs."""


@dataclass(frozen=True)
class PreparedSample:
    """The first samples of a file, by argument of the forward pass."""

    inputs: dict[str, torch.Tensor]
    source: str
    fingerprint: str

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    @property
    def hashes(self) -> tuple[str, ...]:
        """SHA-256 of each sample."""
        return tuple(
            tensors_hash({name: tensor[place] for name, tensor in self.inputs.items()})
            for place in range(len(self))
        )

    def batches(self, size: int) -> Iterator[dict[str, torch.Tensor]]:
        """Split the samples into forward passes, `size` at a time."""
        for start in range(0, len(self), size):
            yield {name: tensor[start : start + size] for name, tensor in self.inputs.items()}

    def record(self) -> dict[str, torch.Tensor]:
        """Return the samples by content, to check later that an evaluation on others of their kind
        is held out."""
        digests = [list(bytes.fromhex(digest)) for digest in self.hashes]
        return {
            "fingerprint": torch.tensor(list(bytes.fromhex(self.fingerprint)), dtype=torch.uint8),
            SAMPLE_HASHES: torch.tensor(digests, dtype=torch.uint8),
        }

    def to_json(self) -> dict[str, object]:
        return {
            "source": self.source,
            "fingerprint": self.fingerprint,
            "samples": len(self),
            "inputs": {name: list(tensor.shape) for name, tensor in self.inputs.items()},
        }


def prepared(source: str, samples: int | None = None) -> PreparedSample:
    """Read the samples of a file, at most `samples`. Raises `UsageError` for what is no such
    file."""
    tensors, fingerprint = read_tensors(source)
    check_counts(source, tensors)
    return PreparedSample(
        {name: tensor[:samples] for name, tensor in tensors.items()}, Path(source).name, fingerprint
    )


def read_tensors(source: str) -> tuple[dict[str, torch.Tensor], str]:
    """Read the tensors of a file by name, with a fingerprint of all of them. Raises
    `UsageError`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(source)
    if not path.is_file():
        raise UsageError(f"There is no file '{source}' of prepared inputs.")
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError) as error:
        raise UsageError(f"'{source}' is damaged or no safetensors file: {error}.") from error
    return tensors, tensors_hash(tensors)[:16]


def tensors_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash tensors by name and content."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_inputs_disjoint(calibration: torch.Tensor, evaluation: PreparedSample) -> int:
    """Raise `NmsparseError` when a sample was calibrated on; returns how many were compared.

    `calibration` is the `sample_sha256` of a record.
    """
    seen = {bytes(row.tolist()).hex() for row in calibration}
    same = sum(digest in seen for digest in evaluation.hashes)
    if same:
        raise NmsparseError(
            f"{same} of {len(evaluation)} evaluation samples were calibrated on; a score on them means "
            "nothing.",
            "choose another --data for the evaluation",
        )
    return len(evaluation)


def check_counts(source: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `UsageError` unless all tensors hold as many samples, and some."""
    counts = {len(tensor) if tensor.ndim else 0 for tensor in tensors.values()}
    if len(counts) != 1 or 0 in counts:
        raise UsageError(
            f"The tensors of '{source}' are not as many samples each: {sorted(counts)}."
        )
