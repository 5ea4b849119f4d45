"""A finished block on disk: what is read back is what was pruned, and rows of layers.json keep
their keys."""

import json

import pytest
import torch
from torch import nn

from nmsparse_deploy.errors import CheckFailed
from nmsparse_deploy.find.block_file import BlockContent, BlockFile
from nmsparse_deploy.find.calibration.layer_stats import LayerStats
from nmsparse_deploy.find.facts import RefinementRecord
from nmsparse_deploy.find.methods.base import LayerResult
from nmsparse_deploy.find.methods.grid import Grid
from nmsparse_deploy.find.prune_block import PrunedBlock
from nmsparse_deploy.find.refine.base import PrunedLayer
from nmsparse_deploy.masks import project, tensor_hash
from nmsparse_deploy.pattern import TWO_FOUR

KEYS = [
    "name",
    "block",
    "axis",
    "pattern",
    "shape",
    "dense_hash",
    "relative_error",
    "negative_zeros_normalised",
    "seconds",
    "peak_memory_mb",
]


@pytest.fixture
def module() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4)).to(torch.bfloat16)


def pruned_block(
    module: nn.Module,
    stats: LayerStats | None = None,
    grid: bool = False,
    mask: torch.Tensor | None = None,
) -> PrunedBlock:
    rows = module.get_parameter("0.weight").detach().float()
    mask = project(rows.abs(), TWO_FOUR) if mask is None else mask
    result = LayerResult(mask, rows, Grid.of(rows, 4) if grid else None)
    layer = PrunedLayer(rows, stats or LayerStats.none(), TWO_FOUR, 1, rows.shape, result)
    refinements = [RefinementRecord(3, "bias", {"corrected": 1, "seconds": 0.5})]
    return PrunedBlock(
        3,
        {"0.weight": layer},
        {"1.weight": torch.ones(4)},
        {"0.weight": 1.23456},
        {"0.weight": 7},
        refinements,
        {("0.weight", 1): torch.arange(8).flip(0)},
    )


def test_what_is_read_back_is_what_was_pruned(module, tmp_path):
    content = BlockContent.of(pruned_block(module), module, None)
    BlockFile.save(tmp_path / "000.safetensors", content)
    file = BlockFile.load(tmp_path / "000.safetensors")
    assert list(file.layers) == list(content.layers) and list(file.refinements) == list(
        content.refinements
    )
    parameters = file.parameters(module)
    assert parameters.keys() == {"0.weight", "1.weight"}
    assert all(read().dtype == torch.bfloat16 for read in parameters.values())
    assert torch.equal(parameters["0.weight"](), content.parameters["0.weight"])
    mask = file.masks()["0.weight"]
    assert torch.equal(mask.unpack(), parameters["0.weight"]() != 0) and mask.pattern == TWO_FOUR
    assert mask.dense_hash == tensor_hash(module.get_parameter("0.weight"))
    assert torch.equal(file.orders()["0.weight", 1], torch.arange(8).flip(0)) and not file.scales()


def test_rows_of_layers_json_keep_their_keys(module):
    (record,) = BlockContent.of(pruned_block(module), module, None).layers
    row = json.loads(json.dumps(record.to_json()))
    assert (
        list(row) == KEYS
        and row["seconds"] == 1.235
        and row["shape"] == [4, 8]
        and row["relative_error"] is None
    )
    white = LayerStats(3, torch.ones(8), white=True)
    (record,) = BlockContent.of(pruned_block(module, white), module, None).layers
    assert json.loads(json.dumps(record.to_json()))["experts"] == {
        "tokens": [3],
        "by_magnitude": [0],
    }


def test_a_mask_off_its_pattern_and_a_weight_off_its_grid_are_refused(module):
    with pytest.raises(CheckFailed, match="broke the pattern 2:4 on"):
        BlockContent.of(pruned_block(module, mask=torch.ones(4, 8, dtype=torch.bool)), module, None)
    with pytest.raises(CheckFailed, match="left the 4-bit grid on"):
        BlockContent.of(pruned_block(module, grid=True), module, None)


def test_records_of_refinements_come_back_from_json():
    record = RefinementRecord(None, "maskllm", {"prior": 2.0, "best": 1.0})
    row = json.loads(json.dumps(record.to_json()))
    assert row == {"block": None, "name": "maskllm", "prior": 2.0, "best": 1.0}
    assert RefinementRecord.from_json(row) == record
