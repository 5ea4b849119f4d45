"""What TensorRT's builder log and engine inspector say about sparsity, as data with the raw text
beside it.

Eligible means that the builder found the pattern in a layer's weights; chosen, that it timed sparse
against dense kernels and took a sparse one. Both lines are printed once per compiler subgraph and
once per profile, so every pair is kept in its place. Which kernels the finished plan holds is only
in the inspector's tactic names. TensorRT-RTX prints the same layer list. Wording of 8.x from the
developer guide, of 10.x and 11.x from published build logs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from nmsparse_deploy.errors import UsageError

SPARSE_KERNEL = re.compile(
    r"xmma_sparse|sparse_gemm|sparse_conv|sparse_fprop|sptensor|spgemm", re.IGNORECASE
)
"""Every family of sparse tensor-core kernels. The bare word "sparse" also names gathers and users'
own layers."""

_ELIGIBLE = re.compile(
    r"\(Sparsity\) (?:Found (?P<count>\d+) layer\(s\) eligible to use sparse tactics:?"
    r"|Layers eligible for sparse math:)(?P<names>.*)"
)
_CHOSEN = re.compile(
    r"\(Sparsity\) (?:Chose (?P<count>\d+) layer\(s\) using sparse tactics:?"
    r"|TRT inference plan picked sparse implementation for layers:)(?P<names>.*)"
)
_MEMORY = re.compile(
    r"insuff?icient memory|memory is insufficient|could not be allocated|OutOfMemory|out of memory"
    r"|CUDA error \d+ allocating",
    re.IGNORECASE,
)
"""The first as two spellings, because TensorRT 8 writes it with one f."""
_ERROR = re.compile(
    r"^(?:\[[\d/:.-]+\] )?\[(?:[EF]|ERROR|INTERNAL_ERROR)\] (?:\[TRT\] )?(?P<text>.*)"
)
_ONNX = re.compile(r"\[ONNX Layer: (.*?)\](?=\[ONNX Layer: |[\x1e\s]|$)")
_LISTED = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w*), .*?TacticName: (?P<tactic>.*?), StreamId: \S+"
    r"(?:, Metadata: (?P<metadata>.*))?$",
    re.MULTILINE,
)
_COMPILED = re.compile(r"_myl\d+_\d+$")
_JOINT = re.compile(r"\+|\|\||, |PWN\(|\)(?=\)*\s*(?:$|\+|\|\||, ))")
"""What stands between the names of fused nodes."""
_RANGE = re.compile(r"\{[^{}]*\}")
"""Fused nodes of which the first and the last are named."""
_HIDING = ("{", "}", "...", "ForeignNode")
_PROFILE = re.compile(r" \[profile \d+\]$")


def is_sparse_kernel(name: str) -> bool:
    """Tell whether a tactic or kernel name is that of a sparse tensor-core kernel. Never give it
    names of layers."""
    return bool(SPARSE_KERNEL.search(name))


@dataclass(frozen=True)
class Listed:
    """One of the two lines. `names` is empty when the list is missing, or does not have `count`
    entries."""

    line: int
    count: int
    names: tuple[str, ...]
    raw: str

    @property
    def complete(self) -> bool:
        return self.count == len(self.names)


@dataclass(frozen=True)
class Pass:
    """One round of tactic selection: what was eligible, and what was chosen of it."""

    eligible: Listed | None
    chosen: Listed | None


@dataclass(frozen=True)
class BuildLog:
    """A builder log. A build with anything in `memory` left tactics out, so what it chose means
    nothing."""

    passes: tuple[Pass, ...]
    memory: tuple[str, ...]
    errors: tuple[str, ...]

    def names(self, kind: str) -> dict[str, str]:
        """Return layer names that are listed as `eligible` or `chosen` in any pass, with the line
        that says so."""
        listed: dict[str, str] = {}
        for line in self.lines(kind):
            for name in line.names:
                listed.setdefault(name, line.raw)
        return listed

    def lines(self, kind: str) -> list[Listed]:
        both = (getattr(step, kind) for step in self.passes)
        return [line for line in both if line is not None]


def parse_log(text: str) -> BuildLog:
    """Read a builder log: one of ours, trtexec's, or any other text that holds the messages."""
    passes: list[Pass] = []
    memory, errors = [], []
    for number, line in enumerate(text.splitlines(), 1):
        eligible, chosen = _ELIGIBLE.search(line), _CHOSEN.search(line)
        if eligible:
            passes.append(Pass(_listed(number, line, eligible), None))
        elif chosen:
            before = passes.pop() if passes and passes[-1].chosen is None else Pass(None, None)
            passes.append(replace(before, chosen=_listed(number, line, chosen)))
        if _MEMORY.search(line):
            memory.append(line.strip())
        error = _ERROR.match(line)
        if error:
            errors.append(error["text"].strip())
    return BuildLog(tuple(passes), tuple(memory), tuple(errors))


