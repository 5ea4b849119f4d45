"""Tell which axis of a stored weight its layer reduces, from what a checkpoint says about it.

`[out, in]` is the rule: the last axis of a matrix, the second of a kernel. Another axis needs a
reason: a bias as long as the outputs, a config.json whose model has `Conv1D` layers, a name that says
that a convolution is transposed, or the agreement of the whole file. Stacks of matrices are stored
both ways, so layers of one kind only have to agree.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from nmsparse_deploy.prove.report import TensorCheck

CONV1D = {
    "gpt2": {"c_attn", "q_attn", "c_proj", "c_fc"},
    "decision_transformer": {"c_attn", "q_attn", "c_proj", "c_fc"},
    "imagegpt": {"c_attn", "q_attn", "c_proj", "c_fc"},
    "openai-gpt": {"c_attn", "c_proj", "c_fc"},
    "clvp_decoder": {"c_proj", "c_fc"},
}
"""Model types of Transformers -> the layers that are `Conv1D` in their code; the others are linear."""
INPUTS_FIRST = {"aria_text", "gpt_oss", "llama4_text", "openai_privacy_filter"}
"""Model types of Transformers whose experts are stored as [experts, in, out]."""
EXPERTS = re.compile(r"experts\.(gate_up_proj|down_proj)$")
TRANSPOSED = re.compile(r"transpose|deconv|conv_?trans|tconv", re.IGNORECASE)
"""How the names of transposed convolutions look; many say nothing."""
MAX_CONFIG = 16 << 20

Family = Literal["matrix", "stack", "kernel"]
KINDS = {
    "matrix": ("a Conv1D of Transformers ([in, out])", "a linear layer ([out, in])"),
    "kernel": ("a transposed convolution ([in, out, ...])", "a convolution ([out, in, ...])"),
}


@dataclass(frozen=True)
class Layout:
    """The axes that a stored weight may be reduced along, the likeliest first."""

    axes: tuple[int, ...]
    why: str = ""
    """What shows that it is the first of them; empty when nothing does."""
    parts: int = 1
    """Parts of the reduction axis that are reduced one by one (groups of a transposed
    convolution)."""
    gemm: tuple[int, int] | None = None
    """K and N, where the shape alone would be read in another way."""


@dataclass(frozen=True)
class Config:
    """What the config.json beside a checkpoint says about its layers."""

    types: frozenset[str] = frozenset()
    linear: bool = False
    """Whether every layer that `CONV1D` does not name is linear."""
    said: str = ""
    """Where else that stands, in words."""

    @property
    def where(self) -> str:
        """Say where that stands."""
        types = " and ".join(f"'{name}'" for name in sorted(self.types)) or "the model"
        return self.said or f"in {types} of config.json"

    @property
    def conv1d(self) -> frozenset[str]:
        """The names of layers that are `Conv1D`."""
        return frozenset().union(*(CONV1D[name] for name in self.types & CONV1D.keys()))


def read_config(folder: Path) -> Config:
    """Read the config.json of a folder. One that is missing or damaged says nothing; nor does one
    whose model brings its own code about layers that Transformers does not have."""
    path = folder / "config.json"
    try:
        if not path.is_file() or path.stat().st_size > MAX_CONFIG:
            return Config()
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return Config()
    if not isinstance(table, dict):
        return Config()
    tables, types = [table], set()
    for level in tables:
        if isinstance(level.get("model_type"), str):
            types.add(level["model_type"])
        tables += [value for value in level.values() if isinstance(value, dict)]
    named = bool(types) or any(key in table for key in ("_class_name", "architecture"))
    return Config(frozenset(types), named and not any("auto_map" in level for level in tables))


class Layouts:
    """The layouts of a checkpoint's weights, by name."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], config: Config) -> None:
        self.shapes, self.config = shapes, config
        names = config.conv1d
        self.renamed = bool(names) and not any(_leaf(name) in names for name in shapes)
        """Whether config.json is of a model with `Conv1D` layers, and no name here is theirs."""
        self._leaves: dict[str, set[int]] = defaultdict(set)
        for name, shape in shapes.items():
            axis = self._by_bias(name, shape) if len(shape) == 2 else None
            if axis is not None:
                self._leaves[_leaf(name)].add(axis)

    def of(self, name: str) -> Layout:
        """Return how a tensor is laid out. One without two axes is no weight and has none."""
        shape = self.shapes[name]
        if len(shape) < 2:
            return Layout(())
        return {"matrix": self._matrix, "stack": self._stack, "kernel": self._kernel}[
            family(shape)
        ](name, shape)

    def has_linear(self, kind: Family) -> bool:
        """Tell whether some weight of this kind is known to follow the rule."""
        return any(
            layout.why and layout.axes[0] == 1
            for name, shape in self.shapes.items()
            if len(shape) > 1 and family(shape) == kind
            for layout in [self.of(name)]
        )

    def _matrix(self, name: str, shape: tuple[int, ...]) -> Layout:
        axis, leaf = self._by_bias(name, shape), _leaf(name)
        if axis is not None:
            return Layout((axis, 1 - axis), f"its bias has {shape[1 - axis]:,} values")
        if leaf in self.config.conv1d:
            return Layout((0, 1), f"{self.config.where} '{leaf}' is a Conv1D")
        if self.config.linear and name.endswith("weight") and not self.renamed:
            return Layout((1, 0), f"{self.config.where} '{leaf}' is no Conv1D")
        if len(self._leaves[leaf]) == 1:
            (axis,) = self._leaves[leaf]
            return Layout((axis, 1 - axis), f"another '{leaf}' of the file shows it by its bias")
        return Layout((1, 0))

    def _stack(self, name: str, shape: tuple[int, ...]) -> Layout:
        bias = self._bias(name)
        if TRANSPOSED.search(name):
            return _transposed(shape, bias, "its name says that it is transposed")
        if len(bias) == 2 and shape[1] != shape[2] and bias[0] == shape[0] and bias[1] in shape[1:]:
            axis = 2 if bias[1] == shape[1] else 1
            return Layout((axis, 3 - axis), f"its biases have {bias[1]:,} values each")
        if len(bias) == 1 and bias[0] == shape[0]:
            return Layout((1,), f"its bias has {bias[0]:,} values", gemm=(shape[1], shape[0]))
        if len(bias) == 1 and _parts(shape, bias[0]):
            return _transposed(shape, bias, f"its bias has {bias[0]:,} values")
        if self.config.types & INPUTS_FIRST and EXPERTS.search(name):
            return Layout((1, 2), "config.json names a model whose experts are [in, out]")
        return Layout((2, 1))

    def _kernel(self, name: str, shape: tuple[int, ...]) -> Layout:
        bias = self._bias(name)
        if TRANSPOSED.search(name):
            return _transposed(shape, bias, "its name says that it is transposed")
        if len(bias) == 1 and shape[0] != shape[1]:
            if bias[0] == shape[0]:
                return Layout((1, 0), f"its bias has {bias[0]:,} values")
            if _parts(shape, bias[0]):
                return _transposed(shape, bias, f"its bias has {bias[0]:,} values")
        return Layout((1, 0))

    def _by_bias(self, name: str, shape: tuple[int, ...]) -> int | None:
        """Return the axis of a matrix that is not that of its outputs, if the bias tells them
        apart."""
        bias = self._bias(name)
        if len(bias) != 1 or shape[0] == shape[1] or bias[0] not in shape:
            return None
        return 1 if bias[0] == shape[0] else 0

    def _bias(self, name: str) -> tuple[int, ...]:
        head, dot, last = name.rpartition(".")
        names = [f"{name}_bias"]
        if "weight" in last:
            names.append(head + dot + last.replace("weight", "bias"))
        return next((self.shapes[key] for key in names if key in self.shapes), ())


