"""Which shapes and precisions sparse tensor cores run."""

import pytest

from nmsparse_deploy.pattern import TWO_FOUR, NMPattern, Unstructured
from nmsparse_deploy.prove.group_counter import TORCH_ELEMENTS
from nmsparse_deploy.ship.torch_sparse.semi_structured import DTYPES
from nmsparse_deploy.system.sparse_cores import (
    BYTES,
    MIN_CAPABILITY,
    ROW_MULTIPLE,
    SPARSE_TYPES,
    min_capability,
    shape_fits,
    shape_verdict,
)


@pytest.mark.parametrize(
    "k, n, verdict",
    [
        (64, 32, "recommended"),
        (4096, 1024, "recommended"),
        (96, 32, "possible"),
        (64, 16, "possible"),
        (32, 16, "possible"),
        (16, 16, "ineligible by shape"),
        (64, 8, "ineligible by shape"),
    ],
)
def test_shape_verdict_follows_the_alignment_policy(k, n, verdict):
    assert shape_verdict(k, n, TWO_FOUR) == verdict
    assert shape_verdict(k, n, NMPattern(1, 4)) == verdict
    assert shape_verdict(k, n, NMPattern(4, 8)) is None
    assert shape_verdict(k, n, Unstructured(0.5)) == "sparse tensor cores cannot run it"


def test_every_precision_has_its_width_and_its_shapes():
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == BYTES
    assert {TORCH_ELEMENTS[dtype] for dtype in DTYPES.values()} == set(SPARSE_TYPES)
    assert (
        shape_fits("bf16", 16, 48)
        and not shape_fits("bf16", 16, 24)
        and not shape_fits("bf16", 8, 16)
    )
    assert (
        shape_fits("int8", 32, 96)
        and not shape_fits("int8", 16, 32)
        and not shape_fits("fp8", 32, 16)
    )
    assert set(ROW_MULTIPLE) == set(BYTES.values())
    assert min_capability("fp8") > min_capability("int8") == MIN_CAPABILITY
