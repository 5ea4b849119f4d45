"""Verify the parameters of a model in memory against its stored masks."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from nmsparse_deploy.masks import Mask, MaskSet
from nmsparse_deploy.prove.group_counter import ELEMENT_TYPES, TORCH_ELEMENTS
from nmsparse_deploy.prove.report import Place, TensorCheck, VerifyReport
from nmsparse_deploy.prove.rows import masked_check, unmatched
from nmsparse_deploy.prove.scan import MemoryBytes, Scanner


def verify_module(module: nn.Module, masks: MaskSet) -> VerifyReport:
    """Check that every masked parameter is there, in its pattern, zero off its mask, finite and
    without minus zeros."""
    return verify_tensors(
        dict(module.named_parameters(remove_duplicate=False)), masks, type(module).__name__
    )


def verify_tensors(
    parameters: Mapping[str, torch.Tensor], masks: MaskSet, artefact: str, place: Place = "torch"
) -> VerifyReport:
    """Check parameters by name, in the layout of their masks, as `verify_module` does."""
    start, scanner = time.perf_counter(), Scanner()
    checks, problems = [], []
    for name, mask in masks.masks.items():
        if name in parameters:
            checks.append(_check(name, parameters[name], mask, scanner, place))
        else:
            problems.append(f"There is no parameter '{name}', which has a mask.")
    if not masks.masks:
        problems.append("There are no masks, so nothing was verified.")
    return VerifyReport(
        place,
        artefact,
        tuple(checks),
        tuple(problems),
        scanner.bytes_read,
        time.perf_counter() - start,
    )


def _check(
    name: str, parameter: torch.Tensor, mask: Mask, scanner: Scanner, place: Place
) -> TensorCheck:
    dtype, shape = TORCH_ELEMENTS.get(parameter.dtype), tuple(parameter.shape)
    row = TensorCheck(
        place, name, dtype or str(parameter.dtype), shape, str(mask.pattern), mask.axis, name
    )
    if parameter.is_meta:
        return unmatched(row, "the parameter has no values (it is on the meta device)")
    if dtype is None:
        return unmatched(row, f"values of type {parameter.dtype} cannot be checked")
    raw = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return masked_check(row, ELEMENT_TYPES[dtype], MemoryBytes(np.asarray(raw)), mask, scanner)
