"""How close what a runtime computes is to the model that a run holds, in fp32 on this machine's
processor."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from nmsparse_deploy.errors import NmsparseError, first_line
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.models.outputs import primary_output
from nmsparse_deploy.prove.agreement import Agreement, NotCompared, agreement

Run = Callable[[Mapping[str, torch.Tensor]], Mapping[str, np.ndarray]]
"""Outputs by name for inputs by name."""


@torch.no_grad()
def compare_with_model(
    loaded: LoadedModel, run: Run, batch: int = 1, length: int = 48
) -> Agreement | NotCompared:
    """Compare outputs with the model's on other shapes than an export traces, or say why that is
    impossible here.

    Raises `CheckFailed` when a value is not finite.
    """
    inputs = loaded.sample_inputs(batch, length)
    reference = primary_output(loaded.module.float().cpu()(**inputs))
    try:
        outputs = run(inputs)
    except NmsparseError as error:
        return NotCompared(error.message)
    except (RuntimeError, NotImplementedError) as error:  # a processor without this precision
        return NotCompared(first_line(error))
    output = outputs[reference.name] if reference.name in outputs else next(iter(outputs.values()))
    return agreement(reference.value, output, reference.kind)
