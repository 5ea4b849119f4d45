"""What the command line says of every checkpoint in tests/hostile and tests/golden, and of files of
other formats: the right verdict by name."""

import json

import numpy as np
import pytest
import torch

from nmsparse_deploy.cli import app, invoke
from tests import ROOT
from tests.fixtures.onnx_files import node, tensor
from tests.fixtures.onnx_files import saved as saved_onnx
from tests.fixtures.tensor_files import dense, sparse
from tests.prove.test_checkpoint import saved
from tests.prove.test_gguf_file import written

FILES = {
    "hostile/linear-wrong": (1, "right for a Conv1D of Transformers ([in, out]), worth nothing"),
    "hostile/linear-mixed": (1, "layers.3.fc.weight: fails: it is 2:4 along axis 0, but layers of"),
    "golden/verify/sparse24-bitmask": (0, "l: 2:4 along axis 1, 2,048 groups"),
}


def verify(capfd, *arguments):
    """Exit code, and all that was said."""
    code = invoke(lambda: app(["verify", *(str(argument) for argument in arguments)]))
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    return code, out, err


def test_every_file_has_a_verdict():
    there = [*(ROOT / "tests/hostile").iterdir(), *(ROOT / "tests/golden/verify").iterdir()]
    names = [path for path in there if path.suffix == ".safetensors"]
    assert {str(path.relative_to(ROOT / "tests"))[: -len(".safetensors")] for path in names} == set(
        FILES
    )


@pytest.mark.parametrize("name", FILES)
def test_the_verdict_of_every_file(capfd, name):
    wanted, words = FILES[name]
    code, out, _ = verify(capfd, ROOT / "tests" / f"{name}.safetensors")
    assert code == wanted and words in out


def test_a_config_that_says_conv1d_makes_the_wrong_axis_right(tmp_path, capfd):
    weight = sparse(64, 64, axis=0)[0]
    path = saved(tmp_path, h__0__mlp__c_fc__weight=weight)
    assert verify(capfd, path)[0] == 1
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert verify(capfd, path)[0] == verify(capfd, tmp_path)[0] == 0


@pytest.mark.parametrize(
    "name, words",
    [
        ("model.pt", "a pickle, which can run code"),
        ("pytorch_model.bin", "a pickle, which can run code"),
        ("model.ort", "ONNX Runtime's own format"),
        ("model.pb", "protobuf of TensorFlow"),
        ("model.h5", "HDF5"),
        ("model.tflite", "TensorFlow Lite"),
        ("weights.npz", "NumPy"),
        ("model.onnx.data", "values of an ONNX model"),
        ("model.safetensors.index.json", "without weights"),
        ("model.xyz", "not a file with weights that can be read"),
        ("model", "not a file with weights that can be read"),
    ],
)
def test_other_formats_are_refused_for_what_they_are(tmp_path, capfd, name, words):
    (tmp_path / name).write_bytes(b"anything")
    code, _, err = verify(capfd, tmp_path / name)
    assert code == 2 and words in err and name in err
    assert ("can run code" in err) is (name in ("model.pt", "pytorch_model.bin"))
    if not name.endswith((".json", "xyz", "model")):
        code, _, err = verify(capfd, tmp_path)
        assert code == 2 and "no .safetensors weights" in err and words in err


def test_models_in_folders_and_names_in_capitals_are_verified(tmp_path, capfd):
    weight = sparse(64, 64, axis=0)[0].numpy()
    model = saved_onnx(tmp_path, [node("MatMul", "x w", "y")], [tensor("w", weight)])
    model.rename(tmp_path / "model.ONNX")
    for target in (tmp_path / "model.ONNX", tmp_path):
        code, out, _ = verify(capfd, target)
        assert code == 0 and "w: 2:4 along axis 0" in out
    saved(tmp_path, "MODEL.SAFETENSORS", layer=sparse(64, 64)[0])
    written(tmp_path / "model.gguf", {"blk.0.up.weight": np.ascontiguousarray(weight.T)})
    code, out, _ = verify(capfd, tmp_path)
    assert code == 0 and all(f"{name}: 2:4" in out for name in ("w", "layer", "blk.0.up.weight"))
    assert verify(capfd, tmp_path, "--expect", "layer", "--expect", "w")[0] == 0
    code, _, err = verify(capfd, tmp_path, "--expect", "layer", "--expect", "nowhere")
    assert code == 1 and "Nothing is called 'nowhere'" in err
    saved(tmp_path, "MODEL.SAFETENSORS", layer=dense(64, 64))
    assert verify(capfd, tmp_path)[0] == 1


def test_what_was_skipped_is_listed_by_reason(tmp_path, capfd):
    tensors = {f"h__{i}__norm__weight": torch.ones(64) for i in range(30)}
    tensors |= {f"h__{i}__odd": torch.ones(i + 1, 3) for i in range(3)}
    path = saved(tmp_path, good=sparse(64, 64)[0], wte=dense(100, 64), **tensors)
    code, out, _ = verify(capfd, path)
    lines = [line for line in out.splitlines() if "skipped, " in line]
    assert code == 0 and len(lines) == 3
    assert any(line == "  skipped, dense: wte" for line in lines)
    assert any("not a weight matrix: h." in line and "and 20 more" in line for line in lines)
    assert any("can be checked in groups of 4" in line and "h.2.odd" in line for line in lines)


def test_names_cannot_write_to_the_terminal(tmp_path, capfd):
    path = saved(tmp_path, **{"a\x1b[2Jb": sparse(64, 64)[0], "c\x1b]d": torch.ones(4)})
    code, out, _ = verify(capfd, path)
    assert code == 0 and "\x1b" not in out


def test_weights_that_no_sparse_core_takes_are_said(tmp_path, capfd):
    path = saved(tmp_path, good=sparse(64, 64)[0], odd=sparse(60, 100)[0])
    code, out, _ = verify(capfd, path)
    line = next(line for line in out.splitlines() if "sparse tensor cores" in line)
    assert code == 0 and line.endswith(": odd") and "1 of these weights by shape" in line
