"""What 2:4 could win on a GPU, from a roofline. Every figure here is predicted: nothing was timed.

One GEMM of `rows x K` inputs and a `K x N` weight takes at least
`max(2·rows·K·N / peak, bytes / bandwidth)`. The sparse kernel doubles the peak and reads 9/16 of
the weight bytes (16-bit values and their 2-bit indices). With the share `f` of the model's FLOPs in
pruned GEMMs the whole model gains at most `1 / (1 - f + f/s)` (Amdahl). Measured kernels stay well
below this bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn

from nmsparse_deploy.models.base import Target

FORMULA = "t = max(2·rows·K·N / peak, bytes / bandwidth); sparse: 2x peak, 9/16 of the weight bytes; Amdahl over FLOPs"
BYTES = 2
"""fp16 or bf16."""
SPARSE_BYTES = BYTES * 9 / 16


@dataclass(frozen=True)
class Gpu:
    """Dense 16-bit tensor-core peak in TFLOP/s and memory bandwidth in TB/s, as the vendor's data
    sheets give them."""

    name: str
    teraflops: float
    terabytes: float


GPUS = (
    Gpu("A100 SXM 80 GB", 312, 2.0),
    Gpu("L40S", 362, 0.864),
    Gpu("H100 SXM", 989, 3.35),
    Gpu("H200", 989, 4.8),
)


@dataclass(frozen=True)
class Prediction:
    """An upper bound for one GPU, never a measurement."""

    gpu: str
    rows: int
    gemm_speedup: float
    model_speedup: float
    flop_share: float
    status: str = "predicted"
    formula: str = FORMULA

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def gemm_seconds(gpu: Gpu, rows: int, k: int, n: int, sparse: bool) -> float:
    """Roofline time of one 16-bit GEMM."""
    compute = 2 * rows * k * n / (gpu.teraflops * 1e12 * (2 if sparse else 1))
    moved = BYTES * rows * (k + n) + (SPARSE_BYTES if sparse else BYTES) * k * n
    return max(compute, moved / (gpu.terabytes * 1e12))


def predict(targets: Sequence[Target], rows: int, total_flops: float) -> list[Prediction]:
    """Bounds for every GPU of the table at `rows` rows (batch times tokens) per GEMM."""
    flops = sum(2 * rows * t.k * t.n for t in targets)
    share = min(1.0, flops / total_flops) if total_flops else 0.0
    predictions = []
    for gpu in GPUS:
        dense, sparse = (
            sum(gemm_seconds(gpu, rows, t.k, t.n, kind) for t in targets) for kind in (False, True)
        )
        speedup = dense / sparse if sparse else 1.0
        predictions.append(
            Prediction(gpu.name, rows, speedup, 1 / (1 - share + share / speedup), share)
        )
    return predictions


def count_flops(module: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """FLOPs of one forward pass, counted by PyTorch's own counter (matrix products and
    attention)."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(**inputs)
    return counter.get_total_flops()
