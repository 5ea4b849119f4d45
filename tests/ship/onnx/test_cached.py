"""Prefill and decode with a cache: they compute what one pass computes, on one copy of the
weights."""

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch

from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.prove.group_counter import check
from nmsparse_deploy.prove.onnx_graph import OnnxGraph
from nmsparse_deploy.ship.onnx.cached import DECODE, PREFILL, check_steps, export_cached
from nmsparse_deploy.ship.onnx.onnxruntime import OnnxRuntime
from nmsparse_deploy.ship.onnx.share import share_weights
from tests.fixtures import pico
from tests.fixtures.onnx_models import bake, linear_targets

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
SLOW = pytest.mark.matrix
CASES = [
    pytest.param("llama", 20),
    pytest.param("llama", 23, marks=SLOW),
    pytest.param("gpt2", 20, marks=SLOW),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    def make(name, opset):
        module = getattr(pico, name)()
        targets = linear_targets(module, "model.layers" if name == "llama" else "transformer.h")
        bake(module, targets)
        folder = tmp_path_factory.mktemp("cached")
        graphs = export_cached(module, folder, targets, opset=opset)
        before = sum(file.stat().st_size for file in folder.glob("*.data"))
        saved = share_weights(folder, [PREFILL, DECODE])
        sessions = {
            n: OnnxRuntime.build(folder / f"{n}.onnx", {"threads": 1}) for n in (PREFILL, DECODE)
        }
        return SimpleNamespace(
            module=module,
            targets=targets,
            folder=folder,
            graphs=graphs,
            sessions=sessions,
            before=before,
            saved=saved,
        )

    cache = {}

    def once(name="llama", opset=20):
        if (name, opset) not in cache:
            cache[name, opset] = make(name, opset)
        return cache[name, opset]

    return once


def ids(batch, length):
    return torch.randint(0, 250, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize(("name", "opset"), CASES)
def test_prefill_and_steps_give_the_logits_of_one_pass(made, name, opset):
    found = made(name, opset)
    for batch, length, steps in ((1, 9, 3), (3, 14, 6)):
        close = check_steps(found.module, found.sessions, ids(batch, length), steps)
        assert (
            close.max_abs < 2e-5 and close.argmax_share == 1 and close.positions == batch * length
        )


@torch.no_grad()
def test_the_mask_and_the_positions_of_padded_texts_are_obeyed(made):
    """Two texts of different length, the shorter padded on the left, through prefill and one
    step."""
    found = made()
    text, shorter, pad = ids(1, 8), ids(1, 5), 3
    rows = torch.cat([text, torch.cat([torch.zeros(1, pad, dtype=torch.int64), shorter], 1)])
    mask = torch.tensor([[1] * 8, [0] * pad + [1] * 5])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = found.sessions[PREFILL].run(
        {"input_ids": rows[:, :7], "attention_mask": mask[:, :7], "position_ids": positions[:, :7]}
    )
    past = {
        f"past_key_values.{key.removeprefix('present.')}": v
        for key, v in out.items()
        if key != "logits"
    }
    last = found.sessions[DECODE].run(
        {"input_ids": rows[:, 7:], "attention_mask": mask, "position_ids": positions[:, 7:], **past}
    )["logits"][:, -1]
    for row, alone in zip(last, (text, shorter)):
        assert np.abs(row - found.module(alone).logits[0, -1].numpy()).max() < 2e-5


def test_constant_axes_are_numbers_and_the_others_have_names(made):
    prefill, decode = made().graphs
    shapes = {spec.name: spec.shape for spec in decode.inputs}
    assert shapes["input_ids"] == ("batch", 1) and shapes["attention_mask"] == ("batch", "past + 1")
    assert shapes["past_key_values.1.value"] == ("batch", 2, "past", 16)
    assert {spec.name: spec.shape for spec in decode.outputs}["present.0.key"] == (
        "batch",
        2,
        "past + 1",
        16,
    )
    assert {spec.name: spec.shape for spec in prefill.inputs} == dict.fromkeys(
        ("input_ids", "attention_mask", "position_ids"), ("batch", "sequence")
    )


def test_there_is_one_copy_of_the_weights(made):
    found = made()
    (data,) = found.folder.glob("*.data")
    assert data.name == "prefill.onnx.data" and found.saved >= 0.99 * (
        found.before - data.stat().st_size
    )
    assert data.stat().st_size < 0.51 * found.before
    for graph in (PREFILL, DECODE):
        onnx.checker.check_model(str(found.folder / f"{graph}.onnx"), full_check=True)


def test_every_target_is_linked_in_both_graphs_and_keeps_the_pattern(made):
    found = made()
    for graph in found.graphs:
        stored = OnnxGraph(found.folder / f"{graph.name}.onnx")
        assert sorted(row.parameter for row in graph.link.rows) == sorted(
            t.name for t in found.targets
        )
        for row in graph.link.rows:
            weight = found.module.get_parameter(row.parameter).detach()
            values = torch.from_numpy(stored.read(row.tensor))
            assert torch.equal(values if row.axis == 1 else values.T, weight)
            assert check(values.numpy(), TWO_FOUR, row.axis).bad == 0


def test_what_only_one_graph_has_is_appended(tmp_path):
    from onnx import TensorProto, helper, numpy_helper

    same, other = np.arange(64, dtype=np.float32), np.ones(64, np.float32)
    for name, values in (("a", [same]), ("b", [other, same])):
        stored = [numpy_helper.from_array(v, f"{name}{i}") for i, v in enumerate(values)]
        nodes = [helper.make_node("Sum", ["x", *(t.name for t in stored)], ["y"])]
        io = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, [64])] for n in "xy"]
        model = helper.make_model(helper.make_graph(nodes, "g", *io, stored), ir_version=10)
        onnx.save(
            model,
            str(tmp_path / f"{name}.onnx"),
            save_as_external_data=True,
            location=f"{name}.onnx.data",
            size_threshold=0,
        )
    assert share_weights(tmp_path, ["a", "b"]) == same.nbytes
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data", "b.onnx"]
    read = {
        t.name: numpy_helper.to_array(t)
        for t in onnx.load(str(tmp_path / "b.onnx")).graph.initializer
    }
    assert np.array_equal(read["b0"], other) and np.array_equal(read["b1"], same)
