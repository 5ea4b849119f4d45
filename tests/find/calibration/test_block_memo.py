"""What a block has put out before is not computed again, and everything comes out the same bits."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertModel, MixtralConfig

from nmsparse_deploy.find.calibration.block_walk import BlockWalk
from nmsparse_deploy.find.plan.make_plan import by_fusion, make_plan
from nmsparse_deploy.models.discovery import discover
from nmsparse_deploy.pattern import TWO_FOUR
from tests.find.calibration.test_block_walk import BATCHES, IDS, MODELS, SMALL
from tests.fixtures import pico

PLENTY = 1 << 40
FAMILIES = {
    **MODELS,
    "mixtral": lambda: AutoModelForCausalLM.from_config(
        MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=4)
    ).eval(),
    "bert": lambda: BertModel(BertConfig(**SMALL)).eval(),
}


@torch.no_grad()
def walked(module, spare, batches=BATCHES, dtype=torch.float32):
    """Halve every target, group by group, as a sequential recipe would; return all statistics and
    the stream's end."""
    batches = [
        {k: v for k, v in batch.items() if k != "use_cache" or hasattr(module, "lm_head")}
        for batch in batches
    ]
    found = discover(module, {"input_ids": IDS[:2]})
    plan = make_plan(found, TWO_FOUR)
    walk = BlockWalk(module, found.blocks, batches, dtype, both=True, spare=spare)
    seen = []
    for number in range(len(found.blocks)):
        done: dict[str, torch.Tensor] = {}
        groups = list(by_fusion(plan.pruned(number)).values())
        for place, rows in enumerate(groups):
            targets = [row.target for row in rows]
            stats = walk.statistics(number, targets, "gram", done, last=place == len(groups) - 1)
            seen += [
                value
                for entry in stats.values()
                for value in (entry.gram, entry.cross, entry.drift, entry.wanted)
            ]
            done |= {t.name: module.get_parameter(t.name).detach() / 2 for t in targets}
        for name, weight in done.items():
            module.get_parameter(name).copy_(weight)
        walk.advance(number)
    return [*seen, *walk.hidden, *walk.dense], walk


def same(mine, theirs):
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spare", [PLENTY, 20_000])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_bits_with_and_without(name, spare, dtype):
    torch.manual_seed(0)
    first = FAMILIES[name]()
    torch.manual_seed(0)
    plain, _ = walked(first, 0, dtype=dtype)
    torch.manual_seed(0)
    remembered, walk = walked(FAMILIES[name](), spare, dtype=dtype)
    same(remembered, plain)
    assert walk._stream.memo.budget == spare // 2  # it was never distrusted


def test_every_layer_is_computed_once_a_stream():
    """Seen from inside, after the first block, which is compared: the dense and the pruned stream
    take each batch through each layer once; a pass or two more find out how the model is wired."""
    module, calls = pico.llama(), {}
    for path, layer in module.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(
                lambda *_, path=path: calls.update({path: calls.get(path, 0) + 1})
            )

    def count(spare):
        calls.clear()
        walked(module, spare)
        return dict(calls)

    often, once = count(0), count(PLENTY)
    block = "model.layers.1."
    for path in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        assert once[block + path] <= 2 * len(BATCHES) + 2
        assert often[block + path] >= 3 * len(BATCHES)


class Moody(torch.nn.Linear):
    """A layer whose output depends on how often it was called."""

    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return super().forward(x) * (1 + type(self).calls % 7)


def test_a_block_that_is_no_function_of_its_inputs_is_computed_each_time():
    module = pico.llama()
    layer = module.model.layers[0].self_attn.q_proj
    layer.__class__ = Moody
    _, walk = walked(module, PLENTY)
    assert walk._stream.memo.budget == 0 and walk._dense.memo.budget == 0


class InPlace(torch.nn.Module):
    """Attention whose output is changed after it was put out."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **named):
        output, *rest = self.inner(*args, **named)
        output *= 2
        return (output, *rest)


def test_outputs_that_are_changed_in_place():
    results = []
    for spare in (0, PLENTY):
        module = pico.llama()
        for layer in module.model.layers:
            layer.self_attn = InPlace(layer.self_attn)
        results.append(walked(module, spare)[0])
    same(*results)
