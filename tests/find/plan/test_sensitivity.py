"""Sensitivities: trying a group out equals doing it by hand, and Hutchinson's estimate equals the
trace."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel

from nmsparse_deploy.find.calibration.suffix_replay import SuffixReplay
from nmsparse_deploy.find.methods.base import Method
from nmsparse_deploy.find.plan.make_plan import make_plan
from nmsparse_deploy.find.plan.sensitivity import (
    HessianTrace,
    _quadratic_forms,
    direct,
    from_curvature,
    hutchinson,
    together,
)
from nmsparse_deploy.find.plan.stage import fusion_groups
from nmsparse_deploy.masks import project
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.models.objective import Objective, objective
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.registry import ADAPTERS
from tests.fixtures import pico

WANDA = Method.load("wanda")


def bert(head: bool) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=pico.VOCABULARY,
        max_position_embeddings=64,
    )
    return (BertForMaskedLM if head else BertModel)(config).eval()


def loaded(name: str) -> LoadedModel:
    made = {
        "llama": lambda: pico.llama(num_hidden_layers=3),
        "gpt2": pico.gpt2,
        "bert": lambda: bert(False),
        "bert-mlm": lambda: bert(True),
    }[name]()
    return LoadedModel(
        made,
        name,
        name,
        "encoder" if name.startswith("bert") else "llm",
        ADAPTERS.load("transformers"),
    )


def sample(model: LoadedModel, samples: int = 5, length: int = 24) -> list[dict]:
    ids = torch.randint(0, 250, (samples, length), generator=torch.Generator().manual_seed(3))
    mask = {"attention_mask": torch.ones_like(ids)} if model.family == "encoder" else {}
    return model.batches({"input_ids": ids, **mask}, 2)  # the last batch is a single sample


def by_hand(model: LoadedModel, batches: list[dict], names: list[tuple[str, str, int]]) -> float:
    """Mean rise of the loss with a Wanda mask on `names`, from whole passes of a copy and the
    library's own loss."""
    module = copy.deepcopy(model.module)
    norms = {}
    handles = [
        module.get_submodule(path).register_forward_pre_hook(
            lambda m, args, path=path: norms.__setitem__(
                path, norms.get(path, 0) + args[0].flatten(0, -2).pow(2).sum(0)
            )
        )
        for _, path, _ in names
    ]
    with torch.no_grad():
        dense = [module(**batch) for batch in batches]
        for handle in handles:
            handle.remove()
        for name, path, axis in names:
            weight = module.get_parameter(name)
            scale = norms[path].sqrt().unsqueeze(1 - axis)
            weight.mul_(project(weight.abs() * scale, TWO_FOUR, axis))
        after = [module(**batch) for batch in batches]
    losses = []
    for batch, one, two in zip(batches, dense, after):
        for i in range(len(batch["input_ids"])):
            if model.family == "llm":
                ids = batch["input_ids"][i]
                pair = [nn.functional.cross_entropy(o.logits[i, :-1], ids[1:]) for o in (one, two)]
                losses.append(float(pair[1] - pair[0]))
            elif hasattr(one, "logits"):
                p, q = one.logits[i].softmax(-1), two.logits[i].softmax(-1)
                losses.append(float((p * (p.log() - q.log())).sum(-1).mean()))
            else:
                h = one.last_hidden_state[i]
                losses.append(float((two.last_hidden_state[i] - h).pow(2).sum() / h.pow(2).sum()))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "bert-mlm"])
