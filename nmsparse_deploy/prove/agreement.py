"""How close the outputs of an artefact are to those of the model it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from nmsparse_deploy.errors import CheckFailed, UsageError

Values = torch.Tensor | np.ndarray
Kind = Literal["logits", "features"]


@dataclass(frozen=True)
class Agreement:
    """The distance of outputs from the reference, over the last axis at each of `positions`."""

    kind: Kind
    positions: int
    max_abs: float
    mean_abs: float
    relative: float
    """Euclidean norm of the difference over that of the reference."""
    argmax_share: float | None
    """Logits: share of positions with the same most likely class."""
    mean_kl: float | None
    """Logits: mean of KL(reference || output), in nats."""
    cosine: float | None
    """Features: mean cosine similarity."""


@dataclass(frozen=True)
class NotCompared:
    """Why outputs could not be compared here."""

    not_checked: str


def agreement(
    reference: Values, output: Values, kind: Kind = "logits", mask: Values | None = None
) -> Agreement:
    """Compare `output` with `reference`, both [..., classes or width].

    `mask`, of the leading shape, says which positions count (padding has no meaningful output).
    Everything is computed in float64. Raises `CheckFailed` when a value is not finite, which is how
    an overflow in half precision shows.
    """
    a, b = _rows(reference), _rows(output)
    if a.shape != b.shape:
        raise UsageError(
            f"Outputs of shape {tuple(b.shape)} cannot be compared with {tuple(a.shape)}."
        )
    if mask is not None:
        counted = torch.as_tensor(mask).bool().reshape(-1)
        a, b = a[counted], b[counted]
    if not a.numel():
        raise UsageError("There is no output to compare.")
    for name, values in (("reference", a), ("output", b)):
        nonfinite = int((~torch.isfinite(values)).sum())
        if nonfinite:
            raise CheckFailed(
                f"{nonfinite} of {values.numel()} values of the {name} are not finite."
            )
    same, kl, cosine = 0, 0.0, 0.0
    worst = total = squares = norm = 0.0
    for x, y in zip(a.split(256), b.split(256)):  # float64 logits of a long text would not fit
        x, y = x.double(), y.double()
        diff = (x - y).abs()
        worst, total = max(worst, float(diff.max())), total + float(diff.sum())
        squares, norm = squares + float((diff * diff).sum()), norm + float((x * x).sum())
        if kind == "logits":
            same += int((x.argmax(-1) == y.argmax(-1)).sum())
            kl += float(
                F.kl_div(y.log_softmax(-1), x.log_softmax(-1), reduction="sum", log_target=True)
            )
        else:
            cosine += float(F.cosine_similarity(x, y, dim=-1).sum())
    n, logits = len(a), kind == "logits"
    relative = (squares / norm) ** 0.5 if norm else float(squares > 0)
    return Agreement(
        kind,
        n,
        worst,
        total / a.numel(),
        relative,
        same / n if logits else None,
        max(0.0, kl / n) if logits else None,
        None if logits else cosine / n,
    )


def _rows(values: Values) -> torch.Tensor:
    tensor = torch.as_tensor(values).detach().cpu()
    return tensor.reshape(-1, tensor.shape[-1])


def compared(found: Agreement | NotCompared) -> str:
    """Return an agreement, or why there is none, in words."""
    if isinstance(found, NotCompared):
        return f"not run here: {found.not_checked}"
    same = f", same top token at {found.argmax_share:.1%}" if found.argmax_share is not None else ""
    return f"largest difference to PyTorch {found.max_abs:.2g}{same}"
