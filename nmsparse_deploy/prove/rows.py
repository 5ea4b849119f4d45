"""Fill in a `TensorCheck`: against a stored mask, or with nothing but the pattern to go by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from nmsparse_deploy.masks import Mask
from nmsparse_deploy.pattern import NMPattern, Pattern, Unstructured
from nmsparse_deploy.prove.group_counter import ElementType, group_origin
from nmsparse_deploy.prove.report import (
    CLAIMS,
    TensorCheck,
    describe_count,
    describe_outputs,
    gemm_shape,
    judge,
)
from nmsparse_deploy.prove.scan import ByteSource, Scanned, Scanner, countable
from nmsparse_deploy.system.sparse_cores import shape_verdict


def unmatched(row: TensorCheck, *problems: str) -> TensorCheck:
    """Return the row of a tensor that had to be checked and could not be."""
    return replace(row, skipped=None, problems=(*row.problems, *problems))


def missed(row: TensorCheck, reason: str, fails: bool) -> TensorCheck:
    """Return the row of a weight that could not be looked at; one that fails is not skipped."""
    return replace(row, followed=False, skipped=None if fails else f"not followed: {reason}")


def not_followed(row: TensorCheck, reason: str, expected: bool) -> TensorCheck:
    """Return the row of a weight that could not be looked at; it fails if it was expected to be
    sparse."""
    row = missed(row, reason, fails=False)
    return unmatched(row, f"expected to be sparse, but not followed: {reason}") if expected else row


def masked_check(
    row: TensorCheck,
    element: ElementType,
    source: ByteSource,
    mask: Mask,
    scanner: Scanner,
    digest: bool = False,
) -> TensorCheck:
    """Check a tensor whose mask is stored in the same layout as the tensor."""
    if mask.shape != row.shape:
        return unmatched(
            row, f"its shape is {list(row.shape)}, its mask has shape {list(mask.shape)}"
        )
    if not -len(mask.shape) <= mask.axis < len(mask.shape):
        return unmatched(row, f"its mask has the group axis {mask.axis}, which it does not have")
    axis = mask.axis % len(mask.shape)
    if not countable(row.shape, axis, element, mask.pattern):
        return unmatched(
            row,
            f"axis {axis} of shape {list(row.shape)} cannot be checked in groups of "
            f"{mask.pattern.alignment}",
        )
    row = replace(row, problems=(*row.problems, *_wrong_share(mask, axis)))
    scanned = scanner.scan(
        source, element, row.shape, [axis], mask.pattern, np.asarray(mask.bits), digest
    )
    return claim(
        replace(row, axis=axis, pattern=str(mask.pattern)), mask.pattern, scanned, law4=True
    )


def _wrong_share(mask: Mask, axis: int) -> list[str]:
    """Count the zeros of an unstructured mask, which is believed about places alone."""
    if not isinstance(mask.pattern, Unstructured):
        return []
    ones, size = int(np.bitwise_count(mask.bits).sum(dtype=np.int64)), math.prod(mask.shape)
    if not size or mask.pattern.allows(ones, size // mask.shape[axis], mask.shape[axis]):
        return []
    return [f"its mask keeps {ones:,} of {size:,} values, which is not {mask.pattern}"]


def claim(row: TensorCheck, pattern: Pattern, scanned: Scanned, law4: bool) -> TensorCheck:
    """Fill in a row that must hold. `law4`: baking has normalised minus zeros, so one of them is a
    failure."""
    row = measured(row, pattern, scanned)
    count = scanned.counts[row.axis or 0]
    problems = list(row.problems)
    if count.bad:
        outputs = scanned.outputs.get(row.axis or 0)
        dense = describe_outputs(outputs, count.bad) if outputs else None
        problems.append(", ".join(filter(None, (describe_count(count, row.first_bad), dense))))
    if row.mask_mismatch:
        problems.append(f"{row.mask_mismatch:,} values outside its mask are not zero")
    if row.nonfinite:
        problems.append(f"{row.nonfinite:,} values are NaN or infinite")
    if law4 and row.negative_zeros:
        problems.append(
            f"{row.negative_zeros:,} zeros are minus zero; baking a mask must write +0.0"
        )
    return replace(row, problems=tuple(problems))


def measured(row: TensorCheck, pattern: Pattern, scanned: Scanned) -> TensorCheck:
    """Return the row with its counts, claiming nothing."""
    axis = row.axis or 0
    count = scanned.counts[axis]
    first = (
        None if count.first_bad is None else group_origin(count.first_bad, row.shape, axis, pattern)
    )
    return replace(
        row,
        axis=axis,
        groups=count.groups,
        bad=count.bad,
        first_bad=first,
        sparser=count.sparser,
        nonzeros=count.nonzeros,
        negative_zeros=count.negative_zeros,
        nonfinite=count.nonfinite,
        mask_mismatch=scanned.mask_mismatch,
        sha256=scanned.sha256,
        shape_verdict=row.shape_verdict or shape_verdict(*gemm_shape(row.shape, axis), pattern),
    )


def foreign_check(
    row: TensorCheck, pattern: NMPattern, scanned: Scanned, expected: bool
) -> TensorCheck:
    """Judge a tensor of unknown intent: sparse (a claim that holds), a near miss (one that fails),
    or dense (none)."""
    verdicts = {
        axis: judge(count, pattern, scanned.outputs.get(axis))
        for axis, count in scanned.counts.items()
    }
    best_first: Sequence[str] = ("sparse", "near miss", "by chance", "dense")
    axis = min(verdicts, key=lambda a: best_first.index(verdicts[a]))
    row, verdict = replace(row, axis=axis), verdicts[axis]
    if expected or row.problems or verdict in CLAIMS:
        return claim(row, pattern, scanned, law4=False)
    reason = (
        "dense" if verdict == "dense" else "too empty or too small to tell the pattern from chance"
    )
    return replace(measured(row, pattern, scanned), skipped=reason)
