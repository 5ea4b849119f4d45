"""Sparse or dense: what is decided from given times, and that what is timed is what is decided."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.ship.torch_sparse.kernel_choice import (
    MANY,
    GemmDecision,
    Times,
    Verdict,
    decide,
    decide_all,
    judge,
    replayed,
    settle,
    time_pair,
    twins,
)
from nmsparse_deploy.ship.torch_sparse.semi_structured import KernelSetting, StandIn, standing_in
from nmsparse_deploy.system.gpu_clock import Machine, dry_machine, require_gpu

STEADY = [1.0 + 0.01 * (i % 5) for i in range(21)]


def times(speedup: float, noise: float = 0.0) -> Times:
    """Paired rounds; with noise, in no fixed direction."""
    return Times(STEADY, [t / speedup * (1 + noise * (-1) ** i) for i, t in enumerate(STEADY)])


@pytest.mark.parametrize(
    "by_rows,keep,why",
    [
        ({4096: 1.5}, "sparse", "1.50x"),
        ({4096: 0.8}, "dense", "slower at 4096 rows (0.80x)"),
        ({16: 0.5, 4096: 1.5}, "dense", "slower at 16 rows"),
        ({16: 1.0, 4096: 1.5}, "sparse", "4096 rows"),
        ({16: 1.0, 4096: 1.0}, "dense", "no difference beyond noise"),
    ],
)
def test_sparse_stays_where_it_wins_and_nowhere_loses(by_rows, keep, why):
    made = decide((64, 128), "fp16", ["w"], {rows: times(speed) for rows, speed in by_rows.items()})
    assert (
        made.keep == keep
        and why in made.why
        and [one.rows for one in made.verdicts] == sorted(by_rows)
    )


def test_a_gain_within_noise_is_none():
    assert judge(16, times(1.02, noise=0.3)).word == "within noise"
    assert judge(16, times(1.02)).word == "wins"


@given(st.lists(st.tuples(st.floats(0.5, 2), st.floats(0.001, 0.4)), min_size=1, max_size=5))
def test_what_is_kept_is_never_slower_beyond_noise(drawn):
    verdicts = [
        Verdict(rows, 1.0, 1.0, speed, speed - width, speed + width)
        for rows, (speed, width) in enumerate(drawn)
    ]
    keep, _ = settle(verdicts)
    lost = any(speed + width < 1 for speed, width in drawn)
    assert (keep == "sparse") == (not lost and any(speed - width > 1 for speed, width in drawn))


def test_a_decision_survives_json():
    decision = decide(
        (64, 128),
        "fp16",
        ["a", "b"],
        {32: Times(STEADY, STEADY, KernelSetting(3, transposed=False))},
    )
    made = json.loads(json.dumps(decision.to_json()))
    assert TypeAdapter(GemmDecision).validate_python(made) == decision
    assert made["settings"] == {
        "32": {"algorithm": 3, "split_k": 1, "split_k_mode": -1, "transposed": False}
    }
    assert made["weights"] == ["a", "b"] and made["verdicts"][0]["word"] == "within noise"


class Injected:
    """A machine on which calls take what a table says: dense, sparse by algorithm."""

    def __init__(self, dense: float, sparse: dict[int, float]) -> None:
        self.dense, self.sparse, self.seen = dense, sparse, []

    def machine(self) -> Machine:
        return Machine(torch.device("cpu"), "injected", lambda: self.clock, None, dry=True)

    def clock(self, call) -> float:
        self.seen.clear()
        call()
        return self.sparse[self.seen[0]] if self.seen else self.dense

    def kernels(self):
        outer = self

        class Watched(StandIn):
            def multiply(self, x, weight, n, bias, alpha, out, setting):
                outer.seen.append(setting.algorithm)
                return super().multiply(x, weight, n, bias, alpha, out, setting)

        return Watched()


@pytest.mark.parametrize("precision", ("fp16", "bf16", "int8", "fp8"))
def test_the_fastest_setting_is_found_and_timed(precision):
    if precision == "fp8" and not _dense_fp8():
        pytest.skip("this processor has no FP8 product")
    injected = Injected(1.0, {0: 2.0, 1: 0.5})
    with standing_in(injected.kernels()):
        found = time_pair(twins(64, 32, precision, torch.device("cpu")), 32, injected.machine(), 5)
        assert (
            found.setting.algorithm == 1
            and list(found.dense) == [1.0] * 5
            and list(found.sparse) == [0.5] * 5
        )
        made = decide_all({(64, 32, False): ["w"]}, precision, [32], injected.machine(), 5)
    assert (
        made[0].keep == "sparse"
        and made[0].verdicts[0].speedup == 2
        and made[0].settings[32].algorithm == 1
    )


def _dense_fp8() -> bool:
    one = torch.ones(())
    x = torch.ones(16, 16).to(torch.float8_e4m3fn)
    try:
        torch._scaled_mm(x, x.t(), one, one, out_dtype=torch.float16)
    except (RuntimeError, NotImplementedError):
        return False
    return True


@pytest.mark.parametrize("precision", ("fp16", "bf16", "int8"))
def test_twins_are_the_same_product(precision):
    with standing_in(StandIn()):
        pair = twins(64, 32, precision, torch.device("cpu"), biased=True)
        x = pair.reads(17)
        dense, sparse = (
            one.multiply(x) if hasattr(one, "multiply") else one.rows(x)
            for one in (pair.dense, pair.sparse)
        )
    assert (
        torch.allclose(dense.float(), sparse.float(), rtol=2e-2, atol=2e-2)
        and dense.abs().max() > 0.1
    )


def test_without_a_gpu_there_is_one_sentence():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(NmsparseError, match="needs an NVIDIA GPU"):
        require_gpu("Timing")
    with pytest.raises(NmsparseError, match="Sparse kernels cannot run fp16 here"):
        twins(64, 32, "fp16", torch.device("cpu"))


def test_a_shape_that_kernels_do_not_take_is_refused():
    with standing_in(StandIn()), pytest.raises(NmsparseError, match="shape 24 x 32"):
        twins(24, 32, "fp16", dry_machine().device)


def test_decisions_name_every_weight_once():
    with standing_in(StandIn()):
        made = decide_all(
            {(64, 32, False): ["a", "b"], (32, 64, True): ["c"]}, "fp16", [16], dry_machine(), 5
        )
    assert [one.weights for one in made] == [("a", "b"), ("c",)] and all(
        isinstance(one, GemmDecision) for one in made
    )


def test_short_products_are_recorded_in_a_row_and_counted_once():
    machine = Machine(
        torch.device("cpu"),
        "graphs",
        lambda: lambda call: call() or 0.05,
        lambda call: call,
        dry=True,
    )
    counted = {"a": 0, "b": 0}

    def call(name):
        counted[name] += 1

    found = replayed({name: lambda name=name: call(name) for name in "ab"}, machine, 4)
    assert (
        counted["a"] == 3 + (2 + 4) * MANY
    )  # a first look at single ones, then warm-up and rounds of many
    assert found == {"a": [0.05 / MANY] * 4, "b": [0.05 / MANY] * 4}
    slow = Machine(
        torch.device("cpu"),
        "graphs",
        lambda: lambda call: call() or 5.0,
        lambda call: call,
        dry=True,
    )
    assert replayed({"a": lambda: call("a")}, slow, 3) == {"a": [5.0] * 3}