def test_direct_equals_brute_force(name):
    model = loaded(name)
    batches = sample(model)
    plan = make_plan(model.discover(), TWO_FOUR)
    parts = fusion_groups(plan)
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    measure = objective(model, model.module(**batches[0]))
    found = direct(model, plan.blocks, parts, batches, measure, WANDA)
    wanted = [
        by_hand(model, batches, [(r.target.name, r.target.module, r.target.axis) for r in part])
        for part in parts
    ]
    assert [rise.mean for rise in found] == pytest.approx(wanted, rel=2e-3, abs=2e-6)
    assert len({round(rise.mean, 9) for rise in found}) == len(parts)
    assert all(torch.equal(value, before[key]) for key, value in model.module.state_dict().items())
    whole = together(model, plan.blocks, plan.pruned(), batches, measure, WANDA)
    names = [(r.target.name, r.target.module, r.target.axis) for r in plan.pruned()]
    assert whole.mean == pytest.approx(by_hand(model, batches, names), rel=2e-3, abs=2e-6)
    assert all(torch.equal(value, before[key]) for key, value in model.module.state_dict().items())


def test_single_targets_can_be_tried_too():
    model = loaded("llama")
    batches = sample(model)
    plan = make_plan(model.discover(), TWO_FOUR)
    found = direct(
        model,
        plan.blocks,
        [[row] for row in plan.pruned(1)],
        batches,
        Objective("cross-entropy"),
        WANDA,
    )
    for row, rise in zip(plan.pruned(1), found):
        wanted = by_hand(model, batches, [(row.target.name, row.target.module, row.target.axis)])
        assert rise.mean == pytest.approx(wanted, rel=2e-3, abs=2e-6)


