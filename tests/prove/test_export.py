"""The graphs that torch's own exporter writes."""

import pytest
import torch
from torch import nn

from nmsparse_deploy.prove import OnnxGraph, verify_onnx
from tests.fixtures.tensor_files import dense, mask_set, sparse

pytest.importorskip("onnxscript")


class Block(nn.Module):
    """A linear layer on three axes (stored transposed, its name lost), and one whose mask was not
    baked."""

    def __init__(self, weight, unbaked, keep):
        super().__init__()
        self.up = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.up.weight = nn.Parameter(weight)
        self.down = nn.Parameter(unbaked)
        self.register_buffer("keep", keep)

    def forward(self, x):
        return nn.functional.linear(self.up(x), self.down * self.keep)


def test_a_real_export_is_followed(tmp_path):
    weight, mask = sparse(640, 64)
    block = Block(weight, dense(640, 640), sparse(640, 640)[1].unpack()).eval()
    path = tmp_path / "block.onnx"
    torch.onnx.export(
        block, (torch.zeros(1, 5, 64),), path, dynamo=True, opset_version=20, verbose=False
    )
    graph = OnnxGraph(path)
    up, down = graph.uses
    assert up.axis == 0 and up.shape == (64, 640) and "up" in up.scopes
    assert torch.equal(weight, torch.from_numpy(graph.read(up.tensor)).T)
    link = {"up.weight": [up]}
    report = verify_onnx(path, mask_set(up__weight=mask), link)
    first, second = report.checks
    assert first.ok and first.mask_mismatch == 0 and first.parameter == "up.weight"
    assert not second.ok and second.node == down.node and "mask was not baked" in second.problems[0]
