"""Whole outputs that hold beside whole outputs that do not: a near miss at any share, and never in a
tensor without the pattern."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmsparse_deploy.masks import project
from nmsparse_deploy.pattern import TWO_FOUR, NMPattern
from nmsparse_deploy.prove import scan, verify_checkpoint, verify_onnx
from nmsparse_deploy.prove.group_counter import ELEMENT_TYPES
from nmsparse_deploy.prove.output_counter import OutputCounter, _log_chance
from nmsparse_deploy.prove.report import judge
from nmsparse_deploy.prove.scan import MemoryBytes, Scanner
from tests.fixtures.onnx_files import node, tensor
from tests.fixtures.onnx_files import saved as saved_onnx
from tests.fixtures.tensor_files import dense, sparse
from tests.prove.test_checkpoint import by_name, saved

PATTERNS = st.sampled_from([TWO_FOUR, NMPattern(1, 4), NMPattern(4, 8)])
SEEDS = st.integers(0, 1 << 30)


def verdict(values, pattern=TWO_FOUR, axis=1):
    raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    found = Scanner().scan(MemoryBytes(raw), ELEMENT_TYPES["I8"], values.shape, [axis], pattern)
    return judge(found.counts[axis], pattern, found.outputs[axis])


def in_pattern(rng, rows, width, pattern):
    return project(torch.from_numpy(rng.random((rows, width))), pattern, 1).numpy().astype(np.int8)


@settings(deadline=None, max_examples=120)
@given(
    SEEDS,
    PATTERNS,
    st.sampled_from([(64, 64), (200, 32), (16, 256)]),
    st.one_of(st.just(0.0), st.floats(0, 1)),
    st.one_of(st.just(0.0), st.floats(0, 1)),
    st.one_of(st.just(0.0), st.floats(0, 1)),
    st.booleans(),
)
def test_a_tensor_without_the_pattern_is_never_a_near_miss(
    seed, pattern, shape, sparsity, pruned_rows, pruned_columns, uneven
):
    """Dense, or with zeros anywhere, more of them in some rows than in others, and with channels
    pruned whole."""
    rng = np.random.default_rng(seed)
    share = rng.random((shape[0], 1)) if uneven else sparsity
    values = (rng.random(shape) >= share).astype(np.int8)
    values[rng.random(shape[0]) < pruned_rows] = 0
    values[:, rng.random(shape[1]) < pruned_columns] = 0
    assert verdict(values, pattern) != "near miss"
    assert verdict(values.T, pattern, axis=0) != "near miss"


@settings(deadline=None, max_examples=120)
@given(SEEDS, PATTERNS, st.integers(1, 99), st.sampled_from([(100, 96), (300, 128)]), st.booleans())
def test_any_share_of_dense_outputs_is_a_near_miss(seed, pattern, percent, shape, together):
    rng = np.random.default_rng(seed)
    values = in_pattern(rng, *shape, pattern)
    rows = np.arange(shape[0]) if together else rng.permutation(shape[0])
    values[rows[: shape[0] * percent // 100]] = 1
    assert verdict(values, pattern) == "near miss"
    assert verdict(values.T, pattern, axis=0) == "near miss"


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.integers(1, 99), st.floats(0, 0.6))
def test_pruned_channels_do_not_hide_dense_outputs(seed, percent, pruned):
    rng = np.random.default_rng(seed)
    values = in_pattern(rng, 200, 128, TWO_FOUR)
    values[: 2 * percent] = 1
    empty = rng.permutation(200)[: int(200 * pruned)]
    empty = empty[(empty != 0) & (empty != 199)]  # one dense and one sparse output stay
    values[empty] = 0
    assert verdict(values) == "near miss"


@pytest.mark.parametrize(
    "shape, axis",
    [
        ((6, 16), 1),
        ((16, 6), 0),
        ((3, 5, 8), 2),
        ((3, 8, 5), 1),
        ((6, 8, 3, 3), 1),
        ((8, 6, 3, 3), 0),
        ((2, 3, 8, 6), 2),
    ],
)
@pytest.mark.parametrize("step", [1, 3, 1000])
def test_outputs_are_counted_as_a_loop_counts_them(shape, axis, step):
    values = np.random.default_rng(0).random(shape) < 0.4
    groups = values.reshape(*shape[:axis], shape[axis] // 4, 4, *shape[axis + 1 :]).sum(axis + 1)
    counter = OutputCounter(shape, axis, TWO_FOUR)
    inner = math.prod(shape[axis + 1 :])
    flat = groups.reshape(-1, inner)
    for start in range(0, len(flat), step):
        counter.add(flat[start : start + step].reshape(-1).astype(np.uint8))
    found = counter.result()
    outputs = 1 - axis if len(shape) > 3 and axis < 2 else None
    reduced = tuple(i for i in range(len(shape)) if i != outputs) if outputs is not None else axis
    broken = (groups > 2).any(reduced).reshape(-1)
    nonzeros = groups.sum(reduced).reshape(-1)
    assert (found.outputs, found.broken) == (broken.size, broken.sum())
    assert found.first_broken == (int(broken.argmax()) if broken.any() else None)
    assert found.rows.tolist() == np.bincount(nonzeros, minlength=len(found.rows)).tolist()
    assert (
        found.whole.tolist() == np.bincount(nonzeros[~broken], minlength=len(found.rows)).tolist()
    )


@pytest.mark.parametrize("pattern", [TWO_FOUR, NMPattern(1, 4), NMPattern(4, 8)], ids=str)
def test_the_chance_of_a_row_is_bounded_from_above(pattern):
    groups = 12
    ways = [1]
    for _ in range(groups):
        longer = [0] * (len(ways) + pattern.keep)
        for power, count in enumerate(ways):
            for j in range(pattern.keep + 1):
                longer[power + j] += count * math.comb(pattern.group, j)
        ways = longer
    nonzeros = np.arange(1, pattern.keep * groups + 1)
    bound = _log_chance(nonzeros, groups, pattern)
    exact = [math.log(ways[z] / math.comb(pattern.group * groups, z)) for z in nonzeros]
    assert all(b >= e - 1e-9 for b, e in zip(bound, exact))
    assert bound[-1] == pytest.approx(exact[-1])


@pytest.mark.parametrize("outputs", [1, 10, 30, 67, 93])
def test_the_sentence_counts_the_dense_outputs(tmp_path, outputs):
    good, _ = sparse(100, 64)
    mixed, _ = sparse(100, 64, seed=1)
    mixed[7 : 7 + outputs] = dense(outputs, 64)
    report = verify_checkpoint(saved(tmp_path, good=good, mixed=mixed))
    assert report.failed == 1 and by_name(report)["good"].ok
    assert f"{outputs} of 100 outputs are dense, the first is output 7." in report.summary()


def test_the_dense_value_of_a_fused_projection_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "CHUNK", 1024)
    good, _ = sparse(192, 64)
    fused = torch.cat([*sparse(128, 64, seed=2)[0].chunk(2), dense(64, 64)])
    report = verify_checkpoint(saved(tmp_path, good=good, qkv=fused))
    assert "64 of 192 outputs are dense, the first is output 128" in report.summary()


def test_dense_outputs_of_an_onnx_weight_are_counted_along_its_reduction_axis(tmp_path):
    weight = sparse(64, 96, axis=0)[0].numpy()
    weight[:, ::3] = dense(64, 32).numpy()
    good = sparse(96, 64, axis=0, seed=3)[0].numpy()
    nodes = [node("MatMul", "x w", "y"), node("MatMul", "y good", "z")]
    report = verify_onnx(saved_onnx(tmp_path, nodes, [tensor("w", weight), tensor("good", good)]))
    assert report.failed == 1
    assert "32 of 96 outputs are dense, the first is output 0." in report.summary()


def test_a_stray_value_makes_no_output_dense(tmp_path):
    weight, mask = sparse(64, 64)
    weight[tuple(torch.nonzero(~mask.unpack())[9].tolist())] = 1.0
    report = verify_checkpoint(saved(tmp_path, w=weight))
    assert report.failed == 1 and "outputs" not in report.summary()
