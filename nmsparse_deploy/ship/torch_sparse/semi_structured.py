"""The sparse kernels of PyTorch: cuSPARSELt behind the few calls that are used here, and what
stands in without a GPU.

    y = x Wᵀ + b,   W [n, k] compressed,   computed as (W xᵀ)ᵀ because the sparse operand comes first

The library compresses a weight once, and can search for its fastest algorithm for one shape. The
result may be written as `[rows, n]` at once (`transposed`) or as `[n, rows]` and read the other way
round: the faster one is found by timing. 8-bit products are scaled by a vector, one factor an
output: PyTorch reads a single factor back to the host, which a CUDA graph does not allow.

Everything is looked up by capability. `why_not` says in one sentence why a precision cannot run,
after trying it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch

from nmsparse_deploy.errors import first_line
from nmsparse_deploy.masks import project
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.ship.torch_sparse.packed import Packed, pack, unpack
from nmsparse_deploy.system.doctor import no_cuda
from nmsparse_deploy.system.sparse_cores import ROW_MULTIPLE, min_capability

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
"""What sparse tensor cores multiply, by the names of this tool."""


@dataclass(frozen=True)
class KernelSetting:
    """A way to multiply one shape: an algorithm that its search found, on one GPU with one
    version."""

    algorithm: int = 0
    split_k: int = 1
    split_k_mode: int = -1
    transposed: bool = True


class Kernels(Protocol):
    """A library of sparse products. `x` is `[rows, k]` and contiguous; `bias` and `alpha` (fp32)
    are `[n]`."""

    name: str

    def why_not(self, precision: str) -> str | None:
        """Return why this precision cannot run here, or None."""
        ...

    def compress(self, rows: torch.Tensor) -> torch.Tensor:
        """Bring a 2:4 matrix `[n, k]` into the library's own order."""
        ...

    def multiply(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        n: int,
        bias: torch.Tensor | None,
        alpha: torch.Tensor | None,
        out: torch.dtype,
        setting: KernelSetting,
    ) -> torch.Tensor: ...

    def search(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        n: int,
        bias: torch.Tensor | None,
        alpha: torch.Tensor | None,
        out: torch.dtype,
    ) -> list[KernelSetting]:
        """Return settings worth timing, the default one among them; at least one."""
        ...


class CuSparseLt:
    """The library itself."""

    name = "cuSPARSELt"

    def why_not(self, precision: str) -> str | None:
        return _why_not(precision)

    def compress(self, rows: torch.Tensor) -> torch.Tensor:
        return torch._cslt_compress(rows.contiguous())

    def multiply(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        n: int,
        bias: torch.Tensor | None,
        alpha: torch.Tensor | None,
        out: torch.dtype,
        setting: KernelSetting,
    ) -> torch.Tensor:
        rows = len(x)
        options = {"split_k": setting.split_k, "split_k_mode": setting.split_k_mode}
        y = torch._cslt_sparse_mm(
            weight,
            _padded(x).t(),
            bias,
            alpha,
            out if x.element_size() == 1 else None,
            setting.transposed,
            setting.algorithm,
            **(options if setting.split_k != 1 else {}),
        )
        return (y if setting.transposed else y.t())[:rows]

    def search(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        n: int,
        bias: torch.Tensor | None,
        alpha: torch.Tensor | None,
        out: torch.dtype,
    ) -> list[KernelSetting]:
        settings: list[KernelSetting] = []
        for transposed in (True, False):
            arguments = (
                weight,
                _padded(x).t(),
                bias,
                alpha,
                out if x.element_size() == 1 else None,
                transposed,
            )
            for setting in (KernelSetting(transposed=transposed), _searched(arguments)):
                if setting is None or setting in settings:
                    continue
                if self._runs(x, weight, n, bias, alpha, out, setting):
                    settings.append(setting)
        return settings or [KernelSetting()]

    def _runs(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        n: int,
        bias: torch.Tensor | None,
        alpha: torch.Tensor | None,
        out: torch.dtype,
        setting: KernelSetting,
    ) -> bool:
        try:
            self.multiply(x, weight, n, bias, alpha, out, setting)
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True


def _padded(x: torch.Tensor) -> torch.Tensor:
    missing = -len(x) % ROW_MULTIPLE[x.element_size()]
    if not missing:
        return x
    # 8-bit floats cannot be concatenated everywhere; their bytes can.
    raw = x.view(torch.uint8) if x.element_size() == 1 else x
    return torch.cat((raw, raw.new_zeros(missing, raw.shape[1]))).view(x.dtype)


def _searched(arguments: tuple[Any, ...]) -> KernelSetting | None:
    """Return what the library's own search finds, with its split of k where PyTorch tells."""
    transposed = arguments[-1]
    whole = getattr(getattr(torch._C, "_cusparselt", None), "mm_search", None)
    try:
        if whole is not None:
            algorithm, split_k, mode, *_ = whole(*arguments)
            return KernelSetting(int(algorithm), int(split_k), int(mode), transposed)
        return KernelSetting(int(torch._cslt_sparse_mm_search(*arguments)), transposed=transposed)
    except (RuntimeError, TypeError, ValueError):
        return None