def _transposed(shape: tuple[int, ...], bias: tuple[int, ...], why: str) -> Layout:
    parts = max(1, _parts(shape, bias[0])) if len(bias) == 1 else 1
    return Layout((0, 1), why, parts, (shape[0] // parts, shape[1]))


def _parts(shape: tuple[int, ...], outputs: int) -> int:
    """Return the groups of a transposed convolution with so many outputs; 0 when it cannot have
    them."""
    parts, rest = divmod(outputs, shape[1]) if shape[1] else (0, 1)
    return parts if parts and not rest and shape[0] % parts == 0 else 0


def _leaf(name: str) -> str:
    """Return the name of a weight's layer without the layers around it."""
    path = name.split(".")
    return path[-2] if len(path) > 1 and "weight" in path[-1] else path[-1]


def family(shape: Sequence[int]) -> Family:
    """Return what a weight of this rank is."""
    return "matrix" if len(shape) == 2 else "stack" if len(shape) == 3 else "kernel"


def settle(rows: Sequence[TensorCheck], layouts: Layouts) -> list[TensorCheck]:
    """Return the rows of a checkpoint, where what holds along an axis that its layer does not
    reduce has failed, and what is believed because the file agrees says so."""
    claims = [row for row in rows if row.skipped is None and row.groups and not row.bad]
    layout_of = {row.tensor: layouts.of(row.tensor) for row in claims}
    open_rows = [row for row in claims if not layout_of[row.tensor].why]
    axes: dict[tuple[str, int], Counter[int]] = defaultdict(Counter)
    for row in open_rows:
        axes[_kind(row)][row.axis or 0] += 1
    settled = {
        row.tensor: _wrong_axis(row, layout_of[row.tensor])
        for row in claims
        if layout_of[row.tensor].why
    }
    usual = {
        row.tensor: max(axes[_kind(row)], key=lambda axis: (axes[_kind(row)][axis], axis))
        for row in open_rows
    }
    believed = {
        kind: not layouts.has_linear(kind) and _agree(claims, usual, kind)
        for kind in {family(row.shape) for row in open_rows}
    }
    for row in open_rows:
        votes = axes[_kind(row)]
        if row.axis != usual[row.tensor]:
            settled[row.tensor] = _failed(
                row,
                f"{_holds(row)}, but layers of one kind reduce one axis, and {votes[usual[row.tensor]]} "
                f"of {votes.total()} like it hold along axis {usual[row.tensor]}",
            )
        elif family(row.shape) != "stack" and row.axis == 0:
            kind = family(row.shape)
            reason = "as everything here that is sparse" if believed[kind] else ""
            if kind == "matrix" and layouts.renamed:
                reason = "which the model of config.json has"
            settled[row.tensor] = _inputs_first(row, reason)
    return [settled.get(row.tensor, row) for row in rows]


def _kind(row: TensorCheck) -> tuple[str, int]:
    return re.sub(r"\d+", "*", row.tensor) + str(row.shape), len(row.shape)


def _agree(claims: Iterable[TensorCheck], usual: Mapping[str, int], kind: Family) -> bool:
    """Tell whether all that is sparse, and more than one weight, is so along the first axis."""
    held = [usual.get(row.tensor, row.axis) for row in claims if family(row.shape) == kind]
    return len(held) > 1 and set(held) == {0}


def _inputs_first(row: TensorCheck, reason: str) -> TensorCheck:
    """Return the row of a weight along its first axis: believed for a reason, or failed."""
    stored, rule = KINDS[family(row.shape)]
    if reason:
        return replace(row, note=f"taken for {stored}, {reason}")
    other = "second" if len(row.shape) > 2 else "last"
    return _failed(
        row,
        f"it is {row.pattern} along its first axis and not along its {other}: right for {stored}, "
        f"worth nothing for {rule}, and neither a bias nor a config.json shows which it is",
    )


def _wrong_axis(row: TensorCheck, layout: Layout) -> TensorCheck:
    axis = layout.axes[0]
    if row.axis == axis:
        return row
    return _failed(row, f"{_holds(row)}, but {layout.why}: its layer reduces axis {axis}")


def _holds(row: TensorCheck) -> str:
    return f"it is {row.pattern} along axis {row.axis}"


def _failed(row: TensorCheck, problem: str) -> TensorCheck:
    return replace(row, problems=(*row.problems, problem))
