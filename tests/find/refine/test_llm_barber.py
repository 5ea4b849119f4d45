"""LLM-Barber: the pairwise swap against brute force, per-sample gradients against one backward pass
per sample."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import mse_loss

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.find.calibration.layer_stats import LayerStats
from nmsparse_deploy.find.methods.base import LayerResult
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.find.refine.base import BlockPair, PrunedLayer
from nmsparse_deploy.find.refine.llm_barber import rebuild, refine, squared_gradients
from nmsparse_deploy.find.refine.units import units
from nmsparse_deploy.masks import MaskSet, mask_follows, project
from nmsparse_deploy.models.base import to_rows
from nmsparse_deploy.pattern import TWO_FOUR, NMPattern, Unstructured
from nmsparse_deploy.recipe import LlmBarber, Prune, validate
from tests.find.test_prune import Stop, mask_bytes, spec, stop_at
from tests.fixtures import pico

seeds = st.integers(0, 2**31)
patterns = st.sampled_from([NMPattern.parse(text) for text in ("2:4", "1:4", "4:8", "2:8", "3:4")])
shares = st.sampled_from([0.01, 0.25, 0.5, 1.0])


def ranked(
    seed: int, pattern: NMPattern, rows: int = 5, groups: int = 12
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores with many ties, and a mask that knows nothing of them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, groups * pattern.group)
    scores = torch.randint(0, 6, shape, generator=generator).float()
    return scores, project(torch.rand(shape, generator=generator), pattern)


@given(seeds, patterns, shares)
def test_swaps_are_those_of_brute_force(seed, pattern, share):
    """Row by row: the counts, the summed score and the number of swaps of a loop that knows no
    vectors."""
    scores, mask = ranked(seed, pattern)
    new = rebuild(scores, mask, pattern, share)
    assert mask_follows(new, pattern)
    for row in range(len(scores)):
        gains = []
        for price, kept in zip(scores[row].split(pattern.group), mask[row].split(pattern.group)):
            gains.append(
                max(p for p, k in zip(price.tolist(), kept) if not k)
                - min(p for p, k in zip(price.tolist(), kept) if k)
            )
        positive = sorted((g for g in gains if g > 0), reverse=True)
        best = positive[: int(share * len(positive))]
        assert int((new[row] & ~mask[row]).sum()) == len(best)
        won = scores[row][new[row]].sum() - scores[row][mask[row]].sum()
        assert float(won) == pytest.approx(sum(best)) and won >= 0


@given(seeds, patterns)
def test_swapping_ends_at_the_best_mask_of_the_scores(seed, pattern):
    scores, mask = ranked(seed, pattern)
    for _ in range(pattern.group):
        mask = rebuild(scores, mask, pattern, 1.0)
    best = project(scores, pattern)
    assert float(scores[mask].sum()) == float(scores[best].sum())


def one_threshold_per_row(
    scores: torch.Tensor, mask: torch.Tensor, pattern: NMPattern, share: float
) -> torch.Tensor:
    """The published rule: a row's pairs set two thresholds; what is above one grows, what is below
    the other goes."""
    new = mask.clone()
    for row in range(len(scores)):
        grow = scores[row][~mask[row]].sort(descending=True).values
        drop = scores[row][mask[row]].sort().values
        short = min(len(grow), len(drop))
        pairs = int(share * int((grow[:short] > drop[:short]).sum()))
        if not pairs:
            continue
        grown = ~mask[row] & (scores[row] >= grow[pairs - 1])
        for first in range(0, scores.shape[1], pattern.group):
            here = slice(first, first + pattern.group)
            count = int(grown[here].sum())
            kept = [
                (float(scores[row, i]), i)
                for i in range(first, first + pattern.group)
                if mask[row, i]
            ]
            gone = [i for price, i in sorted(kept)[:count] if price < float(drop[pairs - 1])]
            new[row, here] |= grown[here]
            new[row, gone] = False
    return new


@given(st.integers(0, 2**31), st.sampled_from([0.1, 0.5, 1.0]))
def test_without_groups_pairs_are_those_of_the_row(seed, share):
    """Witness: a plain loop. Every row keeps its count, and the summed score never falls."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(4, 24, generator=generator)
    mask = torch.rand(4, 24, generator=generator) < 0.5
    found = rebuild(scores, mask, Unstructured(0.5), share)
    for row in range(4):
        out = sorted((j for j in range(24) if not mask[row, j]), key=lambda j: -scores[row, j])
        kept = sorted((j for j in range(24) if mask[row, j]), key=lambda j: scores[row, j])
        pairs = [(i, j) for i, j in zip(out, kept) if scores[row, i] > scores[row, j]]
        wanted = mask[row].clone()
        for i, j in pairs[: int(share * len(pairs))]:
            wanted[i], wanted[j] = True, False
        assert torch.equal(found[row], wanted)
    assert (found.sum(1) == mask.sum(1)).all()
    assert (scores * found).sum() >= (scores * mask).sum() - 1e-6


