"""Every family, precision and opset: the graph computes what the model computes, and the weights in
it are the model's."""

import json

import numpy as np
import onnx
import pytest
import torch

from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.prove import verify_onnx
from nmsparse_deploy.prove.agreement import agreement
from nmsparse_deploy.prove.group_counter import check
from nmsparse_deploy.prove.onnx_graph import OnnxGraph
from nmsparse_deploy.ship.onnx import LinkMap
from tests.fixtures.onnx_models import FAMILIES

EVERY = [
    (family, precision, opset)
    for family in FAMILIES
    for precision in ("fp32", "fp16")
    for opset in (20, 23)
]
FAST = {
    ("llama", "fp32", 20),
    ("llama", "fp32", 23),
    ("bert", "fp32", 20),
    ("dinov2", "fp16", 20),
    ("gpt2", "fp16", 20),
}
COMBINATIONS = [pytest.param(*c, marks=() if c in FAST else pytest.mark.matrix) for c in EVERY]


def kind_of(case):
    return "logits" if case.output == "logits" else "features"


@pytest.mark.parametrize(("family", "precision", "opset"), COMBINATIONS)
def test_outputs_agree_with_the_model_at_other_shapes_than_traced(
    exported, family, precision, opset
):
    made = exported(family, precision, opset)
    onnx.checker.check_model(str(made.path), full_check=True)
    for batch, length in ((1, 5), (3, 13)):
        inputs = made.case.inputs(batch, length)
        output = made.run(inputs)
        close = agreement(
            made.case.reference(inputs), output, kind_of(made.case), inputs.get("attention_mask")
        )
        if precision == "fp32":
            assert close.max_abs < 2e-5
            assert close.argmax_share in (1.0, None)
        else:
            assert close.relative < 5e-3
            assert close.mean_kl is None or close.mean_kl < 1e-5
            assert close.cosine is None or close.cosine > 0.9999


@pytest.mark.parametrize(("family", "precision", "opset"), COMBINATIONS)
def test_every_target_is_linked_along_its_reduction_axis(exported, family, precision, opset):
    made = exported(family, precision, opset)
    rows, graph = made.result.link.rows, OnnxGraph(made.path)
    assert sorted(row.parameter for row in rows) == sorted(
        target.name for target in made.case.targets
    )
    parameters = dict(made.case.module.named_parameters())
    for target, row in zip(made.case.targets, rows):
        stored = torch.from_numpy(graph.read(row.tensor))
        weight = parameters[target.name].detach().to(stored.dtype)
        assert stored.shape == row.shape
        assert torch.equal(stored if row.axis == target.axis else stored.T, weight)
        assert stored.shape[row.axis] == target.k


@pytest.mark.parametrize(("family", "precision", "opset"), COMBINATIONS)
def test_the_pattern_survives_exactly_and_no_zero_is_negative(exported, family, precision, opset):
    made = exported(family, precision, opset)
    graph = OnnxGraph(made.path)
    for row in made.result.link.rows:
        count = check(graph.read(row.tensor), TWO_FOUR, row.axis)
        assert (count.bad, count.negative_zeros) == (0, 0)
        assert precision != "fp32" or count.sparser == 0


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f == "llama" else pytest.mark.matrix) for f in FAMILIES]
)
def test_bf16_keeps_the_pattern_and_its_values(exported, family):
    made = exported(family, "bf16", 23)
    graph = OnnxGraph(made.path)
    for row in made.result.link.rows:
        assert row.dtype == "BF16"
        raw = torch.from_numpy(graph.read(row.tensor).view(np.int16)).view(torch.bfloat16)
        count = check(raw, TWO_FOUR, row.axis)
        assert (count.bad, count.negative_zeros) == (0, 0)


def test_names_in_the_graph_are_the_names_in_the_model(exported):
    made = exported("gpt2", "fp16")
    model = onnx.load(str(made.path), load_external_data=False)
    stored = {tensor.name for tensor in model.graph.initializer}
    assert "transformer.h.0.mlp.c_fc.weight" in stored
    assert [value.name for value in model.graph.input] == ["input_ids"]
    assert [value.name for value in model.graph.output] == ["logits"]


def test_the_result_says_what_varies_and_what_it_weighs(exported):
    made = exported("llama")
    result = made.result
    assert result.dynamic == ("batch", "sequence")
    assert result.inputs[0].shape == ("batch", "sequence")
    assert result.outputs[0].shape == ("batch", "sequence", 128)
    assert result.files == {path.name: path.stat().st_size for path in made.folder.iterdir()}
    assert "stores the zeros" in result.size_note
    assert sum(result.files.values()) >= result.dense_bytes
    assert json.loads(json.dumps(result.as_dict()))["link"]["rows"][0]["op"] == "MatMul"
    assert exported("dinov2", "fp16").result.dynamic == ("batch",)


def test_the_link_file_is_the_link_map(exported):
    made = exported("llama")
    assert LinkMap.load(made.folder / "llama.link.json") == made.result.link


def test_the_graph_names_no_place_on_this_machine(exported):
    data = exported("llama").path.read_bytes()
    assert b".py" not in data and b"stack_trace" not in data
    assert b"name_scopes" in data


def test_the_weights_lie_in_one_file_beside_the_graph(exported):
    model = onnx.load(str(exported("llama").path), load_external_data=False)
    places = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert places == {"llama.onnx.data"}
    inside = [
        tensor for tensor in model.graph.initializer if tensor.data_location != tensor.EXTERNAL
    ]
    assert all(len(tensor.raw_data) < 1024 for tensor in inside)


@pytest.mark.parametrize(("family", "precision", "opset"), COMBINATIONS)
def test_every_multiplication_of_an_export_is_followed(exported, family, precision, opset):
    report = verify_onnx(exported(family, precision, opset).path).strict()
    assert report.ok and report.checked and not report.not_followed, report.failures()
