"""What a runtime has to answer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch

Tensor = torch.Tensor | np.ndarray


class Engine(Protocol):
    """A runtime that executes an artefact."""

    @classmethod
    def build(cls, artefact: Path, settings: Mapping[str, Any]) -> Self:
        """Make `artefact` ready to run. Raises `UsageError` for a setting it does not know."""
        ...

    def inspect(self) -> dict[str, Any]:
        """Return JSON-able evidence of what really runs: versions, providers, whether sparse kernels can be chosen."""
        ...

    def run(self, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Return outputs by name. bf16 outputs come back as float32."""
        ...
