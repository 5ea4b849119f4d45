"""Matrix products with a weight, seen where they are computed, for weights that no `Linear` of
their own multiplies by.

Mixtures of experts keep the matrices of all experts in one parameter, `[E, out, in]` in some
families and `[E, in, out]` in others; some attention layers hand the weight of a `Linear` to a
function. Shapes cannot tell the two layouts apart, so the product is watched: it names the axis
that it reduces, the expert, and the rows that were routed to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Product:
    """`rows` `[tokens, reduction]` were multiplied by `weight`, or by matrix `expert` of it, along
    its `axis`."""

    weight: str
    axis: int
    expert: int
    rows: torch.Tensor


_OPERANDS: dict[str, tuple[int, int]] = {
    "mm": (0, 1),
    "addmm": (1, 2),
    "bmm": (0, 1),
    "baddbmm": (1, 2),
    "mv": (0, 1),
    "linear": (0, 1),
    "_grouped_mm": (0, 1),
    "grouped_mm_fallback": (0, 1),
}
"""Where the two factors stand among an operator's arguments; the last two take the ends of each
expert's rows third."""


def place(tensor: torch.Tensor) -> tuple[Any, Any]:
    """Return which memory a tensor lies in, and where there; meta tensors, which have none, are
    told apart too."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset()


class MatmulObserver(TorchDispatchMode):
    """While entered, it tells `seen` about every product with one of `weights`; nothing is computed
    differently."""

    def __init__(
        self, weights: Mapping[str, torch.Tensor], seen: Callable[[Product], None]
    ) -> None:
        super().__init__()
        self._weights: dict[int, list[tuple[str, torch.Tensor]]] = {}
        for name, tensor in weights.items():
            self._weights.setdefault(place(tensor)[0], []).append((name, tensor))
        self._seen = seen

    def __enter__(self) -> MatmulObserver:
        self._fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # one operator, in which nothing is seen
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.backends.mha.set_fastpath_enabled(self._fast)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in _OPERANDS:
            self._look(name, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _look(self, name: str, args: tuple, kwargs: Mapping[str, Any]) -> None:
        left, right = (args[place] for place in _OPERANDS[name])
        if name == "linear":
            right = right.transpose(-1, -2)
        for weight, other in ((right, left), (left, right)):
            known = next(
                (
                    (n, t)
                    for n, t in self._weights.get(place(weight)[0], ())
                    if 0 <= weight.storage_offset() - t.storage_offset() < t.numel()
                ),
                None,
            )
            if known is None:
                continue
            if weight is left:  # W X is (Xᵀ Wᵀ)ᵀ
                other = right.unsqueeze(-1) if right.ndim == 1 else right
                other, weight = other.transpose(-1, -2), weight.transpose(-1, -2)
            ends = args[2] if len(args) > 2 else kwargs.get("offs")
            for product in _products(*known, weight, other, ends if "grouped" in name else None):
                self._seen(product)
            return


def _products(
    name: str,
    stored: torch.Tensor,
    factor: torch.Tensor,
    rows: torch.Tensor,
    ends: torch.Tensor | None,
) -> Iterator[Product]:
    """`rows` times `factor` `[..., reduction, outputs]`, a view of all of `stored` or of one matrix
    of it."""
    reduction, stride = factor.shape[-2], factor.stride(-2)
    matrices = (stored.ndim - 2, stored.ndim - 1)
    axis = next(
        (a for a in matrices if stored.stride(a) == stride and stored.shape[a] == reduction), None
    )
    if axis is None:
        return  # multiplied in pieces, or after a reshape: not known to be this axis
    first = (
        (factor.storage_offset() - stored.storage_offset()) // stored.stride(0)
        if stored.ndim > 2
        else 0
    )
    if factor.ndim == 2 or factor.shape[0] == 1 or factor.stride(0) == 0:
        yield Product(name, axis, first, rows.reshape(-1, reduction))
    elif ends is not None:
        begin = 0
        for expert, end in enumerate(ends.tolist()):
            yield Product(name, axis, first + expert, rows[begin:end])
            begin = end
    else:
        for expert in range(factor.shape[0]):
            part = rows[expert if rows.shape[0] > 1 else 0]
            routed = part.ne(0).any(-1)  # what is not routed here comes as zeros
            yield Product(name, axis, first + expert, part[routed])
