"""Rewrite a graph so that its linked GEMMs multiply 8-bit numbers (`quant.py` has the arithmetic).

    weight      stored codes -> DequantizeLinear (a scale per output)
    activation  QuantizeLinear -> DequantizeLinear (one scale), one pair per tensor, shared by what reads it
    output      QuantizeLinear -> DequantizeLinear behind the bias, where asked for

Weights are stored as codes, so the verifier reads what the GEMM multiplies by. By report, TensorRT
picks its sparse INT8 kernels only where the output is requantised (NVIDIA Model-Optimizer, pull
request 1664). TensorRT-RTX, compiling without a GPU, lets a GEMM write 8 bits only when its weight
has one scale; with a scale per output it requantises in a kernel of its own. Hence `one_scale`,
which q, k and v have to share to be merged all the same.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nmsparse_deploy.errors import CheckFailed, NmsparseError
from nmsparse_deploy.ship.onnx.link import LinkMap, LinkRow
from nmsparse_deploy.ship.quantise import FORMATS, Format, Range, quantise_weight, scale_of

if TYPE_CHECKING:
    import onnx

MIN_OPSET = 19
"""The first in which scales may be fp16 and codes FP8."""


@dataclass(frozen=True)
class QdqResult:
    """A rewritten graph. `vanished` counts weights that were not zero and are now."""

    link: LinkMap
    gemms: int
    requantised: int
    vanished: int


def insert_qdq(
    path: Path,
    link: LinkMap,
    ranges: Mapping[str, Range],
    kind: str,
    requantise: Collection[str] = (),
    one_scale: bool = False,
) -> QdqResult:
    """Rewrite the graph at `path` and its data file in place; every linked weight becomes 8 bits.

    `ranges` are those of each row's module, `requantise` names the parameters whose outputs are 8
    bits too. With `one_scale` the weights that read one activation share one scale, and so do their
    outputs. Raises `CheckFailed` when a zero would move, `NmsparseError` for a weight that is no
    matrix.
    """
    import onnx

    rewrite = _Rewrite(onnx.load(str(path)), FORMATS[kind])
    for row in link.rows:
        if len(row.shape) != 2 or row.op not in ("MatMul", "Gemm"):
            raise NmsparseError(
                f"'{row.parameter}' is multiplied by {row.op} with a weight of shape "
                f"{list(row.shape)}; {kind} needs a matrix.",
                "export it in fp16",
            )
    if one_scale:
        ranges = rewrite.share(link.rows, ranges)
    rows = [rewrite.row(row, ranges[row.module], row.parameter in requantise) for row in link.rows]
    data = f"{path.name}.data"
    path.unlink()
    (path.parent / data).unlink(missing_ok=True)
    onnx.save(
        rewrite.finished(),
        str(path),
        save_as_external_data=True,
        location=data,
        size_threshold=1024,
    )
    return QdqResult(
        LinkMap(link.onnx, tuple(rows)),
        len(rows),
        len(rewrite.outputs),
        sum(rewrite.vanished.values()),
    )


class _Rewrite:
    """One graph while it is rewritten; nodes that go in front of others are collected and sorted in
    at the end."""

    def __init__(self, model: onnx.ModelProto, form: Format) -> None:
        self.model, self.form = model, form
        self.nodes = {node.name: node for node in model.graph.node}
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in model.graph.node:
            for name in node.input:
                self.readers[name].append(node)
        self.made: dict[str, tuple[str, str]] = {}  # stored weight -> its codes' name and hash
        self.activations: dict[str, str] = {}
        self.shared: dict[str, float] = {}  # stored weight -> the largest value of its group
        self.outputs: set[str] = set()
        self.vanished: dict[str, int] = {}
        self.before: dict[str, list[onnx.NodeProto]] = defaultdict(
            list
        )  # output of a node -> what follows it at once
        self.first: list[onnx.NodeProto] = []  # what reads stored tensors only

    def share(self, rows: Sequence[LinkRow], ranges: Mapping[str, Range]) -> dict[str, Range]:
        """Give the weights that read one activation a common largest value, and their outputs a
        common range."""
        groups: dict[str, list[LinkRow]] = defaultdict(list)
        for row in rows:
            groups[self._activation_of(self.nodes[row.node])[1]].append(row)
        shared = dict(ranges)
        for group in groups.values():
            max_value = max(float(np.abs(self._read(row.tensor)).max()) for row in group)
            wrote = max(ranges[row.module].wrote for row in group)
            self.shared |= {
                row.tensor: max(max_value, self.shared.get(row.tensor, 0.0)) for row in group
            }
            shared |= {row.module: replace(ranges[row.module], wrote=wrote) for row in group}
        return shared

    def _activation_of(self, node: onnx.NodeProto) -> tuple[int, str]:
        """Return which input of a multiplication is computed, and its name."""
        return next(
            (i, given) for i, given in enumerate(node.input[:2]) if not self._is_stored(given)
        )

    def _read(self, name: str) -> np.ndarray:
        from onnx import numpy_helper

        return numpy_helper.to_array(self.weights[name])

    def row(self, row: LinkRow, seen: Range, requantise: bool) -> LinkRow:
        """Rewrite one multiplication; returns the row of what is stored now."""
        node = self.nodes[row.node]
        name, digest = self._weight(row)
        slot, given = self._activation_of(node)
        node.input[slot] = self._activation(given, seen.read)
        if requantise:
            self._output(node, seen.wrote)
        return replace(row, tensor=name, dtype=self.form.element, sha256=digest)

    def _is_stored(self, name: str) -> bool:
        """Return a weight, or what was made of one (by a transposition)."""
        if name in self.weights or name in self.made:
            return True
        maker = next((n for n in self.model.graph.node if name in n.output), None)
        return (
            maker is not None
            and bool(maker.input)
            and all(self._is_stored(given) for given in maker.input)
        )

    def _weight(self, row: LinkRow) -> tuple[str, str]:
        """Replace a stored weight by its codes. What read it keeps reading the same name, now made
        by the DQ."""
        if row.tensor not in self.made:
            weight = self._read(row.tensor)
            if weight.dtype != np.float16:
                raise CheckFailed(
                    f"'{row.tensor}' is {weight.dtype}; 8-bit graphs are made from fp16 ones."
                )
            result = quantise_weight(weight, row.axis, self.form, self.shared.get(row.tensor))
            codes, scales = f"{row.tensor}_{self.form.name}", f"{row.tensor}_scale"
            self.model.graph.initializer.remove(self.weights.pop(row.tensor))
            self._store(codes, result.codes)
            self._store(scales, result.scales)
            self.first.append(self._dequantize([codes, scales], row.tensor, result.axis))
            self.made[row.tensor] = codes, hashlib.sha256(result.codes.tobytes()).hexdigest()
            self.vanished[row.tensor] = result.vanished
        return self.made[row.tensor]

    def _activation(self, name: str, largest: float) -> str:
        """Return the quantised twin of an activation, made once."""
        if name not in self.activations:
            self.activations[name] = f"{name}_dequantized"
            self.before[name] += self._pair(name, name, self.activations[name], largest)
        return self.activations[name]

    def _output(self, node: onnx.NodeProto, largest: float) -> None:
        """Quantise what a GEMM gives, behind its bias; readers keep the name."""
        last = node
        after = self.readers[node.output[0]]
        if (
            len(after) == 1
            and after[0].op_type == "Add"
            and any(self._is_stored(i) for i in after[0].input)
        ):
            last = after[0]
        name = last.output[0]
        if name in self.outputs:
            return
        self.outputs.add(name)
        last.output[0] = f"{name}_wide"
        self.before[f"{name}_wide"] += self._pair(f"{name}_wide", f"{name}_out", name, largest)

    def _pair(self, given: str, stem: str, result: str, largest: float) -> list[onnx.NodeProto]:
        from onnx import helper

        scale, codes = f"{stem}_scale", f"{stem}_{self.form.name}"
        self._store(scale, scale_of(largest, self.form))
        quantize = helper.make_node(
            "QuantizeLinear", [given, scale, self._zero()], [codes], f"{stem}_quantize"
        )
        # ONNX Runtime moves pairs about and takes the codes of one without a zero point for
        # unsigned.
        return [quantize, self._dequantize([codes, scale, self._zero()], result)]

    def _dequantize(self, given: list[str], result: str, axis: int | None = None) -> onnx.NodeProto:
        from onnx import helper

        node = helper.make_node("DequantizeLinear", given, [result], f"{given[0]}_dequantize")
        if axis is not None:
            node.attribute.append(helper.make_attribute("axis", axis))
        return node

    def _zero(self) -> str:
        """Return the zero point of every activation; it says which type the codes have."""
        if "zero" not in self.weights:
            self._store("zero", self.form.codes(np.zeros(())))
        return "zero"

    def _store(self, name: str, values: np.ndarray) -> None:
        from onnx import TensorProto, helper

        kind = {"I8": TensorProto.INT8, "F8_E4M3": TensorProto.FLOAT8E4M3FN}[self.form.element]
        kind = TensorProto.FLOAT16 if values.dtype == np.float16 else kind
        tensor = helper.make_tensor(
            name, kind, values.shape, np.ascontiguousarray(values).tobytes(), raw=True
        )
        self.model.graph.initializer.append(tensor)
        self.weights[name] = tensor

    def finished(self) -> onnx.ModelProto:
        """Return the model with every new node right behind what it reads."""
        given = [
            node for value in self.model.graph.input for node in self.before.pop(value.name, [])
        ]
        nodes = [*self.first, *given]
        for node in self.model.graph.node:
            nodes.append(node)
            for name in node.output:
                nodes += self._following(name)
        kept = [type(node).FromString(node.SerializeToString()) for node in nodes]
        del self.model.graph.node[:]
        self.model.graph.node.extend(kept)
        del self.model.graph.value_info[:]  # shapes stay true, types do not
        return self.model

    def _following(self, name: str) -> list[onnx.NodeProto]:
        """Yield new nodes behind a tensor, and those behind what they make."""
        made = self.before.pop(name, [])
        return [
            *made,
            *(more for node in made for out in node.output for more in self._following(out)),
        ]
