"""Operators that multiply and sum: which of their inputs is a weight, and along which axis its
definition reduces it. What else reads a matrix is said to do so, unless it is known to be
harmless."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING

from nmsparse_deploy.prove.onnx_follow import FOLLOW
from nmsparse_deploy.prove.onnx_tensor import dtype_name
from nmsparse_deploy.prove.onnx_values import (
    MICROSOFT,
    STANDARD,
    Opaque,
    Scope,
    Value,
    dims,
    is_matrix,
    number,
    rank_of,
    sources,
    text,
)

if TYPE_CHECKING:
    from onnx import NodeProto


@dataclass(frozen=True, eq=False)
class Operand:
    """A constant in the place of a weight. `axis` is the one that the node reduces, `n_axis` that
    of its outputs."""

    value: Value
    axis: int = -2
    n_axis: int | None = None
    groups: int = 1
    """Blocks of the reduction axis that are multiplied on their own."""
    zero: str = ""
    """The input that says which integer is zero."""
    zero_axes: tuple[int, ...] = ()
    """The axes that it lies along, if it is no single number."""
    unknown: str = ""
    """Why the reduction axis is not known."""


Inputs = Sequence[Value | None]
Reader = Callable[["NodeProto", Inputs, Scope], Iterable[Operand]]


def _at(inputs: Inputs, place: int) -> Value | None:
    return inputs[place] if 0 <= place < len(inputs) else None


def _name(node: NodeProto, place: int) -> str:
    return node.input[place] if 0 <= place < len(node.input) else ""


def _computed(others: Iterable[Value | None], value: Value) -> bool:
    """Tell whether something beside a value is computed at run time, and not from the same
    constant."""
    if isinstance(value, Opaque) and value.weak:
        return False
    mine = set(sources([value]))
    return any(
        other is None or (other.selected and not mine & set(sources([other]))) for other in others
    )


def _matmul(
    node: NodeProto,
    inputs: Inputs,
    scope: Scope,
    a: int = 0,
    b: int = 1,
    zero_a: int = -1,
    zero_b: int = -1,
) -> Iterable[Operand]:
    """[..., M, K] x [..., K, N], or vectors; fused ones may turn their operands."""
    for place, zero, flag, batch, usual in (
        (b, zero_b, "transB", "transBatchB", (-2, -1)),
        (a, zero_a, "transA", "transBatchA", (-1, -2)),
    ):
        value, other = _at(inputs, place), _at(inputs, a + b - place)
        if value is None or (value.selected and (place == a or not _computed([other], value))):
            continue
        rank = rank_of(value)
        k, n = usual
        if rank == 1:
            yield Operand(value, 0, None, zero=_name(node, zero), zero_axes=(0,))
            continue
        if node.domain not in STANDARD:
            first = -2
            if number(node, batch) and rank is not None:  # the first axis takes the place of rows
                first = -rank
            rows, columns = (-1, first) if number(node, flag) else (first, -1)
            k, n = (rows, columns) if place == b else (columns, rows)
        yield Operand(value, k, n, zero=_name(node, zero), zero_axes=(n,))


def _gemm(
    node: NodeProto, inputs: Inputs, scope: Scope, b: int = 1, zero: int = -1
) -> Iterable[Operand]:
    left, right = _at(inputs, 0), _at(inputs, b)
    if (
        right is not None
        and rank_of(right) in (None, 2)
        and (not right.selected or _computed([left], right))
    ):
        k, n = (-1, -2) if number(node, "transB") else (-2, -1)
        yield Operand(right, k, n, zero=_name(node, zero), zero_axes=(n,))
    if left is not None and rank_of(left) in (None, 2) and not left.selected:
        k, n = (-2, -1) if number(node, "transA") else (-1, -2)
        yield Operand(left, k, n)


def _conv(
    node: NodeProto, inputs: Inputs, scope: Scope, weight: int = 1, zero: int = -1
) -> Iterable[Operand]:
    """[M, C/group, kernel...]: every group reduces its own C/group."""
    value = _at(inputs, weight)
    if value is not None and (rank_of(value) or 3) >= 3:
        yield Operand(value, 1, 0, zero=_name(node, zero), zero_axes=(0,))


def _conv_transpose(
    node: NodeProto, inputs: Inputs, scope: Scope, weight: int = 1, zero: int = -1
) -> Iterable[Operand]:
    """[C, M/group, kernel...]: every group reduces its own part of C."""
    value = _at(inputs, weight)
    if value is not None and (rank_of(value) or 3) >= 3:
        groups = max(1, number(node, "group", 1))
        yield Operand(value, 0, 1, groups, zero=_name(node, zero), zero_axes=(1,))


def _weights(
    node: NodeProto,
    inputs: Inputs,
    scope: Scope,
    places: Sequence[int] = (1,),
    axis: int = -2,
    n_axis: int = -1,
    zeros: Sequence[int] = (),
) -> Iterable[Operand]:
    """Weights in inputs of their own; by default [in, out]."""
    for i, place in enumerate(places):
        value = _at(inputs, place)
        if value is not None and (rank_of(value) or 2) >= 2:
            zero = _name(node, zeros[i]) if i < len(zeros) else ""
            yield Operand(value, axis, n_axis, zero=zero, zero_axes=(n_axis,))


def _einsum(node: NodeProto, inputs: Inputs, scope: Scope) -> Iterable[Operand]:
    """Read the axis from the equation: the letter that the operand shares with another and not with
    the result."""
    left, arrow, result = text(node, "equation").replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:  # the result has every letter that stands once, in the order of the alphabet
        result = "".join(sorted(c for c in set(left) if left.count(c) == 1 and c.isalpha()))
    if len(terms) != len(inputs):
        terms = [""] * len(inputs)
    for place, (term, value) in enumerate(zip(terms, inputs)):
        others = "".join(terms[:place] + terms[place + 1 :])
        beside = [*inputs[:place], *inputs[place + 1 :]]
        if value is None or (value.selected and not (place and _computed(beside, value))):
            continue
        letters = term.replace("...", "")
        shared = [c for c in dict.fromkeys(letters) if c in others and c not in result]
        alone = [c for c in letters if c not in others and c not in result]
        rank = rank_of(value)
        fits = len(set(letters)) == len(letters) and (
            rank is None or rank == len(letters) or ("..." in term and rank > len(letters))
        )
        if (fits and not (shared or alone)) or (rank is not None and rank < 2):
            continue  # it scales, like a Mul
        if len(shared) != 1 or alone or not fits:
            yield Operand(value, unknown="is read by Einsum, which reduces not one of its axes")
            continue
        free = [c for c in letters if c != shared[0] and c in result]
        n = max(free, key=lambda c: (c not in others, letters.index(c)), default=None)
        yield Operand(value, _axis(term, shared[0]), None if n is None else _axis(term, n))


def _axis(term: str, letter: str) -> int:
    """Count from the end behind an ellipsis, and from the front before it."""
    head, dots, tail = term.partition("...")
    if dots and letter in tail:
        return tail.index(letter) - len(tail)
    return head.index(letter)


def _packed(
    node: NodeProto, inputs: Inputs, scope: Scope, places: Sequence[int] = (1,)
) -> Iterable[Operand]:
    """Weights whose layout is the operator's own: several values in a byte, blocks, or an order
    that differs between versions."""
    for place in places:
        value = _at(inputs, place)
        if value is not None and _is_weight(value, scope):
            yield Operand(value, unknown=f"is read by {node.domain}.{node.op_type}")


def _quantised_lstm(node: NodeProto, inputs: Inputs, scope: Scope) -> Iterable[Operand]:
    """Weights lie as [directions, in, 4 * hidden]; zero points are per direction, or also per
    output."""
    for place, zero in ((1, 9), (2, 11)):
        value = _at(inputs, place)
        if value is not None:
            yield Operand(value, -2, -1, zero=_name(node, zero), zero_axes=(0, -1))


READERS: dict[tuple[str, str], Reader] = {
    ("", "MatMul"): _matmul,
    ("", "MatMulInteger"): partial(_matmul, zero_a=2, zero_b=3),
    ("", "QLinearMatMul"): partial(_matmul, a=0, b=3, zero_a=2, zero_b=5),
    ("", "Gemm"): _gemm,
    ("", "Conv"): _conv,
    ("", "ConvInteger"): partial(_conv, zero=3),
    ("", "QLinearConv"): partial(_conv, weight=3, zero=5),
    ("", "DeformConv"): _conv,
    ("", "CausalConvWithState"): _conv,
    ("", "ConvTranspose"): _conv_transpose,
    ("", "Einsum"): _einsum,
    **{
        ("", op): partial(_weights, places=(1, 2), axis=-1, n_axis=-2)
        for op in ("LSTM", "GRU", "RNN")
    },
    **{
        (MICROSOFT, op): _matmul
        for op in ("FusedMatMul", "FusedMatMulActivation", "TransposeMatMul", "MatMulInteger16")
    },
    (MICROSOFT, "DynamicQuantizeMatMul"): partial(_matmul, zero_b=3),
    (MICROSOFT, "MatMulIntegerToFloat"): partial(_matmul, zero_a=4, zero_b=5),
    (MICROSOFT, "GemmFastGelu"): _matmul,
    (MICROSOFT, "FusedGemm"): _gemm,
    (MICROSOFT, "GemmFloat8"): _gemm,
    (MICROSOFT, "QGemm"): partial(_gemm, b=3, zero=5),
    **{(MICROSOFT, op): _conv for op in ("FusedConv", "NhwcConv", "NhwcFusedConv")},
    (MICROSOFT, "QLinearConv"): partial(_conv, weight=3, zero=5),
    (MICROSOFT, "ConvTransposeWithDynamicPads"): _conv_transpose,
    (MICROSOFT, "Attention"): _weights,
    (MICROSOFT, "PackedAttention"): _weights,
    (MICROSOFT, "QAttention"): partial(_weights, zeros=(7,)),
    (MICROSOFT, "LongformerAttention"): partial(_weights, places=(1, 4)),
    (MICROSOFT, "DecoderAttention"): partial(_weights, places=(2, 3)),
    (MICROSOFT, "DecoderMaskedSelfAttention"): _weights,
    (MICROSOFT, "AttnLSTM"): partial(_weights, places=(1, 2), axis=-1, n_axis=-2),
    (MICROSOFT, "GatedRelativePositionBias"): partial(_weights, places=(3,)),
    (MICROSOFT, "DynamicQuantizeLSTM"): _quantised_lstm,
    **{(MICROSOFT, op): _packed for op in ("MatMulNBits", "MatMulBnb4", "MatMulFpQ4")},
    (MICROSOFT, "MoE"): partial(_packed, places=(2, 4, 6)),
    (MICROSOFT, "QMoE"): partial(_packed, places=(2, 5, 8)),
    ("com.microsoft.nchwc", "Conv"): _packed,
}
"""Domain and operator -> how to read it."""

MULTIPLYING = frozenset(("Attention", "FlexAttention", "LinearAttention", "SequenceMap"))
"""Standard operators that multiply what they read and are not taken apart here."""
NO_WEIGHTS = ("I64", "U64", "BOOL", "STRING")
"""Types of indices, masks and texts."""
CONTROL = frozenset(("If", "Loop", "Scan"))
_OF_MICROSOFT = """
BiasAdd BiasDropout BiasGelu BiasSoftmax BiasSplitGelu BitmaskBiasDropout BitmaskDropout CDist
ComplexMul ComplexMulConj CropAndResize DecoderMaskedMultiHeadAttention DequantizeBFP
EmbedLayerNormalization ExpandDims FastGelu GatherBlockQuantized GatherND Gelu GemmaRotaryEmbedding
GridSample GroupNorm GroupQueryAttention Inverse Irfft IsAllFinite MRotaryEmbedding MaxpoolWithMask
MulInteger MultiHeadAttention MurmurHash3 NGramRepeatBlock NhwcMaxPool PackedMultiHeadAttention Pad
PagedAttention QEmbedLayerNormalization QLinearAdd QLinearAveragePool QLinearConcat
QLinearGlobalAveragePool QLinearLeakyRelu QLinearMul QLinearReduceMean QLinearSigmoid QLinearSoftmax
QLinearWhere QuantizeBFP QuickGelu Range ReduceSumInteger RelativePositionBias RemovePadding
RestorePadding Rfft RotaryEmbedding SampleOp SkipGroupNorm SkipLayerNormalization
SkipSimplifiedLayerNormalization SparseAttention Tokenizer TorchEmbedding Trilu UnfoldTensor
Unique"""
HARMLESS = {
    MICROSOFT: frozenset(_OF_MICROSOFT.split()),
    "ai.onnx.ml": frozenset(("ArrayFeatureExtractor", "Normalizer", "Scaler", "Imputer")),
    "com.ms.internal.nhwc": frozenset(("BatchNormalization", "GridSample", "Resize")),
}
"""Operators of other domains that look up, add, or scale by constants, and sum no products of
them."""


def operands(node: NodeProto, inputs: Inputs, scope: Scope) -> Iterable[Operand]:
    """Yield the constants that a node multiplies by, with the axis that it reduces."""
    domain = "" if node.domain in STANDARD else node.domain
    reader = READERS.get((domain, node.op_type))
    if reader is not None:
        yield from reader(node, inputs, scope)
    elif not _is_harmless(domain, node.op_type):
        reason = f"is read by {domain}{'.' if domain else ''}{node.op_type}"
        for value in inputs:
            if value is not None and not value.selected and _is_weight(value, scope):
                yield Operand(value, unknown=reason)


def _is_harmless(domain: str, op: str) -> bool:
    if domain:
        return op in HARMLESS.get(domain, ()) or (domain, op) in FOLLOW
    return op in CONTROL or (op in _standard_operators() and op not in MULTIPLYING)


@cache
def _standard_operators() -> frozenset[str]:
    from onnx import defs

    return frozenset(schema.name for schema in defs.get_all_schemas() if not schema.domain)


def _is_weight(value: Value, scope: Scope) -> bool:
    """Tell whether a constant is a matrix of a type that weights have."""
    return any(
        is_matrix(dims(scope, name)) and dtype_name(scope.tensors[name]) not in NO_WEIGHTS
        for name in sources([value])
    )
