"""The layers of a deployed model: codes as the ONNX export has them, sparse and dense alike, and
right numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nmsparse_deploy.masks import project
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.ship.quantise import FORMATS, quantise_weight
from nmsparse_deploy.ship.torch_sparse.linear import Dense, EightBit, encoded, make
from nmsparse_deploy.ship.torch_sparse.semi_structured import (
    DTYPES,
    KernelSetting,
    StandIn,
    standing_in,
)

pytest.importorskip("ml_dtypes")


def weight(seed: int = 0, n: int = 32, k: int = 64, size: float = 1.0) -> torch.Tensor:
    drawn = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * size
    return torch.where(project(drawn.abs(), TWO_FOUR), drawn, 0.0)


@pytest.mark.parametrize("precision", ("int8", "fp8"))
@given(
    seed=st.integers(0, 50),
    size=st.sampled_from((1e-12, 1e-6, 1e-3, 1.0, 300.0)),
    dead=st.booleans(),
)
def test_codes_are_those_of_the_onnx_export(precision, seed, size, dead):
    rows = weight(seed, size=size)
    rows[3] *= 0 if dead else 1
    codes, scales = encoded(rows, precision)
    most = float(rows.abs().max()) if precision == "fp8" else None
    wanted = quantise_weight(rows.numpy(), 1, FORMATS[precision], most)
    assert codes.dtype == DTYPES[precision] and torch.equal(
        codes.view(torch.uint8), torch.from_numpy(wanted.codes.view("uint8"))
    )
    assert scales.weight.tolist() == wanted.scales.astype("float32").reshape(-1).tolist()


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("biased", (True, False))
def test_a_layer_is_the_product_up_to_its_rounding(precision, biased):
    rows, x = weight(), torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1)).half()
    bias = torch.linspace(-1, 1, 32).half() if biased else None
    out = torch.bfloat16 if precision == "bf16" else torch.float16
    read = x.abs().max().float() / FORMATS[precision].max_value if precision in FORMATS else None
    codes, scales = encoded(rows, precision, read)
    wanted = torch.nn.functional.linear(x.float(), rows, None if bias is None else bias.float())
    with standing_in(StandIn()):
        layer = make(codes, None if bias is None else bias.to(out), True, out, scales)
        found = layer(x.to(out))
    assert found.shape == (2, 9, 32) and found.dtype == out
    assert (found.float() - wanted).norm() / wanted.norm() < (0.05 if precision == "fp8" else 0.02)
    assert layer.weight_bytes * 16 == rows.numel() * (10 if precision in FORMATS else 18)


@pytest.mark.parametrize("rows", (1, 8, 17, 31, 32, 33))
def test_the_dense_int8_twin_takes_any_number_of_rows(rows):
    codes, scales = encoded(weight(), "int8", torch.tensor(0.02))
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)).half()
    with standing_in(StandIn()):
        dense, sparse = (
            make(codes, None, kind, torch.float16, scales)(x) for kind in (False, True)
        )
    assert torch.equal(dense, sparse)


def test_fp8_saturates_what_is_larger_than_what_was_calibrated():
    codes, _ = encoded(torch.eye(4).repeat(8, 16), "fp8")
    layer = make(codes, None, False, torch.float16, EightBit(torch.ones(1), torch.tensor(1.0)))
    found, factors = layer.encode(torch.tensor([[1000.0, -1000.0, 0.5, 1.5]]))
    assert found.float().tolist() == [[448, -448, 0.5, 1.5]] and factors is None


@pytest.mark.parametrize("sparse", (True, False))
def test_a_token_a_thousand_times_larger_than_others_does_not_cost_them_their_digits(sparse):
    """One scale for all rows would leave the usual ones nothing but zeros, and fp16 must not
    overflow on the way."""
    rows, x = weight(), torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    x[0] *= 1000
    x[1] = 0
    codes, scales = encoded(rows, "int8", x.abs().max() / 127)
    with standing_in(StandIn()):
        found = make(codes, None, sparse, torch.float16, scales)(x.half()).float()
    wanted = torch.nn.functional.linear(x, rows)
    assert ((found - wanted).norm(dim=1) <= 0.02 * wanted.norm(dim=1)).all()


def test_settings_go_by_rows():
    seen = []

    class Watched(StandIn):
        def multiply(self, x, weight, n, bias, alpha, out, setting):
            seen.append((len(x), setting.algorithm))
            return super().multiply(x, weight, n, bias, alpha, out, setting)

    with standing_in(Watched()):
        layer = make(weight().half(), None, True, torch.float16, None, {8: KernelSetting(7)})
        for rows in (8, 9):
            layer(torch.ones(rows, 64).half())
    assert seen == [(8, 7), (9, 0)]


def test_a_compiler_sees_one_opaque_product():
    with standing_in(StandIn()):
        layer, x = make(weight().half(), None, True, torch.float16), torch.randn(5, 64).half()
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), layer(x)) and torch.equal(layer(x), layer(x))
        assert torch.allclose(layer(x), Dense(weight().half(), None)(x), atol=0.02)