@cache
def _why_not(precision: str) -> str | None:
    if why := no_cuda():
        return why
    needed, capability = min_capability(precision), torch.cuda.get_device_capability()
    if capability < needed:
        name = (
            f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}"
        )
        return f"{name}, and {precision} needs {needed[0]}.{needed[1]}"
    backend = getattr(torch.backends, "cusparselt", None)
    if backend is None or not backend.is_available() or not hasattr(torch, "_cslt_sparse_mm"):
        return "this torch was built without cuSPARSELt"
    return _tried(precision)


def _tried(precision: str) -> str | None:
    """Multiply something small and look at the numbers: an old library can run on a new GPU and be
    wrong."""
    kernels, dtype, size = CuSparseLt(), DTYPES[precision], 64
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-3, 4, (2, size, size), generator=generator)
    weight = torch.where(project(drawn[0].float().abs(), TWO_FOUR), drawn[0], 0)
    rows, x = weight.float().cuda().to(dtype), drawn[1].float().cuda().to(dtype)
    out = torch.float16 if dtype.itemsize == 1 else dtype
    alpha = torch.ones(size, device="cuda") if dtype.itemsize == 1 else None
    try:
        y = kernels.multiply(x, kernels.compress(rows), size, None, alpha, out, KernelSetting())
        wrong = not torch.equal(y.float(), x.float() @ rows.float().t())
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return f"cuSPARSELt does not run it: {first_line(error)}"
    return "cuSPARSELt's result is wrong here" if wrong else None


class StandIn:
    """Sparse products for any processor, without any gain: tests and dry runs walk the same path
    with it."""

    name = "stand-in (no sparse kernels)"

    def why_not(self, precision: str) -> str | None:
        return None if precision in DTYPES else f"there is no precision '{precision}'"

    def compress(self, rows: torch.Tensor) -> torch.Tensor:
        packed = pack(rows)
        return torch.cat((packed.values.view(torch.uint8), packed.places), 1)

    def multiply(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        n: int,
        bias: torch.Tensor | None,
        alpha: torch.Tensor | None,
        out: torch.dtype,
        setting: KernelSetting,
    ) -> torch.Tensor:
        values, places = weight.split((x.shape[1] // 2 * x.element_size(), x.shape[1] // 8), 1)
        rows = unpack(Packed(values.contiguous().view(x.dtype), places.contiguous()))
        y = x.float() @ rows.float().t()
        y = y if alpha is None else y * alpha
        return (y if bias is None else y + bias.float()).to(out)

    def search(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        n: int,
        bias: torch.Tensor | None,
        alpha: torch.Tensor | None,
        out: torch.dtype,
    ) -> list[KernelSetting]:
        return [KernelSetting(), KernelSetting(algorithm=1)]


_active: list[Kernels] = [CuSparseLt()]


def kernels() -> Kernels:
    """Return what runs sparse products in this process."""
    return _active[-1]


@contextmanager
def standing_in(other: Kernels) -> Iterator[Kernels]:
    """Let `other` run sparse products inside the block."""
    _active.append(other)
    try:
        yield other
    finally:
        _active.remove(other)


@torch.library.custom_op("nmsparse_deploy::sparse_linear", mutates_args=())
def sparse_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    n: int,
    bias: torch.Tensor | None,
    alpha: torch.Tensor | None,
    out: torch.dtype,
    algorithm: int,
    split_k: int,
    split_k_mode: int,
    transposed: bool,
) -> torch.Tensor:
    """Multiply as a compiler sees it: in a call whose inside it leaves alone."""
    setting = KernelSetting(algorithm, split_k, split_k_mode, transposed)
    return kernels().multiply(x, weight, n, bias, alpha, out, setting).contiguous()


@sparse_linear.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    n: int,
    bias: torch.Tensor | None,
    alpha: torch.Tensor | None,
    out: torch.dtype,
    algorithm: int,
    split_k: int,
    split_k_mode: int,
    transposed: bool,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], n), dtype=out)


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    n: int,
    bias: torch.Tensor | None,
    alpha: torch.Tensor | None,
    out: torch.dtype,
    setting: KernelSetting,
) -> torch.Tensor:
    """Multiply `x` `[rows, k]` by Wᵀ: compilers get the opaque call, all others the kernels without
    its overhead."""
    if torch.compiler.is_compiling():
        y: torch.Tensor = sparse_linear(
            x,
            weight,
            n,
            bias,
            alpha,
            out,
            setting.algorithm,
            setting.split_k,
            setting.split_k_mode,
            setting.transposed,
        )
        return y
    return kernels().multiply(x, weight, n, bias, alpha, out, setting)
