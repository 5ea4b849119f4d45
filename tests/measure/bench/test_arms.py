"""The arms of one model: each is what it says, they share everything else, and nothing is claimed
without a kernel."""

from __future__ import annotations

import json

import pytest
import torch
from pydantic import TypeAdapter

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.masks import Mask, MaskSet, project
from nmsparse_deploy.measure.bench.arms import (
    AUTO,
    CONTROL,
    DENSE,
    PRUNED,
    SPARSE,
    arm_layers,
    bound,
    decode,
    make_arms,
    make_auto,
)
from nmsparse_deploy.measure.bench.model_arms import Job, bench_arms
from nmsparse_deploy.measure.bench.result import AmdahlBound, GpuBenchResult
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.registry import ADAPTERS
from nmsparse_deploy.ship.evidence import NOT_SPARSE
from nmsparse_deploy.ship.torch_sparse.kernel_choice import GemmDecision, Verdict
from nmsparse_deploy.ship.torch_sparse.linear import Sparse
from nmsparse_deploy.ship.torch_sparse.semi_structured import CuSparseLt, StandIn, standing_in
from nmsparse_deploy.system.gpu_clock import Machine, dry_machine
from tests.fixtures import pico


def loaded(module=None) -> LoadedModel:
    return LoadedModel(module or pico.llama(), "pico", "pico", "llm", ADAPTERS.load("transformers"))


def magnitude(model: LoadedModel) -> MaskSet:
    found = model.discover()
    return MaskSet(
        {
            one.name: Mask.pack(
                project(model.module.get_parameter(one.name).detach().abs(), TWO_FOUR, one.axis),
                one.axis,
                TWO_FOUR,
                "",
            )
            for one in found.targets
        }
    )


@pytest.fixture(scope="module", params=("llama", "gpt2"))
def made(request):
    """A model, its arm_layers and its arms on stand-in kernels."""
    model = loaded(getattr(pico, request.param)().half())
    masks = magnitude(model)
    found = arm_layers(model.module, model.discover().targets, masks.masks, "fp16")
    with standing_in(StandIn()):
        arms = make_arms(
            model.module,
            found,
            {name: mask.unpack() for name, mask in masks.masks.items()},
            "fp16",
            {},
            {},
        )
        yield model, masks, found, arms


def logits(module) -> torch.Tensor:
    with torch.inference_mode():
        return module(input_ids=torch.arange(32).view(2, 16)).logits.float()


def test_the_dense_arm_is_the_model_and_the_pruned_arms_are_the_pruned_one(made):
    model, masks, _, arms = made
    assert torch.allclose(logits(arms[DENSE]), logits(model.module), atol=0.01)
    before = {name: model.module.get_parameter(name).detach().clone() for name in masks.masks}
    try:
        for name, mask in masks.masks.items():
            model.module.get_parameter(name).data = mask.apply(before[name])
        wanted = logits(model.module)
    finally:
        for name, value in before.items():
            model.module.get_parameter(name).data = value
    assert torch.allclose(logits(arms[PRUNED]), wanted, atol=0.01) and not torch.allclose(
        logits(arms[DENSE]), wanted, atol=0.01
    )
    assert torch.allclose(logits(arms[SPARSE]), wanted, atol=0.01)


def test_the_control_has_as_many_zeros_and_no_pattern(made):
    _, _, found, arms = made
    weights = [arms[CONTROL].get_submodule(site.layer).weight for site in found]
    assert all((weight == 0).float().mean() == 0.5 for weight in weights)
    groups = torch.cat([(weight != 0).view(-1, 4).sum(-1) for weight in weights])
    assert (groups > 2).any()


def test_the_arms_share_what_they_do_not_differ_in(made):
    model, masks, _, arms = made
    for name, value in model.module.named_parameters():
        if name not in masks.masks and not name.endswith("bias"):
            assert all(arm.get_parameter(name) is value for arm in arms.values())


def test_auto_takes_each_layer_from_the_arm_that_was_decided_for(made):
    _, _, found, arms = made
    kept = {found[0].parameter, found[3].parameter}
    decisions = [
        GemmDecision(
            1, 1, "fp16", (site.parameter,), "sparse" if site.parameter in kept else "dense", ""
        )
        for site in found
    ]
    auto = make_auto(arms, found, decisions)
    for site in found:
        source = SPARSE if site.parameter in kept else PRUNED
        assert auto.get_submodule(site.layer) is arms[source].get_submodule(site.layer)


def test_a_decoding_step_can_be_repeated(made):
    _, _, _, arms = made
    ids = torch.arange(32).view(2, 16)
    step = decode({DENSE: arms[DENSE]}, ids)[DENSE]
    first, second = step().logits, step().logits
    with torch.inference_mode():
        wanted = arms[DENSE](input_ids=torch.cat((ids, ids[:, -1:]), 1)).logits[:, -1:]
    assert torch.equal(first, second) and torch.allclose(first.float(), wanted.float(), atol=0.02)


