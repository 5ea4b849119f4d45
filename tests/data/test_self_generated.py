"""Text that the model writes itself: drawn from its distribution, alone and between the windows of
real texts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import nmsparse_deploy as nms
from nmsparse_deploy import models
from nmsparse_deploy.data import calibration_sample as sampling
from nmsparse_deploy.data import self_generated as module
from nmsparse_deploy.data.self_generated import CERTAIN, GENERATED, generated, write
from nmsparse_deploy.data.text import calibration_sample, load_text
from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.recipe import Calibration, Export, Prune
from tests.fixtures import pico


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NMSPARSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / GENERATED


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A model whose predictions differ from token to token."""
    model = pico.llama(seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return models.load(str(pico.save(model, tmp_path_factory.mktemp("writer") / "pico")))


def test_tokens_are_drawn_as_often_as_the_model_says():
    logits = torch.tensor([2.0, -1.0, 0.5, -torch.inf, 0.0, 1.0])
    chance = torch.rand(60_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    counts = torch.bincount(
        module.sampled(logits.expand(len(chance), -1), chance), minlength=6
    ).double()
    expected = logits.double().softmax(0) * len(chance)
    assert counts[3] == 0
    some = expected > 0
    assert (
        float(((counts - expected)[some] ** 2 / expected[some]).sum()) < 18.5
    )  # chi-square, 4 degrees, p = 0.001


@given(
    st.integers(1, 400),
    st.integers(0, 99),
    st.one_of(st.floats(0, 1, exclude_max=True), st.just(0.0)),
)
def test_a_token_of_probability_zero_is_never_drawn(size, seed, chance):
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(seed)) * 20
    logits[
        0, torch.rand(size, generator=torch.Generator().manual_seed(seed + 1)) < 0.7
    ] = -torch.inf
    logits[0, seed % size] = 0.0
    token = int(module.sampled(logits, torch.tensor([chance], dtype=torch.float64)))
    assert torch.isfinite(logits[0, token])


def test_a_text_does_not_depend_on_the_ones_beside_it(writer, monkeypatch):
    together = write(writer, 7, 24, 0, torch.float32)
    monkeypatch.setattr(module, "ROWS", {"cpu": 3, "cuda": 3})
    assert torch.equal(write(writer, 7, 24, 0, torch.float32), together)
    assert len({tuple(row.tolist()) for row in together}) == 7
    assert not torch.equal(write(writer, 7, 24, 1, torch.float32), together)


def test_after_the_first_token_the_likeliest_follow_and_then_any(writer):
    ids = write(writer, 16, 24, 0, torch.float32)
    with torch.no_grad():
        likeliest = writer.module(input_ids=ids).logits.argmax(-1)[:, :-1]
    hits = likeliest == ids[:, 1:]
    assert hits[:, :CERTAIN].all() and not hits[:, CERTAIN:].all()
    assert not torch.isin(ids[:, 0], torch.tensor(writer.processor.all_special_ids)).any()


def test_a_sample_is_kept_and_belongs_to_its_weights(writer, cache, monkeypatch):
    first = generated(writer, 4, 16, 0, torch.float32)
    monkeypatch.setattr(module, "write", lambda *_: pytest.fail("it is already there"))
    again = generated(writer, 4, 16, 0, torch.float32)
    assert torch.equal(first.ids, again.ids) and first.fingerprint == again.fingerprint
    assert [file.suffix for file in cache.iterdir()] == [".safetensors"]
    other = models.load(writer.source)
    with torch.no_grad():
        next(other.module.parameters())[0, 0] += 1
    with pytest.raises(pytest.fail.Exception):
        generated(other, 4, 16, 0, torch.float32)


def test_the_model_is_left_in_its_own_precision(writer):
    before = {name: value.clone() for name, value in writer.module.state_dict().items()}
    write(writer, 2, 12, 0, torch.bfloat16)
    for name, value in writer.module.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name])