def _listed(number: int, line: str, match: re.Match[str]) -> Listed:
    count = match.groupdict().get("count")
    names = tuple(name for name in map(str.strip, _split(match["names"])) if name)
    if count is not None and int(count) != len(names):
        names = tuple(name for name in map(str.strip, match["names"].split(", ")) if name)
    if count is None:
        return Listed(number, len(names), names, line.strip())
    return Listed(number, int(count), names if int(count) == len(names) else (), line.strip())


def _split(text: str) -> list[str]:
    """Split a list at its commas, but not inside of `PWN(a, b)` or `{a, b}`."""
    names, depth = [""], 0
    for i, char in enumerate(text):
        depth += (char in "({[") - (char in ")}]")
        if text.startswith(", ", i) and not depth:
            names.append("")
        else:
            names[-1] += char
    return text.split(", ") if depth else names


@dataclass(frozen=True)
class EngineLayer:
    """One layer of a finished engine. `nodes` are the ONNX nodes that were fused into it."""

    name: str
    kind: str
    tactic: str
    nodes: tuple[str, ...]
    raw: str
    has_sparse_weights: bool | None = None
    """Says that the weights have the pattern, and nothing about the kernel."""

    @property
    def sparse(self) -> bool:
        return is_sparse_kernel(self.tactic)


def parse_inspector(text: str, source: str = "This") -> tuple[EngineLayer, ...]:
    """Read the layers of the inspector's JSON. Raises `UsageError` when it is none; `source` names
    the file."""
    try:
        layers = json.loads(text)["Layers"]
        return tuple(_inspected(layer) for layer in layers)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{source} is not the JSON of an engine inspector: {type(error).__name__} {error}."
        ) from error


def _inspected(layer: Any) -> EngineLayer:
    raw = json.dumps(layer)
    if isinstance(
        layer, str
    ):  # an engine that was built without detailed profiling names its layers and no more
        return EngineLayer(layer, "", "", (), raw)
    sparse = layer.get("HasSparseWeights")
    kind = layer.get("ParameterType") or layer.get("LayerType") or ""
    return EngineLayer(
        str(layer["Name"]),
        str(kind),
        str(layer.get("TacticName") or ""),
        onnx_nodes(str(layer.get("Metadata") or "")),
        raw,
        None if sparse is None else bool(sparse),
    )


def layers_in_log(text: str) -> tuple[EngineLayer, ...]:
    """Return the layer list that a build with detailed profiling prints as its last verbose
    message."""
    return tuple(
        EngineLayer(
            row["name"], row["kind"], row["tactic"], onnx_nodes(row["metadata"] or ""), row[0]
        )
        for row in _LISTED.finditer(text)
    )


def onnx_nodes(metadata: str) -> tuple[str, ...]:
    """Return names in `[ONNX Layer: a][ONNX Layer: b]`."""
    return tuple(_ONNX.findall(metadata))


def nodes_of(name: str, layers: Collection[EngineLayer], known: Collection[str]) -> tuple[str, ...]:
    """Return the ONNX nodes, of those `known`, behind the name of a layer; empty when the name does
    not say.

    A name is an ONNX node's, an engine layer's, or the names of fused nodes with the compiler's
    suffix: joined by `+` one after the other, by `||` side by side, in `PWN(a, b)` as one pointwise
    kernel.
    """
    if name in known:
        return (name,)
    for layer in layers:
        if layer.name == name:
            return layer_nodes(layer, known)
    return tuple(part for part in _parts(name) if part in known)


def layer_nodes(layer: EngineLayer, known: Collection[str]) -> tuple[str, ...]:
    """Return the `known` ONNX nodes in a layer: from its metadata, or where it has none from its
    name."""
    return tuple(node for node in layer.nodes or (layer.name, *_parts(layer.name)) if node in known)


def hides_nodes(name: str) -> bool:
    """Tell whether a name stands for nodes that it does not name, as `{ForeignNode[first...last]}`
    does, also when it is cut off."""
    return any(mark in name for mark in _HIDING)


def _parts(name: str) -> Iterator[str]:
    stem = _RANGE.sub("", _COMPILED.sub("", _PROFILE.sub("", name)))
    yield from (part.strip() for part in _JOINT.split(stem))