def test_ties_break_the_published_rule_and_not_the_pairs():
    """Property 16."""
    scores = torch.tensor([[1.0, 1.0, 2.0, 2.0, 1.0, 1.0, 2.0, 2.0]])
    mask = torch.tensor([[True, True, False, False, True, True, False, False]])
    assert not mask_follows(one_threshold_per_row(scores, mask, TWO_FOUR, 0.5), TWO_FOUR)
    assert mask_follows(rebuild(scores, mask, TWO_FOUR, 0.5), TWO_FOUR)


# --- the gradients and the two halves
# --------------------------------------------------------------------------------


ROPE = pico.llama().model.rotary_emb


def llama_block(seed: int, updated: bool = False, batches: int = 2, batch: int = 3) -> BlockPair:
    """The second block of a two-block model behind a random stream, its weights pruned by
    magnitude."""
    model = pico.llama(seed, intermediate_size=96).model
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(batch, 8, 64, generator=generator) for _ in range(batches)]
    rope = ROPE(inputs[0], torch.arange(8)[None])
    module, dense = pico.llama(seed, intermediate_size=96).model.layers[1], model.layers[1]
    for each in (module, dense):
        each.self_attn.o_proj.weight.data.mul_(40)  # or attention would hardly show in the stream
    layers = {}
    for name, value in dense.named_parameters():
        if value.ndim < 2:
            continue
        rows = value.detach().clone()
        mask = project(rows.abs(), TWO_FOUR)
        weight = rows * 1.25 if updated else None
        layers[name] = PrunedLayer(
            rows, LayerStats.none(), TWO_FOUR, 1, rows.shape, LayerResult(mask, weight)
        )
        module.get_parameter(name).data.copy_(layers[name].weight)

    def run(block: nn.Module, number: int, x: torch.Tensor) -> torch.Tensor:
        return block(x, position_embeddings=rope)

    return BlockPair(module, dense, layers, inputs, None, run)


def gradients_one_by_one(layers, dense_loss, samples) -> dict[str, torch.Tensor]:
    """Mean of squared gradients, one backward pass for every sample."""
    for weight in layers.values():
        weight.requires_grad_(True)
    found = {name: torch.zeros_like(weight) for name, weight in layers.items()}
    for x in samples:
        gradients = torch.autograd.grad(dense_loss(x), list(layers.values()))
        for name, gradient in zip(layers, gradients):
            found[name] += gradient.square() / len(samples)
    for weight in layers.values():
        weight.requires_grad_(False)
    return found


