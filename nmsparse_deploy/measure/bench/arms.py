"""One model in five arms, timed in the same process with everything else the same.

    dense             the weights as they were
    pruned-dense      2:4 weights on dense kernels: what zeros alone change (power, so clocks)
    pruned-sparse     2:4 weights on sparse kernels wherever they can run
    auto              of the two above, layer by layer, the one that was faster (auto.py)
    unstructured      half of the weights zero, anywhere, on dense kernels: the control

Layers are put into copies of the model that share everything else. A speed-up of sparse kernels is
one over dense and one over pruned-dense.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nmsparse_deploy.masks import project
from nmsparse_deploy.measure.bench.result import AmdahlBound, Phase
from nmsparse_deploy.models.base import Target, to_rows
from nmsparse_deploy.models.input_trace import group_axis
from nmsparse_deploy.pattern import Unstructured
from nmsparse_deploy.ship.quantise import BASE, FORMATS, Range, scale_of
from nmsparse_deploy.ship.torch_sparse.kernel_choice import GemmDecision
from nmsparse_deploy.ship.torch_sparse.linear import KernelLinear, encoded, make, replace
from nmsparse_deploy.ship.torch_sparse.semi_structured import DTYPES, KernelSetting, kernels
from nmsparse_deploy.system.gpu_clock import Machine
from nmsparse_deploy.system.sparse_cores import shape_fits
from nmsparse_deploy.system.timing import Call, interleave, ratio, summarise

DENSE, PRUNED, SPARSE, AUTO, CONTROL = (
    "dense",
    "pruned-dense",
    "pruned-sparse",
    "auto",
    "unstructured",
)
HALF = Unstructured(0.5)


@dataclass(frozen=True)
class ArmLayer:
    """An ordinary layer that has a 2:4 mask: where the arms differ."""

    parameter: str
    layer: str
    axis: int
    k: int
    n: int
    biased: bool
    why_not: str | None
    """Why sparse kernels cannot run it; None where they can."""


def arm_layers(
    module: nn.Module, targets: Sequence[Target], masked: Collection[str], precision: str
) -> list[ArmLayer]:
    """Return the layers that the arms differ in. What is not an ordinary layer stays dense in all
    of them."""
    layers = []
    for target in targets:
        layer: Any = module.get_submodule(target.module)
        if (
            target.name not in masked
            or target.watched
            or target.experts > 1
            or group_axis(layer) is None
            or layer.weight.ndim != 2
        ):
            continue
        fits = shape_fits(precision, target.k, target.n)
        layers.append(
            ArmLayer(
                target.name,
                target.module,
                target.axis,
                target.k,
                target.n,
                layer.bias is not None,
                None if fits else f"the kernels do not take {target.k} x {target.n} in {precision}",
            )
        )
    return layers


def make_arms(
    module: nn.Module,
    places: Sequence[ArmLayer],
    masks: Mapping[str, torch.Tensor],
    precision: str,
    ranges: Mapping[str, Range],
    settings: Mapping[str, dict[int, KernelSetting]],
) -> dict[str, nn.Module]:
    """Return the arms of a dense `module`, which is on its device in 16 bits, without `auto`.

    `masks` are bool, in the weights' layout; `settings` of the sparse kernels are by parameter.
    """
    base = DTYPES[BASE if precision in FORMATS else precision]
    arms = {name: _sharing(module) for name in (DENSE, PRUNED, SPARSE, CONTROL)}
    for site in places:
        parameter = module.get_parameter(site.parameter).detach()
        bias = getattr(module.get_submodule(site.layer), "bias", None)
        bias = None if bias is None else bias.detach()
        rows, mask = (
            to_rows(parameter, site.axis),
            to_rows(masks[site.parameter].to(parameter.device), site.axis),
        )
        read = _read(ranges.get(site.layer), precision, parameter.device)

        def layer(
            values: torch.Tensor,
            sparse: bool,
            bias: torch.Tensor | None = bias,
            read: Any = read,
            name: str = site.parameter,
        ) -> KernelLinear:
            codes, scales = encoded(values, precision, read)
            return make(codes, bias, sparse, base, scales, settings.get(name))

        zero = torch.zeros((), dtype=rows.dtype, device=rows.device)
        pruned = torch.where(mask, rows, zero)
        layers = {
            DENSE: layer(rows, False),
            PRUNED: layer(pruned, False),
            CONTROL: layer(
                torch.where(project(rows.abs().float(), HALF, scope="row"), rows, zero), False
            ),
        }
        layers[SPARSE] = layers[PRUNED] if site.why_not else layer(pruned, True)
        for name, made in layers.items():
            replace(arms[name], site.layer, made)
    return arms


def make_auto(
    arms: Mapping[str, nn.Module], places: Sequence[ArmLayer], decisions: Sequence[GemmDecision]
) -> nn.Module:
    """Return a model whose every layer is that of the pruned arm that was decided for."""
    sparse = {
        name for decision in decisions for name in decision.weights if decision.keep == "sparse"
    }
    auto = _sharing(arms[PRUNED])
    for site in places:
        replace(
            auto,
            site.layer,
            arms[SPARSE if site.parameter in sparse else PRUNED].get_submodule(site.layer),
        )
    return auto


def _sharing(module: nn.Module) -> nn.Module:
    """Return a copy whose parameters and buffers are those of the original."""
    shared: dict[int, Any] = {
        id(value): value for value in (*module.parameters(), *module.buffers())
    }
    return copy.deepcopy(module, shared)


def _read(known: Range | None, precision: str, device: torch.device) -> torch.Tensor | None:
    if precision not in FORMATS or known is None:
        return None
    return torch.tensor(float(scale_of(known.read, FORMATS[precision])), device=device)


def time_phase(
    name: str,
    calls: Mapping[str, Call],
    shape: dict[str, int],
    machine: Machine,
    rounds: int,
    replayed: bool,
) -> Phase:
    """Time all arms of one workload; with `replayed`, their recordings."""
    if replayed and machine.graph is not None:
        calls = {arm: machine.graph(call) for arm, call in calls.items()}
    times = interleave(calls, rounds, clock=machine.clock())
    kinds = {arm: kernels().name if arm in (SPARSE, AUTO) else "dense kernels" for arm in calls}
    return Phase(
        name,
        replayed,
        shape,
        tuple(summarise(arm, kinds[arm], times[arm]) for arm in calls),
        {arm: ratio(times[DENSE], times[arm]) for arm in calls if arm != DENSE},
        {
            arm: ratio(times[PRUNED], times[arm])
            for arm in calls
            if PRUNED in times and arm in (SPARSE, AUTO)
        },
    )


def prefill(arms: Mapping[str, nn.Module], inputs: Mapping[str, Any]) -> dict[str, Call]:
    """Return a call for every arm: a whole forward pass."""
    return {name: _forward(module, dict(inputs)) for name, module in arms.items()}


def _forward(module: nn.Module, inputs: Mapping[str, Any]) -> Call:
    def call() -> Any:
        with torch.inference_mode():
            return module(**inputs)

    return call


def decode(arms: Mapping[str, nn.Module], ids: torch.Tensor) -> dict[str, Call]:
    """Return a call for every arm: one more token after `ids`, on the cache of a prefill, which
    stays as it was."""
    return {name: _step(module, ids) for name, module in arms.items()}


def _step(module: nn.Module, ids: torch.Tensor) -> Call:
    with torch.inference_mode():
        cache = module(input_ids=ids, use_cache=True).past_key_values
    token = ids[:, -1:].clone()

    def call() -> Any:
        with torch.inference_mode():
            return module(input_ids=token, past_key_values=_same(cache), use_cache=True)

    return call


def _same(cache: Any) -> Any:
    """Return a cache of its own on the same keys and values: what is appended to it is new
    memory."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


def bound(
    decisions: Sequence[GemmDecision], rows: Mapping[str, int], dense_ms: float
) -> AmdahlBound | None:
    """Return what the GEMMs' own speed-up `s` allows for the model (Amdahl): `1 / (1 - f + f / s)`,
    `f` their share.

    None when the GEMMs were not timed at the rows that they have here.
    """
    dense = best = 0.0
    for decision in decisions:
        for name in decision.weights:
            verdict = next((v for v in decision.verdicts if v.rows == rows.get(name)), None)
            if verdict is None:
                return None
            dense += verdict.dense_us
            best += verdict.sparse_us if decision.keep == "sparse" else verdict.dense_us
    if not dense or not dense_ms:
        return None
    share = min(1.0, dense / (1e3 * dense_ms))
    return AmdahlBound(share, dense / best, 1 / (1 - share + share * best / dense))
