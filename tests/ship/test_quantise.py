"""The arithmetic of 8-bit weights and activations."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nmsparse_deploy.errors import CheckFailed, NmsparseError
from nmsparse_deploy.masks import project
from nmsparse_deploy.models.base import Target
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.prove.group_counter import check
from nmsparse_deploy.ship.quantise import FORMATS, Format, calibrate, quantise_weight, scale_of

EVERY = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


def sparse(seed, shape=(16, 32), axis=1, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * spread ** torch.randn(
        shape, generator=generator
    )
    return (
        torch.where(project(weight.abs(), TWO_FOUR, axis), weight, torch.zeros(())).half().numpy()
    )


def values(result, axis):
    """What the codes stand for."""
    scales = result.scales.astype(np.float32)
    return result.codes.astype(np.float32) * (
        scales if result.axis is None else np.expand_dims(scales, axis)
    )


@EVERY
@given(
    seed=st.integers(0, 10**6), axis=st.sampled_from([0, 1]), spread=st.sampled_from([1.0, 10.0])
)
def test_no_zero_moves_and_the_pattern_lives_on_in_the_codes(form, seed, axis, spread):
    weight = sparse(seed, axis=axis, spread=spread)
    result = quantise_weight(weight, axis, form)
    assert not result.codes.astype(np.float32)[weight == 0].any()
    kind = torch.int8 if form.element == "I8" else torch.float8_e4m3fn
    assert check(torch.from_numpy(result.codes.view(np.int8)).view(kind), TWO_FOUR, axis).bad == 0
    assert result.vanished == int(((weight != 0) & (result.codes.astype(np.float32) == 0)).sum())


@EVERY
@given(seed=st.integers(0, 10**6), axis=st.sampled_from([0, 1]))
def test_the_error_is_at_most_half_a_step(form, seed, axis):
    weight = sparse(seed, axis=axis).astype(np.float32)
    result = quantise_weight(weight.astype(np.float16), axis, form)
    scales = np.expand_dims(result.scales.astype(np.float32), axis)
    # Steps of INT8 are even; FP8 has three bits of mantissa above its smallest normal number.
    step = 1.0 if form.element == "I8" else np.maximum(np.abs(weight / scales) * 2**-3, 2.0**-9)
    saturated = np.abs(weight / scales) > form.max_value
    error = np.abs(values(result, axis) - weight) / scales
    assert (error <= np.where(saturated, form.max_value * 2**-10, step / 2 + 1e-3)).all()


@EVERY
def test_the_largest_weight_of_every_output_uses_the_whole_range(form):
    weight = np.diag([1e-3, 1.0, 100.0]).astype(np.float16)
    codes = quantise_weight(weight, 1, form).codes.astype(np.float32)
    assert (np.diag(codes) > form.max_value * 0.95).all()
    shared = quantise_weight(weight, 1, form, max_value=100.0)
    assert shared.scales.shape == () and shared.axis is None
    assert shared.codes.astype(np.float32)[2, 2] > form.max_value * 0.95


@EVERY
def test_empty_rows_and_tiny_values_have_finite_scales(form):
    result = quantise_weight(np.array([[0, 0, 0, 0], [6e-8, 0, 0, 0]], np.float16), 1, form)
    assert np.isfinite(result.scales).all() and (result.scales > 0).all()
    assert not result.codes.astype(np.float32)[0].any()
    assert scale_of(0.0, form) == 1


def test_fp8_has_no_minus_zero_and_does_not_overflow():
    form = FORMATS["fp8"]
    codes = form.codes(np.array([-1e-9, 1e9, -1e9, 448.0, 0.0], np.float32))
    assert codes.view(np.uint8)[0] == 0
    assert codes.astype(np.float32).tolist() == [0, 448, -448, 448, 0]


def test_a_format_that_moves_zeros_is_caught():
    class Shifted(Format):
        def codes(self, scaled):
            return super().codes(scaled + 3)

    with pytest.raises(CheckFailed, match="moved a zero"):
        quantise_weight(sparse(0), 1, Shifted("int8", "I8", 127.0))


def target(path):
    return Target(f"{path}.weight", path, 0, 1, 4, 4, path)


def test_ranges_are_those_of_what_a_layer_reads_and_writes():
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.eye(4) * -2)
        module[1].weight.copy_(torch.eye(4) * 3)
    found = calibrate(
        module, [target("0"), target("1")], [{"input": torch.eye(4)}, {"input": -5 * torch.eye(4)}]
    )
    assert [(found[p].read, found[p].wrote) for p in "01"] == [(5, 10), (10, 30)]
    assert not module[0]._forward_hooks


def test_activations_without_a_range_are_named():
    module = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(NmsparseError, match="'0' are not finite"):
        calibrate(module, [target("0")], [{"input": torch.full((1, 4), float("inf"))}])
