"""Calibration data that is ready for the forward pass: a safetensors file with one tensor `[samples, ...]` an argument.

For what no text and no image can stand for: spectrograms of a speech model, latents of a diffusion model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from nmsparse_deploy.errors import UsageError

ENDING = ".safetensors"


@dataclass(frozen=True)
class PreparedSample:
    """The first samples of a file, by argument of the forward pass."""

    inputs: dict[str, torch.Tensor]
    source: str
    fingerprint: str

    def record(self) -> dict[str, torch.Tensor]:
        """Return nothing that an evaluation on text or images could be compared with."""
        return {"fingerprint": torch.tensor(list(bytes.fromhex(self.fingerprint)), dtype=torch.uint8)}

    def to_json(self) -> dict[str, object]:
        count = len(next(iter(self.inputs.values())))
        return {"source": self.source, "fingerprint": self.fingerprint, "samples": count,
                "inputs": {name: list(tensor.shape) for name, tensor in self.inputs.items()}}


def prepared(source: str, samples: int) -> PreparedSample:
    """Read at most `samples` samples. Raises `UsageError` for what is no such file."""
    tensors, fingerprint = read_tensors(source)
    check_counts(source, tensors)
    return PreparedSample({name: tensor[:samples] for name, tensor in tensors.items()}, Path(source).name, fingerprint)


def read_tensors(source: str) -> tuple[dict[str, torch.Tensor], str]:
    """Read the tensors of a file by name, with a fingerprint of all of them. Raises `UsageError`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(source)
    if not path.is_file():
        raise UsageError(f"There is no file '{source}' of prepared inputs.")
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError) as error:
        raise UsageError(f"'{source}' is damaged or no safetensors file: {error}.") from error
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return tensors, digest.hexdigest()[:16]


def check_counts(source: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `UsageError` unless all tensors hold as many samples, and some."""
    counts = {len(tensor) if tensor.ndim else 0 for tensor in tensors.values()}
    if len(counts) != 1 or 0 in counts:
        raise UsageError(f"The tensors of '{source}' are not as many samples each: {sorted(counts)}.")
