"""Perplexity against a direct computation; paired ratios; timing arithmetic."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

import nmsparse_deploy as nms
from nmsparse_deploy.data.text import TokenSample
from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.measure.bench import interleave, ratio, summarise
from nmsparse_deploy.measure.evaluate.perplexity import paired_ratio, perplexity
from nmsparse_deploy.measure.evaluate.result import EvalResult
from nmsparse_deploy.recipe import Evaluate, Prune, validate
from tests.fixtures import pico
from tests.fixtures.zoo import FAMILIES


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
    assert (
        result.metric == "token_ppl@48"
        and result.protocol["tokens"] == 240
        and not result.protocol["bos"]
    )
    spread = torch.tensor(losses).std() / math.sqrt(5)
    assert result.standard_error == pytest.approx(result.value * float(spread), rel=1e-4)


@torch.no_grad()
def test_an_encoder_decoder_is_asked_for_the_second_half():
    torch.manual_seed(0)
    module = T5ForConditionalGeneration(
        T5Config(
            vocab_size=256,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=3,
        )
    ).eval()
    data = sample(rows=3, length=17)
    result = perplexity(module, data, "cpu")
    losses = [float(module(input_ids=row[None, :8], labels=row[None, 8:]).loss) for row in data.ids]
    assert (
        result.per_sample == pytest.approx(losses, rel=1e-5)
        and result.metric == "conditional_ppl@9"
    )


def test_encoder_decoder_runs_are_evaluated_and_speech_is_refused(tmp_path):
    FAMILIES["T5"].build(tmp_path / "t5")
    spec = validate(
        Prune,
        {
            "method": "wanda",
            "calibration": {
                "data": str(pico.text(tmp_path, "a.txt", 1)),
                "samples": 4,
                "length": 16,
            },
        },
    )
    run = prune(str(tmp_path / "t5"), spec, tmp_path / "run")
    held = validate(
        Evaluate, {"data": str(pico.text(tmp_path, "b.txt", 2)), "tokens": 64, "context": 16}
    )
    found = nms.evaluate(run, held)
    assert {found["results"][label]["metric"] for label in ("dense", "pruned")} == {
        "conditional_ppl@8"
    }
    assert found["ratio"]["ratio"] != 1.0 and found["continuations"] == {}
    assert "conditional_ppl@8" in nms.report(run).read_text()
    FAMILIES["Whisper"].build(tmp_path / "whisper")
    speech = prune(str(tmp_path / "whisper"), Prune(method="magnitude"), tmp_path / "speech")
    with pytest.raises(NmsparseError, match="reads input_features"):
        nms.evaluate(speech)


def fake(losses) -> EvalResult:
    return EvalResult("token_ppl@8", 1.0, 0.0, len(losses), "cpu", {}, tuple(losses))


def test_paired_ratio():
    dense, pruned = fake([1.0, 3.0, 2.0]), fake([1.5, 3.5, 2.5])
    result = paired_ratio(dense, pruned)
    assert result.ratio == pytest.approx(math.exp(0.5))
    assert result.low == pytest.approx(
        result.high
    )  # the difference does not vary: pairing removes the spread
    wide = paired_ratio(dense, fake([1.0, 5.0, 2.0]))
    assert wide.low < wide.ratio < wide.high
    assert paired_ratio(fake([1.0]), fake([2000.0])).ratio == math.inf


def test_arms_are_interleaved_in_changing_order():
    order: list[str] = []
    times = interleave(
        {name: lambda name=name: order.append(name) for name in "abc"}, rounds=20, warmup=1
    )
    assert {name: len(t) for name, t in times.items()} == {"a": 20, "b": 20, "c": 20}
    rounds = [tuple(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(set(rounds)) > 2


def test_summary_and_ratio():
    base = [10.0, 11.0, 12.0, 10.5, 11.5]
    arm = summarise("dense", "k", base)
    assert arm.median_ms == 11.0 and arm.p10_ms == 10.0 and arm.p90_ms == 12.0 and arm.calls == 5
    same = ratio(base, base)
    assert asdict(same) == {"speedup": 1.0, "low": 1.0, "high": 1.0}
    half = ratio(base, [t / 2 for t in base])
    assert half.speedup == pytest.approx(2.0) and half.low <= 2.0 <= half.high
