"""The conv rule: groups along input channels, statistics of the unfolded input in the same order
(properties 21, 22)."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.find.calibration.layer_stats import StatsAccumulator
from nmsparse_deploy.find.methods.base import Method
from nmsparse_deploy.models.base import from_rows, to_rows
from nmsparse_deploy.models.discovery import discover
from nmsparse_deploy.pattern import NMPattern
from nmsparse_deploy.prove.group_counter import check

GEOMETRIES = [
    {},
    {"stride": 2},
    {"padding": 1},
    {"dilation": 2},
    {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_the_gram_of_a_convolution_is_that_of_the_equivalent_linear(geometry):
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 5, 3, bias=False, **geometry)
    x = torch.randn(2, 8, 11, 12)
    total = StatsAccumulator("gram")
    total.update(layer, x)
    stats = total.finish()
    rows = to_rows(layer.weight.detach(), 1)
    output = layer(x).detach().permute(0, 2, 3, 1).reshape(-1, 5)
    assert stats.tokens == len(output) and stats.gram.shape == (72, 72)
    # The energy of every output channel is w G wᵀ exactly when both are in the same order.
    assert torch.allclose(((rows @ stats.gram) * rows).sum(1), output.square().sum(0), rtol=1e-4)
    assert torch.equal(from_rows(rows, layer.weight.shape, 1), layer.weight)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "2:8"])
def test_a_pruned_convolution_holds_the_pattern_along_its_channels(method, pattern):
    torch.manual_seed(1)
    layer, wanted, chosen = (
        nn.Conv2d(16, 6, 3, padding=1),
        NMPattern.parse(pattern),
        Method.load(method),
    )
    total = StatsAccumulator("gram")
    total.update(layer, torch.randn(3, 16, 9, 9))
    result = chosen.prune_layer(to_rows(layer.weight.detach(), 1), total.finish(), wanted)
    mask = from_rows(result.mask, layer.weight.shape, 1)
    assert (
        check(mask.float(), wanted, 1).bad == 0
        and int(mask.sum()) * wanted.group == mask.numel() * wanted.keep
    )


def test_conv1d_and_its_transposed_linear_get_the_same_mask():
    torch.manual_seed(2)
    conv, linear, x = Conv1D(12, 16), nn.Linear(16, 12), torch.randn(40, 16)
    linear.weight.data = conv.weight.data.T.contiguous()
    masks = []
    for layer, axis in ((conv, 0), (linear, 1)):
        total = StatsAccumulator("gram")
        total.update(layer, x)
        rows = to_rows(layer.weight.detach(), axis)
        masks.append(
            Method.load("sparsegpt").prune_layer(rows, total.finish(), NMPattern.parse("2:4")).mask
        )
    assert torch.equal(*masks)


class Block(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.wide = nn.Conv2d(8, 8, 3, padding=1)
        self.narrow = nn.Conv2d(8, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x):
        return x + self.depthwise(self.wide(x) + self.narrow(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x):
        return self.blocks(self.stem(x))


def test_convolutions_of_another_geometry_share_no_statistics():
    found = discover(Net(), {"x": torch.randn(2, 3, 8, 8)})
    assert [t.name for t in found.targets] == [
        f"blocks.{n}.{k}.weight" for n in (0, 1) for k in ("wide", "narrow")
    ]
    assert len({t.fusion for t in found.targets}) == 4
    assert (found.targets[0].k, found.targets[0].n) == (8, 72)
    reasons = {s.name: s.reason for s in found.skipped}
    assert "stem" in reasons["stem.weight"] and "depthwise" in reasons["blocks.0.depthwise.weight"]


def test_a_single_convolution_is_no_network():
    with pytest.raises(NmsparseError, match="no repeated blocks"):
        discover(nn.Sequential(nn.Conv2d(3, 8, 3)), {"input": torch.randn(2, 3, 8, 8)})
