"""What sparse tensor cores run: which GPUs, precisions and shapes. Without torch, because plans and
reports ask too."""

from __future__ import annotations

from nmsparse_deploy.pattern import TWO_FOUR, Pattern, Unstructured

# Kernel alignment policy of TensorRT, in values along the reduction axis (K) and the outputs (N).
RECOMMENDED_K, RECOMMENDED_N = 64, 32
POSSIBLE_K, POSSIBLE_N = 32, 16
ELIGIBLE, INELIGIBLE = ("recommended", "possible"), "ineligible by shape"

MIN_CAPABILITY = (8, 0)
"""Sparse tensor cores came with Ampere."""
MIN_CAPABILITY_OF = {"fp8": (8, 9)}
"""Precisions that need more: FP8 came with Ada."""

BYTES = {"fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}
"""What a value takes, by the precisions that sparse tensor cores multiply."""
SPARSE_TYPES = ("F16", "BF16", "I8", "F8_E4M3")
"""The same as types of stored weights, by the names that safetensors uses."""
WEIGHT_MULTIPLE = {2: 16, 1: 32}
"""Bytes of a value -> what cuSPARSELt wants K and N to be multiples of."""
ROW_MULTIPLE = {2: 8, 1: 16}
"""Bytes of a value -> what the number of rows that it multiplies is padded to a multiple of."""


def shape_verdict(k: int, n: int, pattern: Pattern) -> str | None:
    """Return whether sparse tensor cores can run a [K, N] weight; None for N:M patterns that do not
    imply 2:4."""
    if isinstance(pattern, Unstructured):
        return "sparse tensor cores cannot run it"
    if not pattern.implies(TWO_FOUR):
        return None
    if k % RECOMMENDED_K == 0 and n % RECOMMENDED_N == 0:
        return "recommended"
    if k % POSSIBLE_K == 0 and n % POSSIBLE_N == 0:
        return "possible"
    return INELIGIBLE


def min_capability(precision: str) -> tuple[int, int]:
    """Return the compute capability from which on a GPU has sparse tensor cores for `precision`."""
    return MIN_CAPABILITY_OF.get(precision, MIN_CAPABILITY)


def shape_fits(precision: str, k: int, n: int) -> bool:
    """Return whether cuSPARSELt takes a weight of this shape."""
    multiple = WEIGHT_MULTIPLE[BYTES[precision]]
    return n % multiple == 0 and k % multiple == 0
