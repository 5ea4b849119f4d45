"""The layers of a deployed PyTorch model: sparse or dense, in 16 bits or 8, all of them
`y = x Wᵀ + b`.

In 8 bits `y = s_x s_w (Q(x / s_x) Q(w)ᵀ) + b`. FP8, whose values are floating anyway, has one `s_w`
for the weight and one `s_x` for what the layer reads, known in advance. INT8 has an `s_w` for every
output and an `s_x` for every row (token), taken from the row itself: language models have a few
tokens hundreds of times larger than all others, and a scale that fits those rounds the rest to
zero. The dense twins use what PyTorch itself has: `_int_mm` writes 32-bit sums that are scaled
afterwards, `_scaled_mm` scales in the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nmsparse_deploy.ship.quantise import FORMATS, MINUS_ZERO
from nmsparse_deploy.ship.torch_sparse.semi_structured import (
    DTYPES,
    KernelSetting,
    kernels,
    product,
)

MAX_VALUE = {DTYPES[name]: form.max_value for name, form in FORMATS.items()}
"""The largest value of a format."""
MIN_SCALE = 2.0**-24
"""The smallest number of fp16 that is not zero."""
INT_MM_ROWS = 32
"""`_int_mm` takes more than 16 rows, and a multiple of 8."""


HEADROOM = 64.0
"""In 16 bits a product is held in units of its layer's largest input until its row scales it: a row
smaller by this much leaves the product as it is."""


@dataclass(frozen=True)
class EightBit:
    """Scales of one weight: `weight` `[n]` or `[1]`, `read` for the layer's largest input; fp32."""

    weight: torch.Tensor
    read: torch.Tensor


