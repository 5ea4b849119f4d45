"""Channel permutation: found by asking the block, searched by swaps, carried by the run."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    Dinov2Config,
    Dinov2Model,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    ViTConfig,
    ViTModel,
)

import nmsparse_deploy as nms
from nmsparse_deploy.errors import CheckFailed, UsageError
from nmsparse_deploy.find.calibration.block_walk import BlockWalk
from nmsparse_deploy.find.calibration.layer_stats import LayerStats
from nmsparse_deploy.find.plan.make_plan import make_plan
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.find.refine.permute import permute, retained, search
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.models.base import to_rows
from nmsparse_deploy.models.discovery import discover
from nmsparse_deploy.models.permutable_channels import find_permutable_channels
from nmsparse_deploy.models.permutations import Permutations
from nmsparse_deploy.pattern import TWO_FOUR, NMPattern
from nmsparse_deploy.prove.group_counter import check
from nmsparse_deploy.recipe import Evaluate, Prune, fingerprint, validate
from nmsparse_deploy.runs.load import load_dense, load_pruned
from tests.find.test_prune import Stop, mask_bytes, spec, stop_at
from tests.fixtures import pico

PATTERNS = [TWO_FOUR, NMPattern(1, 4), NMPattern(4, 8), NMPattern(2, 8), NMPattern(3, 5)]


# --- the search
# ------------------------------------------------------------------------------------------------------


def best_by_brute_force(scores: torch.Tensor, pattern: NMPattern, order) -> float:
    """Independent of the shared projection: all subsets of every group."""
    total = 0.0
    for group in torch.as_tensor(order).split(pattern.group):
        for row in scores[group].T.tolist():
            total += max(sum(kept) for kept in combinations(row, pattern.keep))
    return total


@given(st.integers(0, 2**31), st.sampled_from(PATTERNS), st.integers(1, 3), st.integers(1, 5))
def test_search_permutes_inside_segments_and_never_keeps_less(seed, pattern, segments, groups):
    generator = torch.Generator().manual_seed(seed)
    length = groups * pattern.group
    scores = torch.rand(segments * length, 6, generator=generator).pow(3)
    found = search(scores, segments, pattern, rounds=20)
    assert torch.equal(found.order.sort(1).values, torch.arange(length).repeat(segments, 1))
    order = (found.order + torch.arange(segments).unsqueeze(1) * length).flatten()
    assert found.after == pytest.approx(best_by_brute_force(scores, pattern, order), rel=1e-5)
    assert found.before == pytest.approx(
        best_by_brute_force(scores, pattern, range(len(scores))), rel=1e-5
    )
    assert found.after >= found.before
    again = search(scores, segments, pattern, rounds=20)
    assert torch.equal(again.order, found.order)


@given(st.integers(0, 2**31))
def test_two_groups_reach_an_order_that_no_swap_improves(seed):
    """Every swap is priced: what is left is a local optimum by brute force, and near the best of
    all splits."""
    scores = torch.rand(8, 5, generator=torch.Generator().manual_seed(seed))
    found = search(scores, 1, TWO_FOUR)
    order = found.order[0].tolist()
    for i in range(4):
        for j in range(4, 8):
            swapped = order.copy()
            swapped[i], swapped[j] = order[j], order[i]
            assert best_by_brute_force(scores, TWO_FOUR, swapped) <= found.after * (1 + 1e-5)
    best = max(
        best_by_brute_force(scores, TWO_FOUR, [*c, *(i for i in range(8) if i not in c)])
        for c in combinations(range(8), 4)
    )
    assert found.after >= 0.95 * best


def test_channels_that_crowd_one_group_are_dealt_out():
    """Four strong channels in one of four groups: two would be lost, and no order needs to lose
    any."""
    scores = torch.full((16, 3), 0.1)
    scores[:4] = 1.0
    assert search(scores, 1, TWO_FOUR).after == pytest.approx(3 * (4 + 4 * 0.1))


def test_where_nothing_can_be_won_nothing_moves():
    """Equal scores, zeros, and a single group leave the order alone."""
    for scores in (torch.ones(16, 3), torch.zeros(16, 3), torch.rand(4, 3)):
        found = search(scores, 1, TWO_FOUR)
        assert (
            torch.equal(found.order, torch.arange(len(scores)).unsqueeze(0))
            and found.after == found.before
        )


def test_a_good_share_of_the_gap_to_no_groups_at_all_is_closed():
    """Random magnitudes, 128 channels, 64 rows: published searches close about a third of it."""
    scores = torch.randn(128, 64, generator=torch.Generator().manual_seed(0)).abs()
    free = float(scores.topk(64, dim=0).values.sum())
    found = search(scores, 1, TWO_FOUR)
    assert found.after - found.before > 0.33 * (free - found.before)


def test_moved_statistics_are_those_of_moved_inputs():
    x, dense = torch.randn(64, 8), torch.randn(64, 8)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))

    def stats(a, b):
        return LayerStats(64, a.square().sum(0), a.T @ a, b.T @ a, a.sum(0))

    got, wanted = stats(x, dense).reordered(order), stats(x[:, order], dense[:, order])
    for name in ("square_sum", "gram", "cross", "total"):
        torch.testing.assert_close(getattr(got, name), getattr(wanted, name))


# --- the spaces
# ------------------------------------------------------------------------------------------------------


def tokens() -> dict:
    return {"input_ids": torch.arange(32).view(2, 16)}


def pixels(name: str = "pixel_values") -> dict:
    return {name: torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


def decoder(module) -> tuple[nn.Module, dict]:
    return module.eval(), {**tokens(), "use_cache": False}


SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}


def opt():
    return decoder(
        OPTForCausalLM(
            OPTConfig(
                **SMALL,
                ffn_dim=64,
                vocab_size=260,
                max_position_embeddings=64,
                word_embed_proj_dim=32,
            )
        )
    )


def bert():
    config = BertConfig(**SMALL, intermediate_size=64, vocab_size=260, max_position_embeddings=64)
    return BertModel(config).eval(), tokens() | {
        "attention_mask": torch.ones(2, 16, dtype=torch.long)
    }


def vit():
    return ViTModel(
        ViTConfig(**SMALL, intermediate_size=64, image_size=32, patch_size=8)
    ).eval(), pixels()


def dinov2():
    return Dinov2Model(
        Dinov2Config(**SMALL, mlp_ratio=2, image_size=32, patch_size=8)
    ).eval(), pixels()


def phi3():
    """Query, key and value in one matrix, gate and up in another, grouped heads."""
    return decoder(
        Phi3ForCausalLM(
            Phi3Config(
                **SMALL | {"num_key_value_heads": 2},
                intermediate_size=48,
                vocab_size=260,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=1,
            )
        )
    )


def bloom():
    """Query, key and value interleaved head by head."""
    return decoder(
        BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=260))
    )


def timm_vit():
    timm = pytest.importorskip("timm")
    return timm.create_model(
        "vit_tiny_patch16_224",
        depth=2,
        embed_dim=64,
        num_heads=2,
        img_size=32,
        patch_size=8,
        num_classes=0,
    ).eval(), pixels("x")


FAMILIES = {  # (copies, segments, length) and the first value row of each segment, for attention and for the MLP
    "llama": (
        lambda: decoder(pico.llama()),
        {"o_proj": ((2, 2, 16), [0, 16]), "down_proj": ((1, 1, 128), [0])},
    ),
    "gpt2": (
        lambda: decoder(pico.gpt2()),
        {"attn.c_proj": ((1, 2, 16), [64, 80]), "mlp.c_proj": ((1, 1, 128), [0])},
    ),
    "opt": (opt, {"out_proj": ((1, 4, 8), [0, 8, 16, 24]), "fc2": ((1, 1, 64), [0])}),
    "bert": (
        bert,
        {"attention.output.dense": ((1, 4, 8), [0, 8, 16, 24]), "output.dense": ((1, 1, 64), [0])},
    ),
    "vit": (vit, {"o_proj": ((1, 4, 8), [0, 8, 16, 24]), "fc2": ((1, 1, 64), [0])}),
    "dinov2": (dinov2, {"o_proj": ((1, 4, 8), [0, 8, 16, 24]), "fc2": ((1, 1, 64), [0])}),
    "phi3": (phi3, {"o_proj": ((2, 2, 8), [48, 56]), "down_proj": ((1, 1, 48), [0])}),
    "bloom": (
        bloom,
        {"attention.dense": ((1, 4, 8), [16, 40, 64, 88]), "4h_to_h": ((1, 1, 128), [0])},
    ),
    "timm": (timm_vit, {"attn.proj": ((1, 2, 32), [128, 160]), "mlp.fc2": ((1, 1, 256), [0])}),
}


def probe(module: nn.Module, inputs: dict, number: int = 0):
    """What `find_permutable_channels` is asked with: block, run, input, readers."""
    found = discover(module, inputs)
    walk = BlockWalk(module, found.blocks, [inputs])
    prefix, readers = found.blocks[number] + ".", {}
    for target in found.of_block(number):
        readers.setdefault(target.fusion, []).append(target.module.removeprefix(prefix))
    return (
        module.get_submodule(found.blocks[number]),
        lambda block, x: walk.run(block, number, 0, x),
        walk.hidden[0],
        list(readers.values()),
    )


def matrix(module: nn.Module, number: int, plan) -> dict[str, torch.Tensor]:
    return {
        row.target.name: to_rows(
            module.get_parameter(row.target.name).detach(), row.target.axis
        ).clone()
        for row in plan.pruned(number)
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_permuting_every_block_leaves_the_model_as_it_was(family):
    """Property 15, on the whole model: the same outputs, nothing kept less, the expected sites and
    nothing else."""
    build, expected = FAMILIES[family]
    torch.manual_seed(0)
    module, inputs = build()
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):  # zeros would hide a bias left behind
            nn.init.normal_(parameter, std=0.1)
        elif (
            parameter.ndim == 2
        ):  # far from the tiny initial weights, where every attention is flat
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    found = discover(module, inputs)
    plan, walk = make_plan(found, TWO_FOUR), BlockWalk(module, found.blocks, [inputs])
    with torch.no_grad():
        before = module(**inputs)
        for number, path in enumerate(found.blocks):
            old = matrix(module, number, plan)
            stats = {
                row.target.fusion: LayerStats(1, torch.rand(row.target.k))
                for row in plan.pruned(number)
            }
            done = permute(
                module,
                path,
                plan.pruned(number),
                stats,
                lambda block, x, number=number: walk.run(block, number, 0, x),
                walk.hidden[0],
            )
            spaces = {space.consumers[0]: space for space in done.facts.spaces}
            assert len(spaces) == len(expected)
            new = matrix(module, number, plan)
            for name, space in spaces.items():
                shape, _ = next(
                    value for key, value in expected.items() if name.endswith(key + ".weight")
                )
                assert (space.copies, space.segments, space.length) == shape
                fusion = next(
                    row.target.fusion for row in plan.pruned(number) if row.target.name == name
                )
                kept = [
                    retained((w[name].abs() * s[fusion].rms).T.contiguous(), TWO_FOUR)
                    for w, s in ((old, stats), (new, done.stats))
                ]
                assert kept[1] > kept[0] and [space.before, space.after] == pytest.approx(
                    kept, rel=1e-5
                )
        after = module(**inputs)
    first, second = (out if isinstance(out, torch.Tensor) else out[0] for out in (before, after))
    assert (first - second).norm() <= 1e-5 * first.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_sides_of_a_space_are_found_where_they_are(family):
    build, expected = FAMILIES[family]
    torch.manual_seed(0)
    spaces, reasons = find_permutable_channels(*probe(*build()))
    for space in spaces:
        name = space.consumers[0].parameter
        _, firsts = next(value for key, value in expected.items() if name.endswith(key + ".weight"))
        assert space.producers[0].places[0, :, 0].tolist() == firsts
    assert len(reasons) == 2 and any("one by one" in reason for reason in reasons.values())


def test_siblings_get_the_same_permutation():
    """Gate and up; every query head of a group; the weight and the bias of one layer."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    attention, mlp = find_permutable_channels(*probe(*decoder(pico.llama())))[0]
    order = torch.randperm(128, generator=generator)
    orders = mlp.orders(order.unsqueeze(0))
    assert all(torch.equal(found, order) for found in orders.values())
    assert {name for name, _ in orders} == {
        f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")
    }
    local = torch.rand(2, 16, generator=generator).argsort(1)
    orders = attention.orders(local)
    heads = orders["self_attn.o_proj.weight", 1].view(4, 16)
    for head in range(4):
        assert torch.equal(heads[head] - 16 * head, local[head // 2])
    torch.manual_seed(0)
    space = find_permutable_channels(*probe(*bloom()))[0][0]
    orders = {
        name.rpartition(".")[2]: order
        for (name, _), order in space.orders(
            torch.rand(4, 8, generator=generator).argsort(1)
        ).items()
        if "query_key_value" in name
    }
    assert torch.equal(orders["weight"], orders["bias"])
    moved = (orders["weight"] != torch.arange(96)).view(4, 3, 8)
    assert moved[:, 2].any() and not moved[:, :2].any()  # queries and keys stay


class Mlp(nn.Module):
    """`down(between(act(up(x))))`, with what makes channels free or not in between."""

    def __init__(self, between: nn.Module | None = None, side: bool = False) -> None:
        super().__init__()
        self.up, self.between, self.down = (
            nn.Linear(8, 16),
            between or nn.Identity(),
            nn.Linear(16, 8),
        )
        self.side = side

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.gelu(self.up(x))
        output = x + self.down(self.between(hidden))
        return output + 0.1 * hidden[..., :8] if self.side else output


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + torch.rand(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Sums(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.cumsum(-1)


class Shift(nn.Module):
    """Every channel reads its neighbour's: a permutation of its own, which is no obstacle."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.roll(1, -1)


def asked(block: nn.Module):
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    return find_permutable_channels(
        block.eval(), lambda module, x: module(x), x, [["up"], ["down"]]
    )


def test_what_stands_between_decides():
    torch.manual_seed(0)
    assert len(asked(Mlp())[0]) == 1
    (space,), _ = asked(Mlp(Shift()))
    assert torch.equal(
        space.producers[0].places[0, 0], torch.arange(16).roll(1)[space.consumers[0].places[0, 0]]
    )
    for between, why in (
        (nn.LayerNorm(16), "one by one"),
        (Sums(), "mix the outputs of 'up'"),
        (Scale(), "not interchangeable"),
        (nn.Linear(16, 16), None),
    ):
        spaces, reasons = asked(Mlp(between))
        if why is not None:
            assert not spaces and why in reasons["down"]
        assert all(space.producers[0].parameter != "up.weight" for space in spaces)


def test_a_site_whose_probe_fails_is_no_space():
    """The hidden channels are read a second time, outside any layer: only the shuffled block shows
    it."""
    torch.manual_seed(0)
    spaces, reasons = asked(Mlp(side=True))
    assert not spaces and "changes what the block computes" in reasons["down"]
    dead = Mlp()
    nn.init.zeros_(dead.down.weight)
    assert not asked(dead)[0]  # nothing could be noticed, so nothing is believed


def test_shared_weights_and_broken_heads_stay():
    torch.manual_seed(0)
    module, inputs = decoder(pico.llama())
    module.model.layers[1].mlp.up_proj.weight = module.model.layers[0].mlp.up_proj.weight
    found = discover(module, inputs)
    walk = BlockWalk(module, found.blocks, [inputs])
    rows = make_plan(found, NMPattern(8, 32), include=["*.0.*o_proj*", "*.0.*down_proj*"]).pruned(0)
    before = [p.clone() for p in module.parameters()]
    stats = {row.target.fusion: LayerStats(1, torch.ones(row.target.k)) for row in rows}
    done = permute(
        module,
        found.blocks[0],
        rows,
        stats,
        lambda block, x: walk.run(block, 0, 0, x),
        walk.hidden[0],
    )
    why = done.facts.not_free
    assert "shared with another layer" in why["model.layers.0.mlp.down_proj"]
    assert "whole groups" in why["model.layers.0.self_attn.o_proj"]  # heads of 16, groups of 32
    assert not done.orders and all(torch.equal(a, b) for a, b in zip(before, module.parameters()))


# --- the run
# ---------------------------------------------------------------------------------------------------------


def permuted(texts, method="sparsegpt", **changes) -> Prune:
    return spec(texts, method, permute=True, **changes)


def test_older_fingerprints_are_unchanged():
    assert fingerprint("m", Prune()) == fingerprint("m", validate(Prune, {"permute": False}))
    assert fingerprint("m", Prune()) != fingerprint("m", Prune(permute=True))
    assert fingerprint("demo", Prune()) == "edf1a4427d127e58"


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "wanda"},
        {"method": "magnitude"},
        {"refine": [{"name": "refit"}, {"name": "reconstruct", "epochs": 1}]},
    ],
    ids=["wanda", "magnitude", "refined"],
)
def test_end_to_end(changes, llama_dir, texts, tmp_path):
    """Verified, masks exact and bound to the permuted dense weights, the dense twin found again,
    bits resume."""
    wanted = permuted(texts, **changes)
    run = prune(str(llama_dir), wanted, tmp_path / "run")
    masks = MaskSet.load(run / "masks.safetensors")
    dense = load_dense(run).module  # raises unless every mask was found for these weights
    pruned = load_file(run / "model/model.safetensors")
    for name, mask in masks.masks.items():
        assert (
            check(pruned[name], mask.pattern, mask.axis).bad == 0
            and (pruned[name][~mask.unpack()] == 0).all()
        )
        if wanted.method != "sparsegpt":
            assert torch.equal(pruned[name], mask.apply(dense.get_parameter(name)))
    assert all(report.ok for report in nms.verify(run))
    original = pico.llama()
    ids = torch.arange(32).view(2, 16)
    with torch.no_grad():
        a, b = original(ids).logits, dense(ids).logits
    assert (a - b).norm() <= 1e-5 * a.norm()
    with pytest.raises(CheckFailed, match="other dense weights"):
        masks.check_base(dict(original.named_parameters()))
    told = [row for row in run.read_json("refinements.json") if row["name"] == "permute"]
    assert [len(row["spaces"]) for row in told] == [2, 2] and all(
        len(row["not_free"]) == 2 for row in told
    )
    assert all(space["after"] > space["before"] for row in told for space in row["spaces"])
    with pytest.raises(Stop):
        prune(str(llama_dir), wanted, tmp_path / "broken", progress=stop_at(1))
    resumed = prune(str(llama_dir), wanted, tmp_path / "broken")
    assert mask_bytes(resumed) == mask_bytes(run)
    for file in ("model/model.safetensors", "permutations.safetensors"):
        assert (resumed / file).read_bytes() == (run / file).read_bytes()


def test_producers_that_stay_dense_and_biases_move_along(texts, tmp_path):
    """Only the consumers are pruned: what the run saved is the dense model in another order,
    masked."""
    module = pico.gpt2()
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    folder = pico.save(module, tmp_path / "gpt2")
    wanted = permuted(texts, "wanda", include=["*c_proj.weight"])
    run = prune(str(folder), wanted, tmp_path / "run")
    with pytest.raises(Stop):
        prune(str(folder), wanted, tmp_path / "broken", progress=stop_at(1))
    resumed = prune(str(folder), wanted, tmp_path / "broken")
    masks = MaskSet.load(run / "masks.safetensors").masks
    dense, original = (dict(m.named_parameters()) for m in (load_dense(run).module, module))
    moved = {
        name.partition(".1.")[2] for name in dense if not torch.equal(dense[name], original[name])
    }
    assert moved - {""} == {
        "attn.c_attn.weight",
        "attn.c_attn.bias",
        "attn.c_proj.weight",
        "mlp.c_fc.weight",
        "mlp.c_fc.bias",
        "mlp.c_proj.weight",
    }
    for found in (run, resumed):
        for name, value in load_pruned(found).module.named_parameters():
            assert torch.equal(
                value, masks[name].apply(dense[name]) if name in masks else dense[name]
            )


def test_evaluate_compares_with_the_permuted_twin(llama_dir, texts, tmp_path):
    run = prune(str(llama_dir), permuted(texts, "wanda"), tmp_path / "run")
    data = nms.evaluate(
        run, Evaluate(data=str(texts["held_out"]), tokens=128, context=32, continuation=0)
    )
    plain = prune(str(llama_dir), spec(texts, "wanda"), tmp_path / "plain")
    other = nms.evaluate(
        plain, Evaluate(data=str(texts["held_out"]), tokens=128, context=32, continuation=0)
    )
    assert data["results"]["dense"]["value"] == pytest.approx(
        other["results"]["dense"]["value"], rel=1e-3
    )
    assert not (plain / "permutations.safetensors").exists()


def test_a_timm_model_through_prune_and_back(texts, tmp_path):
    timm = pytest.importorskip("timm")
    from tests.fixtures import small_vision as small

    torch.manual_seed(0)
    module = timm.create_model(
        "vit_tiny_patch16_224",
        depth=2,
        embed_dim=64,
        num_heads=2,
        img_size=32,
        patch_size=8,
        num_classes=0,
    )
    timm.models.save_for_hf(module, str(tmp_path / "tiny"), safe_serialization=True)
    data = {"data": str(small.labelled(tmp_path / "colours", 3, 1)), "samples": 4, "batch": 2}
    run = prune(
        str(tmp_path / "tiny"),
        validate(Prune, {"calibration": data, "permute": True}),
        tmp_path / "run",
    )
    dense = load_dense(run).module
    x = pixels("x")["x"]
    with torch.no_grad():
        a, b = module.eval()(x), dense(x)
    assert (a - b).norm() <= 1e-5 * a.norm() and not torch.equal(a, b)


def test_permutation_files_that_are_wrong(llama_dir, texts, tmp_path):
    run = prune(str(llama_dir), permuted(texts, "magnitude"), tmp_path / "run")
    path = run / "permutations.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(UsageError, match="damaged"):
        load_dense(run)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UsageError, match="not a permutation file"):
        load_dense(run)
    path.write_bytes(whole)
    found = Permutations.load(path)
    with pytest.raises(CheckFailed, match="does not fit"):
        found.apply(pico.llama(intermediate_size=64))
    key = next(iter(found.orders))
    with pytest.raises(CheckFailed, match="is no permutation"):
        Permutations({key: torch.zeros_like(found.orders[key])}).apply(pico.llama())
    with safe_open(path, framework="pt") as file:
        assert len(file.metadata()) == 1  # several keys are written in random order
    assert {tuple(space["consumers"]) for space in found.channels} >= {
        ("model.layers.0.mlp.down_proj.weight",)
    }
