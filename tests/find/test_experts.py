"""Mixtures of experts: the layout is read from the product, statistics from routed tokens, the
router stays dense."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig

from nmsparse_deploy.find.calibration.block_walk import BlockWalk
from nmsparse_deploy.find.calibration.expert_statistics import MIN_TOKENS
from nmsparse_deploy.find.methods.base import Method, relative_error
from nmsparse_deploy.find.plan.make_plan import make_plan
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.find.prune_block import prune_block
from nmsparse_deploy.masks import MaskSet, project
from nmsparse_deploy.models.base import from_rows, to_rows
from nmsparse_deploy.models.discovery import discover
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.prove.group_counter import check
from nmsparse_deploy.recipe import Prune, validate
from tests.fixtures import pico

WIDTH, EXPERTS = 8, 4


def stacked(
    layout: str, x: torch.Tensor, weight: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """Every token times the matrix of its expert, in one of the ways in which models write it
    down."""
    out = torch.zeros(len(x), WIDTH)
    order = chosen.argsort(stable=True)
    ends = torch.bincount(chosen, minlength=EXPERTS).cumsum(0).int()
    if layout.startswith("grouped"):
        out[order] = F.grouped_mm(
            x[order], weight.transpose(1, 2) if layout == "grouped out,in" else weight, offs=ends
        )
        return out
    if layout == "bmm in,out":
        routed = F.one_hot(chosen, EXPERTS).T.unsqueeze(-1) * x
        return torch.bmm(routed, weight).sum(0)
    if layout == "einsum out,in":
        return torch.einsum(
            "eti,eoi->eto", F.one_hot(chosen, EXPERTS).T.unsqueeze(-1) * x, weight
        ).sum(0)
    for expert in chosen.unique():
        mine = x[chosen == expert]
        out[chosen == expert] = {
            "linear out,in": lambda m=mine, e=expert: F.linear(m, weight[e]),
            "matmul in,out": lambda m=mine, e=expert: m @ weight[e],
            "left out,in": lambda m=mine, e=expert: (weight[e] @ m.T).T,
        }[layout]()
    return out


LAYOUTS = (
    "linear out,in",
    "matmul in,out",
    "left out,in",
    "bmm in,out",
    "einsum out,in",
    "grouped out,in",
    "grouped in,out",
)


class Experts(nn.Module):
    """Square matrices: nothing but the product tells how they lie."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH))

    def forward(self, x, chosen):
        return stacked(self.layout, x, self.weight, chosen)


class Listed(nn.ModuleList):
    """Experts as layers; those that nobody chose are not called."""

    def forward(self, x, chosen):
        out = torch.zeros_like(x)
        for number, expert in enumerate(self):
            if (chosen == number).any():
                out[chosen == number] = expert(x[chosen == number])
        return out


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.mixer = nn.Linear(WIDTH, WIDTH)
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = experts

    def forward(self, x):
        flat = (x + self.mixer(x)).reshape(-1, WIDTH)
        chosen = self.router(flat).argmax(-1)
        return x + self.experts(flat, chosen).view_as(x)


class Net(nn.Module):
    def __init__(self, make) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(make()) for _ in range(2)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def pictures(samples=8, seed=0):
    return torch.randn(samples, 64, WIDTH, generator=torch.Generator().manual_seed(seed))


