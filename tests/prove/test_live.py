import json

import pytest
import torch
from torch import nn

from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.pattern import NMPattern
from nmsparse_deploy.prove import verify_module
from tests.fixtures.tensor_files import dense, mask_set, plant, sparse


def model(weight):
    module = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0]))
    module[0].weight = nn.Parameter(weight)
    return module


@pytest.mark.parametrize(
    "pattern", [NMPattern(2, 4), NMPattern(1, 4), NMPattern(4, 8), NMPattern(2, 3)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_baked_model_holds(pattern, dtype, axis):
    weight, mask = sparse(24, 48, axis=axis, pattern=pattern, dtype=dtype)
    report = verify_module(model(weight), MaskSet({"0.weight": mask}))
    assert report.ok and report.checked == 1
    assert report.checks[0].groups == 24 * 48 // pattern.group
    assert report.checks[0].axis == axis


def test_a_value_outside_the_mask_fails_with_its_coordinates():
    weight, mask = sparse(8, 16)
    at = tuple(torch.nonzero(~mask.unpack())[20].tolist())
    report = verify_module(model(plant(weight, at)), mask_set(**{"0__weight": mask}))
    check = report.checks[0]
    assert not report.ok and check.bad == 1 and check.mask_mismatch == 1
    assert check.first_bad == (at[0], at[1] - at[1] % 4)
    assert str(list(check.first_bad)) in report.summary()


def test_another_mask_of_the_same_pattern_fails():
    weight, _ = sparse(8, 16, seed=1)
    _, mask = sparse(8, 16, seed=2)
    check = verify_module(model(weight), mask_set(**{"0__weight": mask})).checks[0]
    assert check.bad == 0 and not check.ok
    assert check.mask_mismatch == int(((weight != 0) & ~mask.unpack()).sum())


def test_minus_zero_and_nan_fail():
    weight, mask = sparse(8, 16)
    keep = mask.unpack()
    minus = torch.where(keep, weight, -0.0)
    check = verify_module(model(minus), mask_set(**{"0__weight": mask})).checks[0]
    assert not check.ok and check.negative_zeros == int((~keep).sum()) and check.mask_mismatch == 0
    nan = torch.where(keep, torch.nan, 0.0)
    check = verify_module(model(nan), mask_set(**{"0__weight": mask})).checks[0]
    assert not check.ok and check.nonfinite == int(keep.sum())


def test_a_masked_parameter_that_is_not_there_fails():
    weight, mask = sparse(8, 16)
    report = verify_module(model(weight), mask_set(other=mask))
    assert not report.ok and "'other'" in report.summary()
    assert not verify_module(model(weight), MaskSet({})).ok


def test_a_mask_of_another_shape_or_an_unreadable_dtype_fails():
    _, mask = sparse(16, 8)
    assert "shape" in verify_module(model(dense(8, 16)), mask_set(**{"0__weight": mask})).summary()
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(16, 8, dtype=torch.complex64))
    assert "complex64" in verify_module(module, mask_set(weight=mask)).summary()


def test_tied_parameters_are_found_under_both_names():
    weight, mask = sparse(16, 16)
    module = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
    module[0].weight = module[1].weight = nn.Parameter(weight)
    assert verify_module(module, mask_set(**{"1__weight": mask})).ok


def test_a_report_is_json_with_counts():
    weight, mask = sparse(64, 64)
    report = verify_module(model(weight), mask_set(**{"0__weight": mask}))
    document = json.loads(json.dumps(report.to_json()))
    assert document["ok"] is True and document["checked"] == 1 and document["failed"] == 0
    assert document["checks"][0]["shape"] == [64, 64]
    assert document["checks"][0]["shape_verdict"] == "recommended"
    assert "all hold" in report.summary()