def test_what_a_text_lacks_the_model_writes(writer, tmp_path):
    file = pico.text(tmp_path, "short.txt", 1, words=60)  # 420 tokens
    drawn = sampling.draw(writer, Calibration(data=f"{GENERATED}+{file}", samples=40, length=32))
    real = {
        tuple(row)
        for row in calibration_sample(
            load_text(str(file)), writer.processor, 13, 32, 0
        ).ids.tolist()
    }
    mine = [tuple(row) in real for row in drawn.ids.tolist()]
    assert drawn.ids.shape == (40, 32) and sum(mine) == 13
    assert drawn.source == f"short.txt+{GENERATED}" and 0 < sum(mine[:20]) < 13, "in any order"
    long = pico.text(tmp_path, "long.txt", 2)
    drawn = sampling.draw(writer, Calibration(data=f"{long}+{GENERATED}", samples=9, length=32))
    real = {
        tuple(row)
        for row in calibration_sample(load_text(str(long)), writer.processor, 4, 32, 0).ids.tolist()
    }
    assert sum(tuple(row) in real for row in drawn.ids.tolist()) == 4, (
        "half of them when there is enough"
    )


def test_two_texts_give_half_each_and_say_when_they_cannot(writer, texts):
    both = "+".join(str(path) for path in texts.values())
    drawn = sampling.draw(writer, Calibration(data=both, samples=10, length=32))
    assert drawn.ids.shape == (10, 32) and drawn.source == "calibration.txt+held_out.txt"
    assert (
        sampling.draw(writer, Calibration(data=both, samples=1, length=32)).source == "held_out.txt"
    )
    for none in (both, GENERATED, f"{both}+{GENERATED}"):
        with pytest.raises(UsageError, match="at least one sample"):
            sampling.draw(writer, Calibration(data=none, samples=0, length=32))
    with pytest.raises(UsageError, match="windows of 32 tokens"):
        sampling.draw(writer, Calibration(data=both, samples=100_000, length=32))


def test_a_plus_in_the_name_of_a_file_is_no_mixture(writer, tmp_path):
    file = pico.text(tmp_path, "a+b.txt", 1)
    assert (
        sampling.draw(writer, Calibration(data=str(file), samples=2, length=16)).source == "a+b.txt"
    )


def test_a_run_on_its_own_text_is_verified_and_exported_in_8_bits(writer, tmp_path, texts):
    run = prune(
        writer.source,
        Prune(
            method="wanda",
            compute="fp32",
            calibration=Calibration(data=GENERATED, samples=6, length=32),
        ),
        tmp_path / "run",
    )
    ids = load_file(run / "calibration.safetensors")["ids"]
    assert torch.equal(ids.long(), write(models.load(writer.source), 6, 32, 0, torch.float32))
    assert run.manifest().stages["prune"].calibration["source"] == GENERATED
    pytest.importorskip("onnxscript")
    [row] = nms.export(run, Export(precisions=("int8",), cache=False))
    assert row.quantisation.gemms


def test_what_cannot_write_is_refused(writer, monkeypatch, tmp_path):
    other = models.load(writer.source)
    other.family = "encoder"
    with pytest.raises(UsageError, match="writes no text"):
        sampling.draw(other, Calibration(data=GENERATED, samples=2, length=16))
    with pytest.raises(UsageError, match="whole model in memory"):
        generated(models.load(writer.source, stream=True), 2, 16, 0, torch.float32)
    broken = models.load(writer.source)
    with torch.no_grad():
        broken.module.lm_head.weight[5] = torch.nan
    with pytest.raises(NmsparseError, match="NaN"):
        generated(broken, 2, 16, 0, torch.float32)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_out_of_memory_halves_the_batch(writer, monkeypatch):
    whole, plain = write(writer, 5, 16, 0, torch.float32), module._continued

    def small(net, first, chance):
        if len(first) > 2:
            raise torch.OutOfMemoryError
        return plain(net, first, chance)

    monkeypatch.setattr(module, "_continued", small)
    assert torch.equal(write(writer, 5, 16, 0, torch.float32), whole)
    monkeypatch.setattr(
        module, "_continued", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError)
    )
    with pytest.raises(NmsparseError, match="Not even one text"):
        write(writer, 5, 16, 0, torch.float32)


@pytest.mark.parametrize("data", ["text", GENERATED])
def test_windows_longer_than_the_model_reads_are_refused(data, tmp_path, texts):
    loaded = models.load(str(pico.save(pico.gpt2(), tmp_path / "gpt2")))
    source = str(texts["calibration"]) if data == "text" else data
    assert sampling.draw(loaded, Calibration(data=source, samples=2, length=128)).ids.shape == (
        2,
        128,
    )
    with pytest.raises(UsageError, match="129 tokens are longer than the 128") as found:
        sampling.draw(loaded, Calibration(data=source, samples=2, length=129))
    assert found.value.hint == "--length 128"
