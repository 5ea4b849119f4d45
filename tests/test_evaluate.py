"""Perplexity against a direct computation; paired ratios; timing arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from nmsparse_deploy.bench import interleave, ratio, summarise
from nmsparse_deploy.calib.text import TokenSample
from nmsparse_deploy.evaluate import EvalResult, paired_ratio, perplexity
from tests import pico


def sample(rows: int = 5, length: int = 48) -> TokenSample:
    ids = torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(0))
    return TokenSample(ids, tuple(range(rows)), "random", "0")


@torch.no_grad()
def test_perplexity_is_that_of_the_models_own_loss():
    module = pico.llama()
    data = sample()
    result = perplexity(module, data, "cpu")
    losses = [float(module(input_ids=row[None], labels=row[None]).loss) for row in data.ids]
    assert result.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert result.per_sample == pytest.approx(losses, rel=1e-5)
    assert result.metric == "token_ppl@48" and result.protocol["tokens"] == 240 and not result.protocol["bos"]
    spread = torch.tensor(losses).std() / math.sqrt(5)
    assert result.standard_error == pytest.approx(result.value * float(spread), rel=1e-4)


def fake(losses) -> EvalResult:
    return EvalResult("token_ppl@8", 1.0, 0.0, len(losses), "cpu", {}, tuple(losses))


def test_paired_ratio():
    dense, pruned = fake([1.0, 3.0, 2.0]), fake([1.5, 3.5, 2.5])
    result = paired_ratio(dense, pruned)
    assert result["ratio"] == pytest.approx(math.exp(0.5))
    assert result["low"] == pytest.approx(result["high"])  # the difference does not vary: pairing removes the spread
    wide = paired_ratio(dense, fake([1.0, 5.0, 2.0]))
    assert wide["low"] < wide["ratio"] < wide["high"]
    assert paired_ratio(fake([1.0]), fake([2000.0]))["ratio"] == math.inf


def test_arms_are_interleaved_in_changing_order():
    order: list[str] = []
    times = interleave({name: lambda name=name: order.append(name) for name in "abc"}, rounds=20, warmup=1)
    assert {name: len(t) for name, t in times.items()} == {"a": 20, "b": 20, "c": 20}
    rounds = [tuple(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(set(rounds)) > 2


def test_summary_and_ratio():
    base = [10.0, 11.0, 12.0, 10.5, 11.5]
    arm = summarise("dense", "k", base)
    assert arm.median_ms == 11.0 and arm.p10_ms == 10.0 and arm.p90_ms == 12.0 and arm.calls == 5
    same = ratio(base, base)
    assert same == {"speedup": 1.0, "low": 1.0, "high": 1.0}
    half = ratio(base, [t / 2 for t in base])
    assert half["speedup"] == pytest.approx(2.0) and half["low"] <= 2.0 <= half["high"]
