"""Repairs of the graph, on graphs written by hand."""

import numpy as np
import onnx
from onnx import TensorProto, helper

from nmsparse_deploy.ship.onnx.tidy import (
    TensorSpec,
    expand_rotary_tables,
    fix_numeric_dims,
    fixed_axes,
    strip_metadata,
)


def graph(nodes, inputs, outputs, opset=23):
    values = [
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in group.items()
        ]
        for group in (inputs, outputs)
    ]
    return helper.make_model(
        helper.make_graph(nodes, "g", *values),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=10,
    )


def test_an_axis_named_like_a_number_becomes_the_number():
    model = graph(
        [helper.make_node("Relu", ["x"], ["y"])], {"x": ["batch", "32"]}, {"y": ["batch", "32"]}
    )
    assert fix_numeric_dims(model) == 2
    dims = model.graph.input[0].type.tensor_type.shape.dim
    assert (dims[0].dim_param, dims[1].dim_value, dims[1].dim_param) == ("batch", 32, "")


def test_an_axis_that_silently_became_a_number_is_told():
    specs = (
        TensorSpec("ids", "int64", (1, "sequence")),
        TensorSpec("mask", "int64", ("batch", "sequence")),
    )
    assert fixed_axes(specs, {"mask": {0, 1}, "ids": {0, 1}}) == [
        "Axis 0 of the input 'ids' cannot vary: tracing fixed it to 1."
    ]
    assert fixed_axes(specs[1:], {"mask": {0, 1}, "ids": {0}}) == [
        "The graph has no input 'ids': the model ignores it."
    ]


def test_metadata_but_the_module_path_is_dropped():
    model = graph([helper.make_node("Relu", ["x"], ["y"])], {"x": [1]}, {"y": [1]})
    for key in ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.name_scopes"):
        model.graph.node[0].metadata_props.add(key=key, value="v")
    strip_metadata(model)
    assert [prop.key for prop in model.graph.node[0].metadata_props] == [
        "pkg.torch.onnx.name_scopes"
    ]


def rotary(tables):
    nodes = [
        helper.make_node("Cos", ["angle"], ["cos"]),
        helper.make_node("Sin", ["angle"], ["sin"]),
        helper.make_node("RotaryEmbedding", ["x", "cos", "sin"], ["q"], num_heads=2),
        helper.make_node("Cos", ["angle"], ["cos2"]),
        helper.make_node("Sin", ["angle"], ["sin2"]),
        helper.make_node("RotaryEmbedding", ["q", "cos2", "sin2"], ["y"], num_heads=2),
    ]
    return graph(nodes, {"x": ["b", 2, "s", 8], "angle": [tables, "s", 4]}, {"y": ["b", 2, "s", 8]})


def test_rotary_tables_get_the_batch_of_what_they_turn():
    import onnxruntime as ort

    rng = np.random.default_rng(0)
    x, angle = (
        rng.standard_normal((3, 2, 5, 8), np.float32),
        rng.standard_normal((1, 5, 4), np.float32),
    )
    model = rotary(1)
    assert expand_rotary_tables(model) == 2
    onnx.checker.check_model(model)
    repaired = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x, "angle": angle})[
        0
    ]
    whole = ort.InferenceSession(rotary("b").SerializeToString())
    expected = whole.run(None, {"x": x, "angle": np.repeat(angle, 3, 0)})[0]
    assert np.array_equal(repaired, expected)


def test_equal_rotary_tables_are_computed_once():
    model = rotary(1)
    expand_rotary_tables(model)
    kinds = [node.op_type for node in model.graph.node]
    assert (kinds.count("Cos"), kinds.count("Sin"), kinds.count("Expand")) == (1, 1, 2)


def test_a_graph_without_rotary_embedding_is_left_alone():
    model = graph([helper.make_node("Relu", ["x"], ["y"])], {"x": [1]}, {"y": [1]})
    before = model.SerializeToString()
    assert expand_rotary_tables(model) == 0
    assert model.SerializeToString() == before
