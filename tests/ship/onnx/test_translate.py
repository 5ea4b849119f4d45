"""Operators whose usual translation no runtime accepts: the graph computes what torch computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nmsparse_deploy.ship.onnx import export_onnx
from nmsparse_deploy.ship.onnx.onnxruntime import OnnxRuntime


class Squeezing(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.lin, self.dim = nn.Linear(8, 8), dim

    def forward(self, x):
        return self.lin(x).unsqueeze(2).squeeze(self.dim)


@pytest.mark.parametrize("dim", [1, 2, -1])
def test_only_an_axis_of_length_one_is_squeezed(dim, tmp_path):
    torch.manual_seed(0)
    module, x = Squeezing(dim).eval(), torch.randn(3, 4, 8)
    export_onnx(module, {"x": x}, tmp_path, "model", [])
    found = next(iter(OnnxRuntime.build(tmp_path / "model.onnx").run({"x": x}).values()))
    wanted = module(x).detach()
    assert found.shape == tuple(wanted.shape) and torch.allclose(
        torch.from_numpy(found), wanted, atol=1e-6
    )