class Skipping(nn.Module):
    """Three blocks, the last of which also reads what the first returned."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.skip = skip
        self.calls: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.blocks[0](x)
        second = self.blocks[1](first)
        return self.blocks[2](second + first if self.skip else second)


@pytest.mark.parametrize("skip", [False, True])
def test_passes_start_at_the_block_only_where_that_is_the_same(skip):
    module = Skipping(skip)
    batches = [{"x": torch.randn(2, 8)}, {"x": torch.randn(3, 8)}]
    tail = SuffixReplay(
        module, ("blocks.0", "blocks.1", "blocks.2"), batches, lambda number, output: output
    )
    assert tail.resumes is not skip
    ran = []
    for index, block in enumerate(module.blocks):
        block[0].register_forward_hook(lambda *_, index=index: ran.append(index))
    for start in range(3):
        with torch.no_grad():
            module.blocks[start][0].weight.mul_(0.5)
            wanted = [module(**batch) for batch in batches]
            ran.clear()
            assert all(torch.equal(a, b) for a, b in zip(tail.run(), wanted))
            assert (min(ran) == start) or skip
            module.blocks[start][0].weight.mul_(2)
        tail.advance()
    assert all("forward" not in vars(block) for block in module.blocks)


class Linear(nn.Module):
    """`y = x Wᵀ`: the squared relative error is quadratic in W, with a Hessian that can be written
    down."""

    num_classes = 0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(6, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def exact_mean_trace(module: Linear, x: torch.Tensor) -> float:
    """`H = 2 x xᵀ / ‖h‖²` for each of the 5 rows of W."""
    h = module(x).detach()
    return float(
        (2 * x.square().sum(1) / h.square().sum(1)).mean() * 5 / module.layer.weight.numel()
    )


def test_hutchinson_equals_the_trace_of_a_quadratic():
    module = Linear()
    model = LoadedModel(module, "", "", "vision", ADAPTERS.load("timm"))
    x = torch.randn(7, 6)
    measure = objective(model, module(x))
    assert measure.kind == "hidden"
    batches = [{"x": x[:4]}, {"x": x[4:]}]
    found = hutchinson(model, ["layer.weight"], batches, measure, probes=400, seed=0)[
        "layer.weight"
    ]
    exact = exact_mean_trace(module, x)
    assert (
        abs(found.mean - exact) < 4 * found.error and found.error < 0.1 * exact and found.size == 30
    )
    # A diagonal Hessian leaves Rademacher probes no variance at all.
    x = torch.eye(6)
    one = hutchinson(model, ["layer.weight"], [{"x": x}], measure, probes=2, seed=0)["layer.weight"]
    assert one.mean == pytest.approx(exact_mean_trace(module, x), rel=1e-5) and one.error < 1e-6


def test_quadratic_forms_are_those_of_the_exact_hessian_of_a_language_model():
    """Through fused attention: unit vectors in place of random signs read out the diagonal, several
    weights at once the cross terms."""
    model = LoadedModel(
        pico.llama(hidden_size=8, intermediate_size=16, num_attention_heads=2),
        "",
        "",
        "llm",
        ADAPTERS.load("transformers"),
    )
    for number, parameter in enumerate(model.module.parameters()):
        torch.nn.init.normal_(parameter, std=0.4, generator=torch.Generator().manual_seed(number))
    batches = sample(model, 2, 8)
    measure = Objective("cross-entropy")
    name = "model.layers.1.self_attn.k_proj.weight"
    weight = model.module.get_parameter(name)

    def loss(w: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [
                measure.loss(torch.func.functional_call(model.module, {name: w}, (), batch), batch)
                for batch in batches
            ]
        ).mean()

    model.module.set_attn_implementation("eager")
    exact = torch.autograd.functional.hessian(loss, weight.detach()).view(weight.numel(), -1)
    model.module.set_attn_implementation("sdpa")
    units = torch.eye(weight.numel()).view(-1, *weight.shape)[::4]
    found = torch.cat(
        [_quadratic_forms(model.module, [weight], [unit], batches, measure) for unit in units]
    )
    assert torch.allclose(
        found.float(), exact.diagonal()[::4], atol=1e-3 * float(exact.abs().max())
    )
    z = torch.randn_like(weight)
    one = float(_quadratic_forms(model.module, [weight], [z], batches, measure))
    assert one == pytest.approx(float(z.flatten() @ exact @ z.flatten()), rel=1e-3)


def test_hutchinson_repeats_itself_and_leaves_the_model_alone():
    model = loaded("llama")
    batches = sample(model, 2, 12)
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"]
    model.module.lm_head.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.module.parameters()]
    told = []
    one, two, three = (
        hutchinson(
            model,
            names,
            batches,
            Objective("cross-entropy"),
            probes=2,
            seed=seed,
            progress=lambda *step: told.append(step),
        )
        for seed in (0, 0, 1)
    )
    assert one == two != three and told[-1] == ("Hutchinson probes", 1, 2)
    assert [p.requires_grad for p in model.module.parameters()] == flags
    assert all(p.grad is None for p in model.module.parameters())


def test_curvature_times_damage():
    model = loaded("llama")
    batches = sample(model, 2, 12)
    plan = make_plan(model.discover(), TWO_FOUR)
    parts = fusion_groups(plan)
    traces = {
        row.target.name: HessianTrace(float(i + 1), 0.5, 1) for i, row in enumerate(plan.pruned())
    }
    found = from_curvature(
        model,
        plan.blocks,
        parts,
        batches,
        Objective("cross-entropy"),
        Method.load("magnitude"),
        traces,
    )
    for part, rise in zip(parts, found):
        wanted = 0.0
        for row in part:
            weight = model.module.get_parameter(row.target.name).detach()
            lost = weight[~project(weight.abs(), TWO_FOUR)].square().sum()
            wanted += 0.5 * traces[row.target.name].mean * float(lost)
        assert rise.mean == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("length", [9, 256, 258, 600])
def test_cross_entropy_in_pieces(length):
    logits, ids = torch.randn(2, length, 11), torch.randint(0, 11, (2, length))
    found = Objective("cross-entropy").loss(SimpleNamespace(logits=logits), {"input_ids": ids})
    wanted = [nn.functional.cross_entropy(logits[i, :-1], ids[i, 1:]) for i in range(2)]
    assert torch.allclose(found, torch.stack(wanted), rtol=1e-5)


def test_objectives_without_labels_vanish_at_the_dense_model():
    h = torch.randn(3, 4, 8)
    for kind in ("kl", "hidden"):
        measure = Objective(kind)
        assert measure.loss(h, {}, h).abs().max() < 1e-6
        assert (measure.loss(h + 0.1 * torch.randn_like(h), {}, h) > 0).all()
