"""Climb the ladder of evidence: what the graph, the build log, the inspector, a profile and
counters prove together.

Names are the only tie between them. Where a name does not say which multiplication it means,
nothing is claimed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nmsparse_deploy.pattern import TWO_FOUR, parse_pattern
from nmsparse_deploy.prove import TensorCheck
from nmsparse_deploy.ship.evidence import LEVELS, EngineEvidence, LayerEvidence, Level, Reason
from nmsparse_deploy.ship.onnx.gemms import Gemm
from nmsparse_deploy.ship.tensorrt.log import (
    BuildLog,
    EngineLayer,
    hides_nodes,
    is_sparse_kernel,
    layer_nodes,
    nodes_of,
)
from nmsparse_deploy.system.sparse_cores import INELIGIBLE, shape_verdict

Kernels = Mapping[str, int]
"""How often each kernel ran in one pass through the network."""
Counters = Mapping[str, Mapping[str, float]]
"""kernel -> hardware counter -> value."""
HIDDEN = ("", "__myelin_CASK_STUB")
"""Tactic names that name no kernel."""


class WhyNot(NamedTuple):
    reason: Reason
    text: str


@dataclass(frozen=True)
class Sources:
    """The texts and counts that can prove something. None means that nobody looked."""

    checks: Mapping[str, TensorCheck]
    """By node: whether its stored weight holds a pattern."""
    sparse_weights: bool = True
    log: BuildLog | None = None
    layers: Sequence[EngineLayer] | None = None
    kernels: Kernels | None = None
    counters: Counters | None = None


def climb(engine: str, artefact: str, gemms: Sequence[Gemm], sources: Sources) -> EngineEvidence:
    """Gather the evidence for every multiplication of `gemms`."""
    ladder = _Ladder(gemms, sources)
    exact = all(gemm.flops is not None for gemm in gemms)
    rows = tuple(
        ladder.row(gemm, gemm.flops if exact and gemm.flops else 2 * gemm.k * gemm.n)
        for gemm in gemms
    )
    passes = sources.log.passes if sources.log else ()
    return EngineEvidence(
        engine,
        artefact,
        sources.sparse_weights,
        rows,
        "input shapes" if exact else "equal rows",
        passes,
        (*ladder.unplaced, *ladder.unplaced_kernels),
        len(ladder.unplaced_kernels),
        tuple(ladder.problems),
    )


class _Ladder:
    """The sources of one engine, with their names resolved."""

    def __init__(self, gemms: Sequence[Gemm], sources: Sources) -> None:
        self.sources = sources
        self.gemms = {gemm.node: gemm for gemm in gemms}
        self.group: dict[str, list[Gemm]] = defaultdict(list)
        for gemm in gemms:
            self.group[gemm.reads].append(gemm)
        self.problems: list[str] = []
        self.unplaced: list[str] = []
        self.listed = {kind: self._resolve(kind) for kind in ("eligible", "chosen")}
        self.holding: dict[str, list[EngineLayer]] = defaultdict(list)
        for layer in sources.layers or ():
            for node in layer_nodes(layer, self.gemms):
                self.holding[node].append(layer)
        self.ran = _by_tactic(sources.layers or (), sources.kernels or {})
        self.unplaced_kernels = self._unplaced_kernels()

    def _resolve(self, kind: str) -> dict[str, str]:
        """Return by node the builder's line that names it."""
        lines: dict[str, str] = {}
        names = self.sources.log.names(kind) if self.sources.log else {}
        for name, raw in names.items():
            nodes = nodes_of(name, self.sources.layers or (), self.gemms)
            if (not nodes or hides_nodes(name)) and name not in self.unplaced:
                self.unplaced.append(name)
            lines |= dict.fromkeys(nodes, raw)
        return lines

    def _unplaced_kernels(self) -> list[str]:
        """Return sparse kernels, in the plan or running, that belong to no single
        multiplication."""
        placed = {
            layer.tactic
            for layers in self.holding.values()
            for layer in layers
            if self._one_product(layer)
        }
        in_plan = {layer.tactic for layer in self.sources.layers or () if layer.sparse} - placed
        ran = {name for name in self.sources.kernels or {} if is_sparse_kernel(name)}
        ran -= {name for names in self.ran.values() for name in names}
        return sorted(in_plan | ran)

    def _one_product(self, layer: EngineLayer) -> bool:
        """Tell whether the multiplications of a layer are one merged GEMM, so that its kernel is
        the kernel of each."""
        return len({self.gemms[node].reads for node in layer_nodes(layer, self.gemms)}) == 1

    def row(self, gemm: Gemm, flops: int) -> LayerEvidence:
        steps = {
            "pattern": self._pattern(gemm),
            "shape": self._shape(gemm),
            "eligible": self._listed(gemm, "eligible"),
            "chosen": self._listed(gemm, "chosen"),
            "tactic": self._tactic(gemm),
        }
        sparse = isinstance(steps["tactic"], str)
        steps["observed"] = (
            self._observed(gemm)
            if sparse
            else WhyNot("unknown", "no kernel of it is known as sparse")
        )
        seen = isinstance(steps["observed"], str)
        steps["counted"] = (
            self._counted(gemm) if seen else WhyNot("unknown", "its kernel was not seen to run")
        )
        proofs: dict[Level, str] = {
            level: step for level in LEVELS if isinstance(step := steps[level], str)
        }
        if "pattern" not in proofs and sparse:
            self.problems.append(
                f"The engine has a sparse kernel for '{gemm.node}', whose weight is not proven to be "
                f"{TWO_FOUR}."
            )
        if "pattern" not in proofs:
            proofs = {}
        top = max((LEVELS.index(level) for level in proofs), default=-1)
        stop = steps[LEVELS[top + 1]] if top + 1 < len(LEVELS) else None
        reason, text = stop if isinstance(stop, WhyNot) else (None, "")
        others = tuple(other.node for other in self.group[gemm.reads] if other.node != gemm.node)
        return LayerEvidence(
            gemm.node,
            gemm.parameter,
            gemm.k,
            gemm.n,
            gemm.dtype,
            flops,
            proofs,
            reason,
            text,
            others,
        )

    def _pattern(self, gemm: Gemm) -> str | WhyNot:
        check = self.sources.checks.get(gemm.node)
        if check is None:
            return WhyNot("unknown", "its weight was not verified")
        if check.skipped is not None:
            return WhyNot("not in pattern", f"its weight makes no claim: {check.skipped}")
        if not check.ok:
            return WhyNot("not in pattern", check.problems[0])
        if not parse_pattern(check.pattern).implies(TWO_FOUR):
            return WhyNot("not in pattern", f"its pattern {check.pattern} is not {TWO_FOUR}")
        return (
            f"{check.tensor}: {check.groups} groups of {check.pattern} along axis {check.axis}, {check.bad} bad, "
            f"sha256 {check.sha256}"
        )

    def _shape(self, gemm: Gemm) -> str | WhyNot:
        group = self.group[gemm.reads]
        dense = next((other for other in group if isinstance(self._pattern(other), WhyNot)), None)
        if dense is not None:
            name = dense.parameter or dense.node
            return WhyNot(
                "fusion partner dense", f"'{name}' reads the same tensor and is not {TWO_FOUR}"
            )
        k, n = gemm.k, sum(other.n for other in group)
        verdict = shape_verdict(k, n, TWO_FOUR)
        what = f"{k} x {n} ({len(group)} merged): {verdict}"
        return WhyNot("shape", what) if verdict == INELIGIBLE else what

    def _listed(self, gemm: Gemm, kind: str) -> str | WhyNot:
        """Return the line of the builder's `eligible` or `chosen` list that names it."""
        log = self.sources.log
        if not self.sources.sparse_weights:
            return WhyNot(
                "built without sparse weights", "the builder was not allowed to use sparse kernels"
            )
        if log is None:
            return WhyNot("not checked", "there is no build log")
        if gemm.node in self.listed[kind]:
            return self.listed[kind][gemm.node]
        lines = log.lines(kind)
        if not lines:
            return WhyNot("unknown", f"the builder printed no line about {kind} layers")
        if self.unplaced or not all(line.complete for line in lines):
            return WhyNot(
                "unknown", f"not every {kind} layer of the build log could be tied to the graph"
            )
        if kind == "eligible":
            return WhyNot("not eligible", "the builder does not name it among the eligible layers")
        return WhyNot(
            "dense was faster", "the builder timed sparse and dense kernels and took a dense one"
        )

    def _tactic(self, gemm: Gemm) -> str | WhyNot:
        if self.sources.layers is None:
            return WhyNot("not checked", "the engine was not inspected")
        layers = self.holding[gemm.node]
        sparse = [layer for layer in layers if layer.sparse]
        for layer in sparse:
            if self._one_product(layer):
                return layer.raw
        if sparse:
            return WhyNot(
                "unknown",
                f"the engine layer '{sparse[0].name}' holds several multiplications, and its "
                "kernel does not say which of them is sparse",
            )
        named = [layer for layer in layers if layer.tactic not in HIDDEN]
        if not named:
            return WhyNot(
                "unknown",
                "the inspector names no kernel for it" if layers else "no engine layer names it",
            )
        return WhyNot("unknown", f"the engine holds the dense kernel {named[0].tactic}")

    def _observed(self, gemm: Gemm) -> str | WhyNot:
        if self.sources.kernels is None:
            return WhyNot("not checked", "nobody watched the engine run")
        layer = next(layer for layer in self.holding[gemm.node] if layer.sparse)
        runs = self.ran.get(layer.tactic, {})
        needed = sum(other.tactic == layer.tactic for other in self.sources.layers or ())
        if sum(runs.values()) < needed:
            return WhyNot(
                "unknown", f"its kernel ran {sum(runs.values())} times for {needed} layers"
            )
        return "; ".join(f"{name} ran {count} times" for name, count in runs.items())

    def _counted(self, gemm: Gemm) -> str | WhyNot:
        if self.sources.counters is None:
            return WhyNot("not checked", "no hardware counters were read")
        layer = next(layer for layer in self.holding[gemm.node] if layer.sparse)
        read = {
            name: value
            for kernel in self.ran.get(layer.tactic, {})
            for name, value in self.sources.counters.get(kernel, {}).items()
        }
        on = sum(value for name, value in read.items() if name.endswith("sparsity_on"))
        off = sum(value for name, value in read.items() if name.endswith("sparsity_off"))
        if not read:
            return WhyNot("not checked", "no hardware counters were read for its kernel")
        text = "; ".join(f"{name} = {value:g}" for name, value in read.items())
        return (
            text
            if on > 0 and off == 0
            else WhyNot("unknown", f"the counters show no sparse instructions: {text}")
        )


def _by_tactic(layers: Sequence[EngineLayer], kernels: Kernels) -> dict[str, dict[str, int]]:
    """Return by tactic the kernels that ran for it: those whose name holds it, each for its longest
    tactic."""
    tactics = sorted(
        {layer.tactic for layer in layers if layer.tactic not in HIDDEN}, key=len, reverse=True
    )
    ran: dict[str, dict[str, int]] = defaultdict(dict)
    for name, count in kernels.items():
        tactic = next((tactic for tactic in tactics if tactic in name), None)
        if tactic is not None:
            ran[tactic][name] = count
    return ran
