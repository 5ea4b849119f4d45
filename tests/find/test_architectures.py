"""The sweep over all architectures: nothing ends in a traceback, and every dense weight has a reason."""

from __future__ import annotations

import json

import pytest

from tests import ROOT

REASONS = (
    "head or projection outside the repeated blocks",
    "patch embedding or stem outside the repeated blocks",
    "router of a mixture of experts",
    "its block did not run in a forward pass",
    "not used in a forward pass",
    "grouped or depthwise convolution",
    "convolution along one axis",
    "transposed convolution",
    "recurrent layer",
    "part of a weight that is computed",
    "one output per token",
    "reads one row per sample",
    "reads the same input",
    "reduction length",
    "tied to",
    "no product with it was seen",
)


@pytest.mark.parametrize("name", ["architectures", "timm"])
def test_every_dense_weight_has_a_reason_and_nothing_failed(name):
    path = ROOT / f"results/{name}.json"
    if not path.is_file():
        pytest.skip("not measured")
    rows = json.loads(path.read_text())["rows"]
    late = {kind for kind, row in rows.items() if row.get("failed", "").startswith("no answer")}
    assert len(late) <= 2  # of hundreds of millions of parameters
    for kind in rows.keys() - late:
        assert rows[kind].keys() & {"pruned", "refused", "not_built"}, rows[kind]
    for kind, row in rows.items():
        assert all(reason.startswith(REASONS) for reason in row.get("dense", {})), kind