def attention(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    rope = ROPE(x, torch.arange(x.shape[1])[None])
    return module.self_attn(
        module.input_layernorm(x), position_embeddings=rope, attention_mask=None
    )[0]


def mlp(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module.mlp(module.post_attention_layernorm(x))


def expected_squares(
    part: str, dense: nn.Module, module: nn.Module, before: nn.Module, block: BlockPair
) -> dict:
    """What one half's score is made of: no residual, and the MLP behind the attention of
    `before`."""
    for parameter in (*dense.parameters(), *module.parameters()):
        parameter.requires_grad_(False)

    def loss(x: torch.Tensor) -> torch.Tensor:
        if part == "self_attn":
            return mse_loss(attention(dense, x), attention(module, x))
        x = x + attention(before, x)
        return mse_loss(mlp(dense, x), mlp(module, x))

    weights = {name: dense.get_parameter(name) for name in block.layers if name.startswith(part)}
    return gradients_one_by_one(
        weights, loss, [x[i : i + 1] for x in block.inputs for i in range(len(x))]
    )


@pytest.mark.parametrize("seed", range(2))
def test_a_half_is_scored_by_its_own_output_sample_by_sample(seed):
    block = llama_block(seed)
    for parameter in block.dense.parameters():
        parameter.requires_grad_(False)
    got, _ = squared_gradients(block, units(block, "half")[0])
    expected = expected_squares("self_attn", block.dense, block.module, block.module, block)
    assert set(got) == set(expected)
    for name in expected:
        torch.testing.assert_close(
            got[name], expected[name], rtol=1e-3, atol=1e-4 * float(expected[name].max())
        )


@pytest.mark.parametrize("seed", range(2))
def test_the_mlp_is_rebuilt_behind_the_rebuilt_attention(seed):
    block = llama_block(seed)
    dense, module = copy.deepcopy(block.dense), copy.deepcopy(block.module)
    done = refine(block, LlmBarber(share=0.5))
    rebuilt = copy.deepcopy(module)
    for name, result in done.layers.items():
        if name.startswith("self_attn"):
            rebuilt.get_parameter(name).data.copy_(
                torch.where(result.mask, block.layers[name].dense, 0.0)
            )
    behind_old = expected_squares("mlp", dense, module, module, block)
    for name, square in expected_squares("mlp", dense, module, rebuilt, block).items():
        layer = block.layers[name]
        new, old = (
            rebuild(layer.dense.abs() * s.sqrt(), layer.result.mask, TWO_FOUR, 0.5)
            for s in (square, behind_old[name])
        )
        wrong, without = (int((done.layers[name].mask != mask).sum()) for mask in (new, old))
        assert wrong <= 8 and without > 5 * wrong + 40  # a near tie may fall either way


class Picture(nn.Module):
    """A convolution and the transposed linear of GPT-2, one after the other."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.mix = Conv1D(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(self.relu(self.conv(x)).flatten(2).transpose(1, 2).contiguous())


@pytest.mark.parametrize("seed", range(3))
def test_convolutions_and_transposed_linears(seed):
    torch.manual_seed(seed)
    dense, module = Picture(), Picture()
    layers = {}
    for name, axis in (("conv.weight", 1), ("mix.weight", 0)):
        weight = dense.get_parameter(name).detach()
        rows = to_rows(weight, axis)
        layers[name] = PrunedLayer(
            rows,
            LayerStats.none(),
            TWO_FOUR,
            axis,
            weight.shape,
            LayerResult(project(rows, TWO_FOUR)),
        )
    inputs = [torch.randn(3, 4, 5, 5) for _ in range(2)]
    block = BlockPair(module, dense, layers, inputs, None, lambda block, number, x: block(x))
    weights = {name: dense.get_parameter(name) for name in layers}
    expected = gradients_one_by_one(
        weights,
        lambda x: mse_loss(dense(x), module(x).detach()),
        [x[i : i + 1] for x in inputs for i in range(3)],
    )
    for parameter in (*dense.parameters(), *module.parameters()):
        parameter.requires_grad_(False)
    got, _ = squared_gradients(block, units(block, "block")[0])
    for name, layer in layers.items():
        torch.testing.assert_close(
            got[name], to_rows(expected[name], layer.axis), rtol=1e-3, atol=1e-7
        )


@pytest.mark.parametrize("updated", [False, True])
def test_what_stays_keeps_its_value_and_what_grows_is_dense(updated):
    block = llama_block(0, updated)
    done = refine(block, LlmBarber(share=0.5))
    moved = 0
    for name, layer in block.layers.items():
        result = done.layers[name]
        assert mask_follows(result.mask, layer.pattern)
        stayed, grown = result.mask & layer.result.mask, result.mask & ~layer.result.mask
        moved += int(grown.sum())
        if not updated:
            assert result.weight is None
            continue
        assert torch.equal(result.weight[stayed], layer.result.weight[stayed])
        assert torch.equal(result.weight[grown], layer.dense[grown])
    assert moved == sum(unit.swaps for unit in done.facts.units) > 0 and not done.others


def test_a_half_that_is_still_dense_in_effect_stays_as_it_is():
    """No error, no gradient, no gain."""
    block = llama_block(0)
    for name in block.layers:
        block.module.get_parameter(name).data.copy_(block.dense.get_parameter(name))
    squares, loss = squared_gradients(block, units(block, "half")[0])
    assert loss == 0 and all((square == 0).all() for square in squares.values())


# --- the whole stage
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method,pattern", [("wanda", "2:4"), ("sparsegpt", "2:8")])
def test_end_to_end_and_resume(method, pattern, llama_dir, texts, tmp_path):
    plain = spec(texts, method, pattern=pattern)
    rebuilt = validate(
        Prune, {**plain.model_dump(), "refine": [{"name": "llm-barber", "share": 0.5}]}
    )
    before, whole = (
        prune(str(llama_dir), plain, tmp_path / "plain"),
        prune(str(llama_dir), rebuilt, tmp_path / "whole"),
    )
    masks = [MaskSet.load(run / "masks.safetensors").masks for run in (before, whole)]
    changed = [
        name
        for name in masks[0]
        if not torch.equal(masks[0][name].unpack(), masks[1][name].unpack())
    ]
    assert len(changed) > 10
    if method == "wanda":
        dense, state = (
            load_file(folder / "model.safetensors") for folder in (llama_dir, whole / "model")
        )
        assert all(
            torch.equal(state[name], mask.apply(dense[name])) for name, mask in masks[1].items()
        )
    told = whole.read_json("refinements.json")
    assert [row["block"] for row in told] == [0, 1] and all(row["unit 1"]["swaps"] for row in told)
    with pytest.raises(Stop):
        prune(str(llama_dir), rebuilt, tmp_path / "broken", progress=stop_at(1))
    resumed = prune(str(llama_dir), rebuilt, tmp_path / "broken")
    assert mask_bytes(resumed) == mask_bytes(whole)
    assert (resumed / "model/model.safetensors").read_bytes() == (
        whole / "model/model.safetensors"
    ).read_bytes()


def test_bf16_stream_and_transposed_weights(texts, tmp_path):
    folder = pico.save(pico.gpt2(), tmp_path / "gpt2")
    wanted = spec(texts, "magnitude", compute="bf16", refine=[{"name": "llm-barber", "share": 0.5}])
    run = prune(str(folder), wanted, tmp_path / "run")
    assert all(
        row["unit 0"]["swaps"] and row["unit 1"]["swaps"]
        for row in run.read_json("refinements.json")
    )


@pytest.mark.parametrize("name", ["llm-barber", "refit"])
def test_a_refinement_is_not_a_method(name):
    with pytest.raises(UsageError) as caught:
        validate(Prune, {"method": name})
    assert f"'{name}' refines a mask; type --method wanda --refine {name}" in caught.value.message


def test_an_empty_half_is_left_out():
    block = llama_block(0)
    some = {name: layer for name, layer in block.layers.items() if "mlp" in name}
    squares, loss = squared_gradients(
        BlockPair(block.module, block.dense, some, block.inputs, None, block.run),
        SimpleNamespace(parameters=["self_attn.q_proj.weight"], forward=block.run),
    )
    assert squares == {} and loss == 0
