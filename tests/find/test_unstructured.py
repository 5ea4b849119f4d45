"""Unstructured masks: exact counts, the sweep, and every stage of a run from pruning to the
report."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import nmsparse_deploy as nms
from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.find.methods.base import Method
from nmsparse_deploy.find.methods.hessian import inverse_factor
from nmsparse_deploy.find.methods.sparsegpt import prune_layer
from nmsparse_deploy.find.plan.make_plan import make_plan
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.masks import Mask, MaskSet, mask_follows, project, tensor_hash
from nmsparse_deploy.models.discovery import discover
from nmsparse_deploy.pattern import BLOCK_SIZE, TWO_FOUR, NMPattern, Unstructured, parse_pattern
from nmsparse_deploy.prove import verify_checkpoint, verify_module
from nmsparse_deploy.recipe import Export, Prune, validate
from nmsparse_deploy.registry import METHODS, REFINEMENTS
from tests.cli.test_cli import run as command
from tests.find.methods.test_methods import layer
from tests.find.test_prune import Stop, mask_bytes, spec, stop_at
from tests.fixtures import pico

HALF = Unstructured(0.5)
ABLE = [name for name in METHODS.names() if METHODS[name].scope]
seeds = st.integers(0, 2**31)
ratios = st.sampled_from([0.5, 0.3, 0.7, 0.625, 0.95, 0.01])
scopes = st.sampled_from(["layer", "row", "columns"])


def contests(rows: int, width: int, scope: str) -> list[list[tuple[int, int]]]:
    """Coordinates of the values that compete, row after row: the independent reading of the
    scopes."""
    if scope == "row":
        return [[(r, c) for c in range(width)] for r in range(rows)]
    step = 128 if scope == "columns" else width
    return [
        [(r, c) for r in range(rows) for c in range(start, min(start + step, width))]
        for start in range(0, width, step)
    ]


@given(
    ratios,
    scopes,
    st.integers(1, 5),
    st.integers(1, 300),
    seeds,
    st.sampled_from([0, 1]),
    st.integers(1, 40),
)
def test_exact_counts_of_the_highest_and_ties_by_lowest_index(
    ratio, scope, rows, width, seed, axis, values
):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-values, values + 1, (rows, width), generator=generator).float()
    pattern = Unstructured(ratio)
    mask = project(scores.T if axis == 0 else scores, pattern, axis, scope)
    mask = mask.T if axis == 0 else mask
    expected = torch.zeros(rows, width, dtype=torch.bool)
    for contest in contests(rows, width, scope):
        ranked = sorted(
            contest, key=lambda place: -float(scores[place])
        )  # stable: equal ones stay in order
        for place in ranked[: round((1 - ratio) * len(contest))]:
            expected[place] = True
    assert mask.dtype == torch.bool and torch.equal(mask, expected)
    assert mask_follows(mask, pattern, 1, scope) and mask_follows(mask, pattern)


@given(seeds, ratios)
def test_the_projection_has_the_best_sum_of_all(seed, ratio):
    scores = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed))
    mask = project(scores, Unstructured(ratio))
    keep = int(mask.sum())
    best = max(sum(pick) for pick in combinations(scores.flatten().tolist(), keep))
    assert keep == round((1 - ratio) * 10) and float(scores[mask].sum()) == pytest.approx(
        best, abs=1e-5
    )


@given(scopes, seeds)
def test_a_moved_or_added_place_is_noticed(scope, seed):
    mask = project(
        torch.rand(4, 260, generator=torch.Generator().manual_seed(seed)), HALF, scope=scope
    )
    more = mask.clone()
    more[~mask] = torch.arange(int((~mask).sum())) < 1
    assert not mask_follows(more, HALF, scope=scope)
    assert mask_follows(more, HALF)  # one value of a thousand could be another scope's rounding
    assert not mask_follows(torch.ones_like(mask), HALF)
    first, last = mask.nonzero()[0], (~mask).nonzero()[-1]
    moved = mask.clone()
    moved[tuple(first)], moved[tuple(last)] = False, True
    assert mask_follows(moved, HALF, scope=scope) == (scope == "layer")


def test_minus_zero_ties_with_zero_infinities_are_ranked_and_nan_refused():
    assert project(torch.tensor([[0.0, -0.0, 0.0, -0.0]]), HALF)[0].tolist() == [
        True,
        True,
        False,
        False,
    ]
    odd = torch.tensor([[float("-inf"), 1.0, float("inf"), 0.0]])
    assert project(odd, HALF)[0].tolist() == [False, True, True, False]
    with pytest.raises(ValueError, match="NaN"):
        project(torch.tensor([[1.0, float("nan")]]), HALF)


@pytest.mark.parametrize(
    "text,pattern",
    [
        ("2:4", TWO_FOUR),
        ("unstructured:0.5", HALF),
        (" unstructured : .50 ", HALF),
        ("unstructured:0.123456789", Unstructured(0.123456789)),
        ("unstructured:1e-05", Unstructured(1e-5)),
    ],
)
def test_text_form(text, pattern):
    assert parse_pattern(text) == pattern == parse_pattern(str(pattern))
    assert 0 < pattern.density < 1


@pytest.mark.parametrize(
    "text",
    [
        "unstructured",
        "unstructured:",
        "unstructured:0",
        "unstructured:1",
        "unstructured:50%",
        "unstructured:-0.5",
        "unstructured:nan",
        "unstructured:2:4",
        "unstructured0.5",
        "0.5",
    ],
)
def test_bad_patterns_are_usage_errors(text):
    with pytest.raises(UsageError):
        parse_pattern(text)


# --- methods ---


@pytest.mark.parametrize("ratio", [0.5, 0.7, 0.33])
@pytest.mark.parametrize("name", ABLE)
def test_every_method_that_declares_it_is_exact(name, ratio):
    """Correlated inputs, a dead column, a tie, an empty row, and a width that no group divides."""
    method = Method.load(name)
    weight, stats = layer(3, rows=7, width=BLOCK_SIZE + 13, tokens=400)
    weight[:, 3], weight[4], weight[5] = weight[:, 2], 0.0, 1.0
    stats.gram[5] = stats.gram[:, 5] = 0
    stats.square_sum[5] = 0
    result = method.prune_layer(weight, stats, Unstructured(ratio))
    assert mask_follows(result.mask, Unstructured(ratio), scope=method.facts.scope)
    assert (result.weight is not None) == method.facts.updates_weights
    if result.weight is not None:
        assert torch.isfinite(result.weight).all() and (result.weight[~result.mask] == 0).all()


def test_what_the_papers_compare():
    scopes = {name: METHODS[name].scope for name in METHODS.names()}
    assert (
        scopes["magnitude"] == "layer"
        and scopes["wanda"] == "row"
        and scopes["sparsegpt"] == "columns"
    )
    assert scopes["group-obs"] is None


def reference_sweep(weight, factor, ratio, block_size):
    """SparseGPT as the paper writes it, one value at a time and without the lazy batch."""
    w, u = weight.double().clone(), factor.double()
    rows, n = w.shape
    mask = torch.ones(rows, n, dtype=torch.bool)
    for j in range(n):
        if j % block_size == 0:
            block = [
                (float(w[r, c] ** 2 / u[c, c] ** 2), r, c)
                for r in range(rows)
                for c in range(j, min(j + block_size, n))
            ]
            for _, r, c in sorted(block)[: len(block) - round((1 - ratio) * len(block))]:
                mask[r, c] = False
        for r in range(rows):
            error = 0.0 if mask[r, j] else float(w[r, j] / u[j, j])
            w[r, j:] -= error * u[j, j:]
            if not mask[r, j]:
                w[r, j] = 0.0
    return w, mask


@pytest.mark.parametrize(
    "seed,block_size,width", [(0, 16, 40), (1, 16, 48), (2, BLOCK_SIZE, BLOCK_SIZE + 11)]
)
def test_the_sweep_is_the_plain_loop(seed, block_size, width):
    weight, stats = layer(seed, rows=4, width=width, tokens=3 * width)
    for ratio in (0.5, 0.7):
        result = prune_layer(weight, stats, Unstructured(ratio), block_size=block_size)
        expected, mask = reference_sweep(
            weight, inverse_factor(stats.gram, 0.01), ratio, block_size
        )
        assert torch.equal(result.mask, mask)
        torch.testing.assert_close(result.weight.double(), expected, rtol=1e-3, atol=1e-3)


def test_the_sweep_compensates_for_a_given_mask():
    weight, stats = layer(7, width=40)
    mask = project(torch.rand(12, 40), HALF)
    result = prune_layer(weight, stats, HALF, mask=mask)
    assert torch.equal(result.mask, mask)
    naive = torch.where(mask, weight, 0)
    assert energy(weight - result.weight, stats.gram) < energy(weight - naive, stats.gram)


def energy(weight, gram):
    return float(((weight @ gram) * weight).sum())


# --- refusals ---


def test_a_method_that_needs_groups_refuses_in_one_sentence(llama_dir, capfd):
    code, out, err = command(
        capfd, "prune", llama_dir, "--method", "group-obs", "--pattern", "unstructured:0.5"
    )
    assert (
        code == 2
        and out == ""
        and "The method 'group-obs' works in N:M groups only; for unstructured:0.5 take" in err
    )
    assert all(name in err for name in ABLE) and err.count("\n") == 1


def test_a_refinement_that_chooses_masks_has_to_declare_it(monkeypatch):
    """One that changes weights alone follows any mask."""
    asked = {"method": "wanda", "pattern": "unstructured:0.5", "refine": [{"name": "refit"}]}
    assert validate(Prune, asked).pattern == "unstructured:0.5"
    monkeypatch.setitem(REFINEMENTS.own, "refit", replace(REFINEMENTS.own["refit"], changes="both"))
    with pytest.raises(
        UsageError, match=r"The refinement 'refit' works in N:M groups only; .* take .*reconstruct"
    ):
        validate(Prune, asked)
    assert validate(Prune, {**asked, "pattern": "2:4"})


def test_files_without_a_run_cannot_show_it(runs, capfd, tmp_path):
    for name in ("model", "onnx/fp32/model.onnx"):
        code, _, err = command(
            capfd, "verify", runs["wanda"] / name, "--pattern", "unstructured:0.5"
        )
        assert code == 2 and "zeros alone cannot show that it is unstructured:0.5" in err


# --- a run from end to end ---


@pytest.fixture(scope="module")
def odd_dir(tmp_path_factory):
    """A model whose widths (40 and 90) are no multiples of any usual group."""
    module = pico.llama(hidden_size=40, intermediate_size=90)
    return pico.save(module, tmp_path_factory.mktemp("models") / "odd")


@pytest.fixture(scope="module")
def runs(odd_dir, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unstructured")
    return {
        name: prune(str(odd_dir), spec(texts, name, pattern="unstructured:0.5"), folder / name)
        for name in ("magnitude", "wanda", "sparsegpt")
    }


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
def test_pruned_and_verified(name, runs, odd_dir):
    run, scope = runs[name], METHODS[name].scope
    masks = MaskSet.load(run / "masks.safetensors")
    dense = dict(AutoModelForCausalLM.from_pretrained(odd_dir).named_parameters())
    masks.check_base(dense)
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert len(masks.masks) == 14
    for key, mask in masks.masks.items():
        weight = model.get_parameter(key)
        assert mask.pattern == HALF and mask_follows(mask.unpack(), HALF, mask.axis, scope)
        assert (
            torch.equal(weight == 0, ~mask.unpack())
            and not torch.signbit(weight[weight == 0]).any()
        )
        if name != "sparsegpt":
            assert torch.equal(weight, mask.apply(dense[key]))
    for report in (*nms.verify(run), verify_module(model, masks)):
        assert (
            report.ok and report.checked == 14 and report.zero_share == pytest.approx(0.5, abs=0.01)
        )
        assert "50.0% zeros" in report.summary() and "groups" not in report.summary()
    assert {row["shape_verdict"] for row in run.read_json("plan.json")["rows"]} == {
        "sparse tensor cores cannot run it"
    }


def spoil(tmp_path, run, change):
    folder = shutil.copytree(run / "model", tmp_path / "model", dirs_exist_ok=True)
    state = load_file(folder / "model.safetensors")
    key = "model.layers.1.mlp.down_proj.weight"
    mask = MaskSet.load(run / "masks.safetensors").masks[key].unpack()
    place = tuple((~mask).nonzero()[-1])
    state[key][place] = change
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return verify_checkpoint(folder, MaskSet.load(run / "masks.safetensors"))


@pytest.mark.parametrize(
    "value,sentence",
    [
        (1e-30, "1 values outside its mask are not zero"),
        (-0.0, "minus zero"),
        (float("nan"), "NaN"),
    ],
)
def test_one_changed_value_fails_verification(value, sentence, runs, tmp_path):
    report = spoil(tmp_path, runs["sparsegpt"], value)
    assert report.failed == 1 and sentence in " ".join(report.failures())


def test_a_mask_that_keeps_too_much_fails_verification(runs):
    """A mask file that was opened up would let any weight pass."""
    masks = MaskSet.load(runs["wanda"] / "masks.safetensors")
    key, mask = next(iter(masks.masks.items()))
    masks.masks[key] = Mask.pack(
        torch.ones(mask.shape, dtype=torch.bool), mask.axis, HALF, mask.dense_hash
    )
    report = verify_checkpoint(runs["wanda"] / "model", masks)
    assert (
        report.failed == 1
        and "its mask keeps 3,600 of 3,600 values, which is not unstructured:0.5"
        in report.summary()
    )


def test_every_later_stage(runs, texts, capfd):
    """Export, evaluate, bench and report of an unstructured run; each says what it is not."""
    run = runs["wanda"]
    rows = nms.export(run, Export(precisions=("fp32",)))
    assert rows[0].links == 14 and nms.verify(run)[1].ok and nms.verify(run)[1].checked == 14
    code, out, _ = command(
        capfd,
        "--json",
        "evaluate",
        run.path,
        "--data",
        texts["held_out"],
        "--tokens",
        128,
        "--context",
        64,
        "--continuation",
        0,
    )
    assert code == 0 and json.loads(out)["ratio"]
    code, out, _ = command(capfd, "--json", "bench", run.path, "--rounds", 3, "--length", 16)
    assert code == 0 and json.loads(out)["predicted"] == []
    page = nms.report(run)
    html, markdown = page.read_text(), page.with_name("report.md").read_text()
    facts = json.loads(page.with_name("report.json").read_text())
    assert (
        "unstructured:0.5, which no sparse tensor core runs, with wanda"
        in facts["headline"]["verdict"]
    )
    assert facts["masks"]["positions"] == [] and facts["compliance"]["ok"]
    for text in (html, markdown):
        assert "50.0 % zeros" in text and "14 sparse tensor cores cannot run it" in text
    assert "Bars: how often" not in html


def test_spoiled_graphs_are_noticed(runs, tmp_path):
    import onnx

    from nmsparse_deploy.prove import verify_onnx
    from nmsparse_deploy.ship.onnx import LinkMap

    source = runs["wanda"] / "onnx/fp32"
    if not source.exists():
        nms.export(runs["wanda"], Export(precisions=("fp32",)))
    model = onnx.load(source / "model.onnx")
    link, masks = (
        LinkMap.load(source / "model.link.json").by_parameter(),
        MaskSet.load(runs["wanda"] / "masks.safetensors"),
    )
    row = link["model.layers.0.mlp.up_proj.weight"][0]
    tensor = next(t for t in model.graph.initializer if t.name == row.tensor)
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[tuple(n[0] for n in (values == 0).nonzero())] = 1e-9
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, tmp_path / "model.onnx")
    report = verify_onnx(tmp_path / "model.onnx", masks, link)
    assert report.failed == 1 and "1 values outside its mask" in report.summary()


@pytest.mark.parametrize(
    "refine",
    [[{"name": "refit"}], [{"name": "reconstruct", "epochs": 1}]],
    ids=["refit", "reconstruct"],
)
def test_refinements_of_weights_and_resume(refine, odd_dir, texts, tmp_path, runs):
    asked = spec(texts, "sparsegpt", pattern="unstructured:0.5", refine=refine)
    whole = prune(str(odd_dir), asked, tmp_path / "whole")
    first = "model.layers.0.mlp.up_proj.weight"
    masks = [
        MaskSet.load(run / "masks.safetensors").masks[first].unpack()
        for run in (whole, runs["sparsegpt"])
    ]
    assert torch.equal(*masks)
    with pytest.raises(Stop):
        prune(str(odd_dir), asked, tmp_path / "broken", progress=stop_at(1))
    resumed = prune(str(odd_dir), asked, tmp_path / "broken")
    assert mask_bytes(resumed) == mask_bytes(whole)
    assert (resumed / "model/model.safetensors").read_bytes() == (
        whole / "model/model.safetensors"
    ).read_bytes()


def test_conv1d_competes_per_output(texts, tmp_path):
    folder = pico.save(pico.gpt2(), tmp_path / "gpt2")
    run = prune(str(folder), spec(texts, "wanda", pattern="unstructured:0.75"), tmp_path / "run")
    mask = (
        MaskSet.load(run / "masks.safetensors").masks["transformer.h.0.mlp.c_fc.weight"].unpack()
    )  # [in, out]
    assert (mask.sum(0) == 8).all()


def test_convolutions_verify():
    conv = nn.Conv2d(6, 5, 3)
    mask = project(conv.weight.detach().abs(), HALF, axis=1)
    masks = MaskSet({"weight": Mask.pack(mask, 1, HALF, tensor_hash(conv.weight))})
    assert not verify_module(conv, masks).ok
    with torch.no_grad():
        conv.weight.copy_(masks.masks["weight"].apply(conv.weight))
    assert verify_module(conv, masks).ok


def test_an_empty_tensor_is_no_crash():
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(3, 0))
    mask = Mask.pack(torch.zeros(3, 0, dtype=torch.bool), 1, HALF, tensor_hash(module.weight))
    assert verify_module(module, MaskSet({"weight": mask})).zero_share is None


def test_inspect_needs_no_group(odd_dir, capfd):
    code, out, _ = command(capfd, "inspect", odd_dir, "--pattern", "unstructured:0.5")
    assert code == 0 and "14 of 14" in out and "sparse tensor cores cannot run it" in out
    code, out, _ = command(
        capfd, "inspect", odd_dir, "--pattern", "unstructured:0.5", "--cost", "--method", "wanda"
    )
    assert code == 0 and "memory mb" in out
    found = discover(
        AutoModelForCausalLM.from_pretrained(odd_dir),
        {"input_ids": torch.zeros(1, 8, dtype=torch.long)},
    )
    assert len(make_plan(found, NMPattern(2, 4)).pruned()) == 12  # 90 is no multiple
