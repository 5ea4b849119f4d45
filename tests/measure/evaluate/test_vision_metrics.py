"""Probes, neighbours, correlations, overlaps: against values known by hand."""

from __future__ import annotations

import base64
import io

import pytest
import torch
from PIL import Image

from nmsparse_deploy.data.sentence_pairs import load_pairs
from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.measure.evaluate.agree import feature_agreement
from nmsparse_deploy.measure.evaluate.encoder import ranks, spearman
from nmsparse_deploy.measure.evaluate.probe import fit_probe, hits, nearest_classes
from nmsparse_deploy.measure.evaluate.result import (
    EvalResult,
    bootstrap_error,
    bootstrap_pairs,
    mean_result,
    paired_difference,
)
from nmsparse_deploy.measure.evaluate.saliency_maps import map_agreement, strips
from nmsparse_deploy.models.outputs import Features
from tests.fixtures import small_vision as small


def clouds(count=60, width=8, apart=6.0):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    return torch.randn(count, width, generator=generator) + apart * torch.eye(3, width)[
        labels
    ], labels


def test_the_probe_finds_separated_classes_and_is_deterministic():
    x, y = clouds()
    probe = fit_probe(x[:30], y[:30], 3)
    assert sum(hits(probe.logits(x[30:]), y[30:], 1)) == 30
    assert torch.equal(probe.weight, fit_probe(x[:30], y[:30], 3).weight)
    gradient = torch.autograd.functional.jacobian(
        lambda w: (
            torch.nn.functional.cross_entropy(
                (x[:30].double() - probe.mean) / probe.scale @ w.T + probe.bias, y[:30]
            )
            + 0.005 * w.square().sum()
        ),
        probe.weight,
    )
    assert gradient.abs().max() < 1e-4  # the minimum of the stated loss


def test_neighbours_vote_by_cosine():
    gallery = torch.tensor([[1.0, 0.0], [10.0, 0.5], [0.0, 1.0]])
    votes = nearest_classes(
        gallery, torch.tensor([0, 0, 1]), torch.tensor([[5.0, 0.1], [0.1, 3.0]]), 2, neighbours=2
    )
    assert votes.argmax(1).tolist() == [0, 1]
    x, y = clouds()
    assert sum(hits(nearest_classes(x[:30], y[:30], x[30:], 3), y[30:], 1)) == 30


def test_hits_count_the_best_k_and_never_an_unknown_class():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5]])
    assert hits(scores, torch.tensor([2, -1]), 1) == [0.0, 0.0]
    assert hits(scores, torch.tensor([2, -1]), 2) == [1.0, 0.0]


def test_spearman_with_ties():
    assert ranks(torch.tensor([10.0, 20.0, 20.0, 5.0])).tolist() == [1.0, 2.5, 2.5, 0.0]
    a = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert spearman(a, a.exp()) == pytest.approx(1) and spearman(a, -a) == pytest.approx(-1)
    assert spearman(a, torch.tensor([2.0, 1.0, 4.0, 3.0, 5.0])) == pytest.approx(
        0.8
    )  # 1 - 6*4/(5*24)
    assert spearman(a, torch.ones(5)) == 0


def test_agreement_of_a_model_with_itself():
    x = torch.randn(5, 7, 4)
    same = feature_agreement(*[Features(x[:, 0], x, x[:, 1])] * 2, "cpu", "set-8px", {})
    assert {r.metric: round(r.value, 6) for r in same} == {
        "pooled_cosine@set-8px": 1,
        "token_cosine@set-8px": 1,
        "kl@set-8px": 0,
        "same_top1@set-8px": 1,
    }
    padded = x.clone()
    padded[:, 3:] = -1
    mask = torch.ones(5, 7)
    mask[:, 3:] = 0
    found = {
        r.metric: r.value
        for r in feature_agreement(
            Features(None, x, None), Features(None, padded, None), "cpu", "s", {}, mask
        )
    }
    assert found == {"token_cosine@s": pytest.approx(1)}


def test_saliency_maps():
    a = torch.zeros(2, 4, 4)
    b = a.clone()
    a[0, :2], b[0, 1:3] = 1, 1
    found = {r.metric: r.per_sample for r in map_agreement(a, b, "cpu", "p", {})}
    assert found["saliency_iou@p"] == pytest.approx((1 / 3, 1.0)) and found[
        "saliency_mae@p"
    ] == pytest.approx((0.5, 0))
    assert found["saliency_correlation@p"] == pytest.approx((0.0, 0.0))
    rows = strips([small.picture("red", 0)] * 2, ["one.jpg", "two.jpg"], a, b)
    assert "one.jpg" in rows[0].title and "0.33" in rows[0].title
    strip = Image.open(io.BytesIO(base64.b64decode(rows[0].png_base64)))
    assert strip.size == (492, 160) and strip.getpixel((200, 10)) != strip.getpixel((200, 150))


def test_errors_and_intervals():
    assert mean_result("m", [1.0, 0.0, 1.0, 0.0], "cpu", {}).standard_error == pytest.approx(
        0.2887, abs=1e-3
    )
    dense, pruned = (
        EvalResult("m", 0, 0, 4, "cpu", {}, values) for values in ((1.0, 1, 0, 1), (0.0, 1, 0, 1))
    )
    found = paired_difference(dense, pruned)
    assert found.difference == -0.25 and found.low < -0.25 < found.high <= 0
    a = torch.randn(200, generator=torch.Generator().manual_seed(0))
    assert bootstrap_error(lambda index: float(a[index].mean()), 200) == pytest.approx(
        float(a.std()) / 200**0.5, rel=0.2
    )
    same = bootstrap_pairs(lambda i: float(a[i].mean()), lambda i: float(a[i].mean()), 200)
    assert (same.difference, same.low, same.high) == (0, 0, 0)


def test_rated_pairs(tmp_path, monkeypatch):
    file = tmp_path / "p.tsv"
    file.write_text("first\tsecond\trating\na\tb\t1\nc\td\t2\ne\tf\t3.5\n# remark\tx\t1\n")
    assert load_pairs(str(file))[0].rated == (("a", "b", 1.0), ("c", "d", 2.0), ("e", "f", 3.5))
    for text, sentence in (
        ("a\tb\t1\nc\td\tx\n", "'x' is not a rating"),
        ("", "no rated pairs"),
        ("a b 1\n" * 5, "no rated"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=sentence):
            load_pairs(str(file))
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        load_pairs(str(file))
    monkeypatch.delenv("NMSPARSE_DATA", raising=False)
    with pytest.raises(UsageError, match="NMSPARSE_DATA"):
        load_pairs("stsb")
    with pytest.raises(UsageError, match="word-pairs"):
        load_pairs("nowhere.tsv")
