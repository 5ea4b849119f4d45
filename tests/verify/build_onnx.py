"""ONNX graphs with one weight each, in every way a weight can reach a multiplication."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

TYPES = {"F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16,
         "F64": TensorProto.DOUBLE, "F8_E4M3": TensorProto.FLOAT8E4M3FN, "F8_E5M2": TensorProto.FLOAT8E5M2,
         "I8": TensorProto.INT8, "U8": TensorProto.UINT8, "I32": TensorProto.INT32, "I64": TensorProto.INT64,
         "I4": TensorProto.INT4, "U4": TensorProto.UINT4}


def tensor(name, values, dtype="F32", raw=True):
    """An initializer; `raw=False` uses the typed fields."""
    values = np.asarray(values)
    kind = TYPES[dtype]
    array = values.astype(helper.tensor_dtype_to_np_dtype(kind))
    if raw:
        return numpy_helper.from_array(array, name)
    return helper.make_tensor(name, kind, values.shape, array.astype(np.float64).reshape(-1).tolist())


def ints(name, *values):
    return numpy_helper.from_array(np.array(values, np.int64), name)


def node(op, inputs, output, name="", scopes=None, **attributes):
    made = helper.make_node(op, inputs.split(), [output], name=name or f"{op}_{output}", **attributes)
    if scopes is not None:
        made.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    return made


def model(nodes, tensors, functions=()):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(list(nodes), "g", [x], [y], initializer=list(tensors))
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=list(functions))


def saved(folder, nodes, tensors, name="m.onnx", **kwargs):
    """Written without any check, so that damaged models can be written too."""
    path = folder / name
    path.write_bytes(model(nodes, tensors, **kwargs).SerializeToString())
    return path


def external(name, values, location, offset=None, length=None, dtype=TensorProto.FLOAT):
    """An initializer whose bytes are said to lie in a file."""
    made = onnx.TensorProto(name=name, data_type=dtype, dims=list(np.shape(values)),
                            data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            made.external_data.add(key=key, value=str(value))
    return made