def never_chosen(net: Net, expert: int) -> None:
    """Rows of the router that no token can pick."""
    with torch.no_grad():
        for block in net.blocks:
            weights = block.router.weight
            weights[expert] = weights[[e for e in range(EXPERTS) if e != expert]].mean(0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_axis_is_that_of_the_product(layout):
    net = Net(lambda: Experts(layout))
    found = discover(net, {"x": pictures(2)})
    stack = next(t for t in found.targets if t.name == "blocks.0.experts.weight")
    assert stack.axis == (2 if layout.endswith("out,in") else 1)
    assert (stack.k, stack.n, stack.outputs, stack.experts, stack.routed) == (
        WIDTH,
        EXPERTS * WIDTH,
        WIDTH,
        EXPERTS,
        True,
    )
    reasons = {s.name: s.reason for s in found.skipped}
    assert reasons["blocks.1.router.weight"] == "router of a mixture of experts"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@torch.no_grad()
def test_every_expert_is_pruned_by_its_own_tokens_along_its_own_axis(layout, method):
    """Witness: each matrix alone, on the tokens that an independent routing gives it."""
    net, x = Net(lambda: Experts(layout)), pictures()
    plan = make_plan(discover(net, {"x": x[:2]}), TWO_FOUR, include=["*experts*"])
    walk = BlockWalk(net, plan.blocks, [{"x": part} for part in x.split(2)])
    layer = prune_block(
        net, plan, 0, validate(Prune, {"method": method}), Method.load(method), walk
    ).layers["blocks.0.experts.weight"]
    mask = from_rows(layer.result.mask, layer.shape, layer.axis)
    assert check(mask.float(), TWO_FOUR, layer.axis).bad == 0
    assert check(mask.float(), TWO_FOUR, 3 - layer.axis).bad > 0
    block = net.blocks[0]
    flat = (x + block.mixer(x)).reshape(-1, WIDTH)
    chosen = block.router(flat).argmax(-1)
    lost = kept = 0.0
    for expert in range(EXPERTS):
        mine, weight = flat[chosen == expert], block.experts.weight[expert]
        rows = weight if layer.axis == 2 else weight.T
        own = layer.stats.experts[expert]
        assert own.tokens == len(mine) > MIN_TOKENS
        got = layer.matrices()[expert]
        if method == "wanda":
            assert torch.equal(
                got.result.mask, project(rows.abs() * mine.square().mean(0).sqrt(), TWO_FOUR)
            )
        else:
            torch.testing.assert_close(own.gram, mine.T @ mine)
            lost += float(((mine @ (rows - got.weight).T) ** 2).sum())
            kept += float(((mine @ rows.T) ** 2).sum())
    if method == "sparsegpt":
        assert layer.error(layer.weight) == pytest.approx(lost / kept, rel=1e-3)


def test_unreached_experts_of_a_stack_are_pruned_by_magnitude_and_the_record_says_so(tmp_path):
    net, x = Net(lambda: Experts("linear out,in")), pictures()
    never_chosen(net, 2)
    plan = make_plan(discover(net, {"x": x[:2]}), TWO_FOUR, include=["*experts*"])
    for method in ("wanda", "sparsegpt"):
        walk = BlockWalk(net, plan.blocks, [{"x": x}], both=True)
        spec = validate(Prune, {"method": method, "refine": [{"name": "refit"}]})
        layer = prune_block(net, plan, 0, spec, Method.load(method), walk).layers[
            "blocks.0.experts.weight"
        ]
        told = layer.stats.expert_tokens()
        assert (
            told.by_magnitude == (2,)
            and told.tokens[2] == 0
            and sum(told.tokens) == x.numel() // WIDTH
        )
        dense, part = net.blocks[0].experts.weight[2].detach(), layer.matrices()[2]
        assert torch.equal(part.result.mask, project(dense.abs(), TWO_FOUR))
        torch.testing.assert_close(part.weight, torch.where(part.result.mask, dense, 0.0))


def test_listed_experts():
    """Layers that no token reached in the trial are targets as their siblings are, in groups of
    their own."""
    net, x = Net(lambda: Listed([Gated() for _ in range(EXPERTS)])), pictures()
    never_chosen(net, 1)
    found = discover(net, {"x": x[:2]})
    targets = {t.name: t for t in found.targets if t.block == 0}
    assert len(targets) == 1 + 3 * EXPERTS and all(
        t.routed for n, t in targets.items() if "experts" in n
    )
    for expert in range(EXPERTS):
        prefix = f"blocks.0.experts.{expert}"
        assert (
            targets[f"{prefix}.up.weight"].fusion
            == targets[f"{prefix}.gate.weight"].fusion
            == f"{prefix}.gate"
        )
    assert {s.reason for s in found.skipped} == {"router of a mixture of experts"}
    plan = make_plan(found, TWO_FOUR)
    walk = BlockWalk(net, found.blocks, [{"x": x}])
    pruned = prune_block(net, plan, 0, Prune(method="wanda"), Method.load("wanda"), walk)
    for name, layer in pruned.layers.items():
        never = ".1." in name
        assert layer.stats.white == never == bool(layer.stats.expert_tokens())
        if never:
            assert torch.equal(layer.result.mask, project(layer.dense.abs(), TWO_FOUR))
    used = [
        layer.stats.tokens for name, layer in pruned.layers.items() if name.endswith("down.weight")
    ]
    assert sum(used) == x.numel() // WIDTH


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": pico.VOCABULARY,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 256,
}


@pytest.mark.parametrize(("config", "axes"), [(MixtralConfig, (2, 2)), (GptOssConfig, (1, 1))])
def test_both_layouts_of_the_library_through_a_whole_run(config, axes, texts, tmp_path):
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config(**SMALL))
    found = discover(module, {"input_ids": torch.arange(32).view(2, 16)})
    stacks = [t for t in found.targets if t.experts > 1 and t.block == 0]
    assert tuple(t.axis for t in stacks) == axes and {t.experts for t in stacks} == {4}
    folder = pico.save(module, tmp_path / "model")
    calibration = {"data": str(texts["calibration"]), "samples": 4, "length": 32, "batch": 2}
    run = prune(
        str(folder),
        validate(
            Prune,
            {
                "method": "sparsegpt",
                "calibration": calibration,
                "compute": "fp32",
                "refine": [{"name": "refit"}],
            },
        ),
        tmp_path / "run",
    )
    masks = MaskSet.load(run / "masks.safetensors").masks
    saved = AutoModelForCausalLM.from_pretrained(run / "model")
    for target in stacks:
        weight, mask = saved.get_parameter(target.name), masks[target.name]
        assert mask.shape == tuple(weight.shape) and not (weight[~mask.unpack()] != 0).any()
        for expert in range(4):
            assert check(weight[expert], TWO_FOUR, target.axis - 1).bad == 0
    rows = {row["name"]: row for row in json.loads((run / "layers.json").read_text())}
    reached = rows[stacks[0].name]["experts"]["tokens"]
    assert sum(reached) == 4 * 32 * 2 and 0 < rows[stacks[0].name]["relative_error"] < 1
    assert run.manifest().stages["prune"].experts_by_magnitude.of == 16


def test_rows_of_a_stack_and_back():
    for axis in (1, 2):
        weight = torch.randn(3, 4, 8)
        rows = to_rows(weight, axis)
        assert rows.shape == (96 // weight.shape[axis], weight.shape[axis])
        assert torch.equal(from_rows(rows, weight.shape, axis), weight)
        assert torch.equal(rows[: len(rows) // 3], weight[0] if axis == 2 else weight[0].T)


def test_the_error_of_one_matrix_is_unchanged_by_the_sum_over_several():
    weight, gram = torch.randn(4, 8), torch.randn(8, 8)
    gram = gram @ gram.T
    pruned = weight * (torch.rand_like(weight) > 0.5)
    energy = float(
        (((weight - pruned) @ gram) * (weight - pruned)).sum() / ((weight @ gram) * weight).sum()
    )
    assert relative_error(weight, pruned, gram) == pytest.approx(energy, rel=1e-5)