def test_amdahl_needs_the_times_at_these_rows():
    verdict = Verdict(32, 100.0, 50.0, 2.0, 1.9, 2.1)
    made = [GemmDecision(1, 1, "fp16", ("a", "b"), "sparse", "", (verdict,))]
    found = bound(made, {"a": 32, "b": 32}, 0.4)
    assert found == AmdahlBound(0.5, 2.0, pytest.approx(4 / 3))
    assert bound(made, {"a": 32, "b": 64}, 0.4) is None and bound([], {}, 0.4) is None


@pytest.fixture(scope="module", params=("fp16", "int8"))
def result(request):
    with standing_in(StandIn()):
        model = loaded()
        return bench_arms(model, magnitude(model), Job(2, 16, request.param, 5), dry_machine())


def test_a_dry_bench_walks_the_whole_way_and_claims_nothing(result):
    assert result.status == "dry run" and result.layers == 14
    assert {(phase.name, phase.replayed) for phase in result.phases} == {
        ("prefill", False),
        ("decode", False),
    }
    for phase in result.phases:
        assert {arm.name for arm in phase.arms} == {DENSE, PRUNED, SPARSE, AUTO, CONTROL}
        assert set(phase.over_pruned) == {SPARSE, AUTO} and set(phase.over_dense) == {
            PRUNED,
            SPARSE,
            AUTO,
            CONTROL,
        }
    assert result.verdict.startswith("DRY RUN") and NOT_SPARSE in result.verdict
    assert result.evidence["prefill"][SPARSE].count("observed") == 0
    assert result.evidence["prefill"][SPARSE].count("chosen") == 14
    share = 10 / 16 if result.precision == "int8" else 9 / 16
    assert result.weight_bytes[SPARSE] == share * result.weight_bytes[DENSE]
    assert {one.verdicts[0].rows for one in result.decisions["prefill"]} == {32}
    assert {one.verdicts[0].rows for one in result.decisions["decode"]} == {2}
    assert 0 < result.gemm_flop_share < 1


def test_what_is_written_is_what_is_read_back(result):
    written = json.loads(json.dumps(result.to_json()))
    assert written["evidence"]["prefill"][SPARSE]["rungs"]["chosen"]["layers"] == 14
    assert written["decisions"]["prefill"][0]["verdicts"][0]["word"] in (
        "wins",
        "loses",
        "within noise",
    )
    read = TypeAdapter(GpuBenchResult).validate_python(written)
    assert read.to_json() == TypeAdapter(GpuBenchResult).validate_python(read.to_json()).to_json()
    assert (read.decisions, read.evidence, read.phases) == (
        result.decisions,
        result.evidence,
        result.phases,
    )


def test_a_graph_that_cannot_be_recorded_is_told_and_the_rest_stands():
    def refuse(call):
        raise RuntimeError("operation not permitted when stream is capturing")

    machine = dry_machine()
    broken = Machine(machine.device, machine.name, machine.clock, refuse, dry=True)
    with standing_in(StandIn()), pytest.raises(RuntimeError, match="capturing"):
        bench_arms(
            (model := loaded()), magnitude(model), Job(2, 16, "fp16", 5), broken
        )  # GEMMs are timed as graphs
    calls = []

    def refuse_models(call):
        calls.append(call)
        if getattr(call, "__qualname__", "").startswith(("_forward", "_step")):
            raise RuntimeError("operation not permitted when stream is capturing")
        return call

    half = Machine(machine.device, machine.name, machine.clock, refuse_models, dry=True)
    with standing_in(StandIn()):
        found = bench_arms((model := loaded()), magnitude(model), Job(2, 16, "fp16", 5), half)
    assert (
        set(found.failed) == {"prefill, CUDA graph", "decode, CUDA graph"}
        and len(found.phases) == 2
    )


def test_without_kernels_or_masks_there_is_one_sentence():
    model = loaded()
    if not torch.cuda.is_available():
        with (
            standing_in(CuSparseLt()),
            pytest.raises(NmsparseError, match="Sparse kernels cannot run fp16 here"),
        ):
            bench_arms(model, magnitude(model), Job(), dry_machine())
    with standing_in(StandIn()), pytest.raises(NmsparseError, match="No ordinary layer"):
        bench_arms(model, MaskSet({}), Job(2, 16), dry_machine())


def test_a_layer_is_sparse_only_in_the_sparse_arm(made):
    _, _, found, arms = made
    for name, arm in arms.items():
        assert {isinstance(arm.get_submodule(site.layer), Sparse) for site in found} == {
            name == SPARSE
        }