class KernelLinear(nn.Module):
    """A layer with what all of them share: shapes, bias, and flattening the leading axes."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, k: int, n: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = k, n
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.rows(x.reshape(-1, self.in_features))
        return y.reshape(*x.shape[:-1], self.out_features)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    @property
    def weight_bytes(self) -> int:
        return int(self.weight.nbytes)


class Dense(KernelLinear):
    """An ordinary layer; a class of its own so that all arms call the same things."""

    def __init__(self, rows: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(rows.shape[1], rows.shape[0], bias)
        self.register_buffer("weight", rows)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class Sparse(KernelLinear):
    """A 2:4 weight in the kernels' own order. `settings` are by rows; other rows get the library's
    default."""

    def __init__(
        self,
        rows: torch.Tensor,
        bias: torch.Tensor | None,
        settings: dict[int, KernelSetting] | None = None,
    ) -> None:
        super().__init__(rows.shape[1], rows.shape[0], bias)
        self.register_buffer("weight", kernels().compress(rows))
        self.settings = settings or {}

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        setting = self.settings.get(len(x), KernelSetting())
        return product(
            x.contiguous(), self.weight, self.out_features, self.bias, None, x.dtype, setting
        )


class Codes(KernelLinear):
    """8-bit codes of a weight; subclasses multiply them. `out` is the dtype of everything around.

    `alpha` `[n]` (fp32) is what a product of codes is multiplied by: the weight's scale times
    `read`.
    """

    read: torch.Tensor
    alpha: torch.Tensor

    def __init__(
        self, codes: torch.Tensor, scales: EightBit, bias: torch.Tensor | None, out: torch.dtype
    ) -> None:
        super().__init__(codes.shape[1], codes.shape[0], bias)
        self.kind, self.out = codes.dtype, out
        read = scales.read.float().reshape(()) / (HEADROOM if self.kind == torch.int8 else 1.0)
        self.register_buffer("read", read)
        self.register_buffer(
            "alpha", (scales.weight * read).float().expand(codes.shape[0]).contiguous()
        )

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        codes, factors = self.encode(x)
        y = self.multiply(codes)
        y = y if factors is None else y * factors.to(self.out)
        return y if self.bias is None else y + self.bias

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the codes of what is read, and in INT8 what every row is multiplied by afterwards,
        `[rows, 1]`."""
        values, max_value = x.float(), MAX_VALUE[self.kind]
        if self.kind != torch.int8:
            return (values / self.read).clamp(-max_value, max_value).to(self.kind), None
        scales = (values.abs().amax(1, keepdim=True) / max_value).clamp(min=MIN_SCALE)
        return (values / scales).round().to(self.kind), scales / self.read

    def multiply(self, codes: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class SparseCodes(Codes):
    """2:4 codes in the kernels' own order."""

    def __init__(
        self,
        codes: torch.Tensor,
        scales: EightBit,
        bias: torch.Tensor | None,
        out: torch.dtype,
        settings: dict[int, KernelSetting] | None = None,
    ) -> None:
        super().__init__(codes, scales, bias, out)
        self.register_buffer("weight", kernels().compress(codes))
        self.settings = settings or {}

    def multiply(self, codes: torch.Tensor) -> torch.Tensor:
        setting = self.settings.get(len(codes), KernelSetting())
        return product(
            codes.contiguous(), self.weight, self.out_features, None, self.alpha, self.out, setting
        )


class DenseCodes(Codes):
    """The dense twin."""

    scale: torch.Tensor

    def __init__(
        self, codes: torch.Tensor, scales: EightBit, bias: torch.Tensor | None, out: torch.dtype
    ) -> None:
        super().__init__(codes, scales, bias, out)
        self.register_buffer("weight", codes)
        self.register_buffer("scale", scales.weight.float().max().reshape(()))

    def multiply(self, codes: torch.Tensor) -> torch.Tensor:
        if self.kind == torch.int8:
            missing = max(0, INT_MM_ROWS - len(codes)) or -len(codes) % 8
            padded = F.pad(codes, (0, 0, 0, missing)) if missing else codes
            return (torch._int_mm(padded, self.weight.t())[: len(codes)] * self.alpha).to(self.out)
        return torch._scaled_mm(codes, self.weight.t(), self.read, self.scale, out_dtype=self.out)


def make(
    rows: torch.Tensor,
    bias: torch.Tensor | None,
    sparse: bool,
    out: torch.dtype,
    scales: EightBit | None = None,
    settings: dict[int, KernelSetting] | None = None,
) -> KernelLinear:
    """Make the layer for a weight `[n, k]`, which is given as codes where `scales` are."""
    rows = (rows if scales else rows.to(out)).contiguous()
    if scales is not None:
        return (
            SparseCodes(rows, scales, bias, out, settings)
            if sparse
            else DenseCodes(rows, scales, bias, out)
        )
    return Sparse(rows, bias, settings) if sparse else Dense(rows, bias)


def encoded(
    rows: torch.Tensor, precision: str, read: torch.Tensor | None = None
) -> tuple[torch.Tensor, EightBit | None]:
    """Encode a weight in a precision, with its scales in 8 bits; `read` is then the scale of what
    the layer reads.

    Codes and scales are those of `quant.quantise_weight`, computed where the weight is: a billion
    weights take NumPy too long.
    """
    dtype = DTYPES[precision]
    if dtype.itemsize > 1:
        return rows.to(dtype), None
    values, max_value = rows.float(), MAX_VALUE[dtype]
    largest = values.abs().amax(1 if dtype == torch.int8 else (0, 1)).reshape(-1)
    largest = largest if dtype == torch.int8 else largest.double()
    scale = torch.where(largest > 0, largest / max_value, 1.0).clamp(
        MIN_SCALE, torch.finfo(torch.float16).max
    )
    scale = scale.half().float()
    scaled = (values / scale[:, None]).clamp(-max_value, max_value)
    codes = scaled.round().to(dtype) if dtype == torch.int8 else _no_minus_zero(scaled.to(dtype))
    return codes, EightBit(scale, torch.ones(1, device=rows.device) if read is None else read)


def _no_minus_zero(codes: torch.Tensor) -> torch.Tensor:
    """Replace minus zero, which a tiny negative value rounds to."""
    bits = codes.view(torch.uint8)
    return torch.where(bits == MINUS_ZERO, torch.zeros_like(bits), bits).view(codes.dtype)


def replace(module: nn.Module, path: str, layer: nn.Module) -> None:
    """Put `layer` where the module at `path` was."""
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, layer)
