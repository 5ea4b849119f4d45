"""Which weight reads which tensor, seen in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from nmsparse_deploy.models.base import block_index, weights
from nmsparse_deploy.models.forwards import within
from nmsparse_deploy.models.matmul_observer import MatmulObserver, Product, place
from nmsparse_deploy.models.weight_store import IN_MEMORY, WeightStore


@dataclass(frozen=True)
class Read:
    """The first module that read the same tensor, how many rows it had, and the axis of the weight
    that reduces it."""

    group: str
    rows: int
    axis: int
    watched: bool = False
    """The module was not called: the product with its weight was seen."""


@dataclass
class InputTrace:
    """Reads by parameter name, and the blocks in the order in which they were entered; in
    `everything`, what multiplies outside them too."""

    reads: dict[str, Read] = field(default_factory=dict)
    entered: list[str] = field(default_factory=list)
    everything: list[str] = field(default_factory=list)

    wrapped: set[str] = field(default_factory=set)
    """Blocks that take their hidden states as one of several things in a list."""

    @property
    def order(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.entered))


def group_axis(layer: nn.Module) -> int | None:
    """Return the reduction axis of a layer's weight, or None when the layer is no GEMM.

    Last axis of `nn.Linear`, first of the transposed `Conv1D` of Transformers' GPT-2, input
    channels of `Conv2d` and of a pointwise `Conv1d`.
    """
    if isinstance(layer, (nn.Linear, nn.Conv2d)):
        return 1
    if isinstance(layer, nn.Conv1d):
        return 1 if layer.kernel_size == (1,) else None
    if (
        type(layer).__name__ == "Conv1D"
        and hasattr(layer, "nf")
        and getattr(layer, "weight", None) is not None
    ):
        return 0
    return None


def gemms(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, child in module.named_modules():
        if group_axis(child) is not None:
            yield path, child


def trace(
    module: nn.Module,
    blocks: tuple[str, ...],
    inputs: Mapping[str, torch.Tensor],
    store: WeightStore = IN_MEMORY,
) -> InputTrace:
    """Run one forward pass and see which weights read which tensor, and in which order the blocks
    run."""
    traced = InputTrace()
    seen: dict[tuple, str] = {}
    products: dict[tuple, str] = {}
    alive: list[torch.Tensor] = []  # a freed tensor's address could be used again
    watched: dict[str, Read] = {}

    def called(path: str, layer: nn.Module, x: torch.Tensor) -> None:
        # Convolutions of another geometry see other columns of the same image.
        geometry = tuple(
            getattr(layer, name, None) for name in ("kernel_size", "stride", "padding", "dilation")
        )
        key = (block_index(blocks, path), *place(x), tuple(x.shape), x.stride(), geometry)
        alive.append(x)
        width = x.shape[-len(layer.kernel_size) - 1 if isinstance(layer, _ConvNd) else -1]
        axis = group_axis(layer)
        assert axis is not None
        traced.reads.setdefault(
            f"{path}.weight", Read(seen.setdefault(key, path), x.numel() // width, axis)
        )

    def multiplied(product: Product) -> None:
        rows, known = product.rows, watched.get(product.weight)
        if known is None and rows.numel():
            alive.append(rows)
            key = (block_index(blocks, product.weight), *place(rows), tuple(rows.shape))
            watched[product.weight] = Read(
                products.setdefault(key, product.weight), len(rows), product.axis, True
            )
        elif known is not None:
            watched[product.weight] = Read(known.group, known.rows + len(rows), known.axis, True)

    handles = [
        layer.register_forward_pre_hook(
            lambda layer, args, named, path=path: called(
                path, layer, args[0] if args else next(iter(named.values()))
            ),
            with_kwargs=True,
        )
        for path, layer in gemms(module)
    ]

    def enters(path: str, args: tuple[Any, ...]) -> None:
        traced.entered.append(path)
        traced.everything.append(path)
        if args and not isinstance(args[0], torch.Tensor):
            traced.wrapped.add(path)

    handles += [
        module.get_submodule(path).register_forward_pre_hook(
            lambda _m, args, path=path: enters(path, args)
        )
        for path in blocks
    ]
    handles += [
        child.register_forward_pre_hook(lambda _m, _args, path=path: traced.everything.append(path))
        for path, child in module.named_modules()
        if path and block_index(blocks, path) is None and any(gemms(child))
    ]

    def observer(index: int) -> MatmulObserver:
        path = blocks[index]
        return MatmulObserver(
            {
                f"{path}.{name}": parameter
                for _, name, parameter in weights(module.get_submodule(path))
                if parameter.ndim < 4
            },
            multiplied,
        )

    layers = [module.get_submodule(path) for path in blocks]
    training = module.training
    try:
        with (
            torch.no_grad(),
            within(layers, observer),
            store.on_demand(),
        ):  # a block is watched once it has its weights
            module.eval()(**inputs)
    finally:
        module.train(training)
        for handle in handles:
            handle.remove()
    traced.reads.update({name: read for name, read in watched.items() if name not in traced.reads})
    return traced
