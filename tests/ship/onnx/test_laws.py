"""What an export refuses, what it leaves behind, and what it does to odd modules."""

import builtins
import copy
import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from nmsparse_deploy.errors import CheckFailed, MissingExtra, NmsparseError, UsageError
from nmsparse_deploy.masks import Mask, MaskSet, project, tensor_hash
from nmsparse_deploy.models.base import Target
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.prove import verify_onnx
from nmsparse_deploy.prove.onnx_graph import OnnxGraph
from nmsparse_deploy.ship.onnx import LinkMap, export_onnx
from nmsparse_deploy.ship.onnx.prepare import cast_copy
from tests.fixtures.onnx_models import bake, case, linear_targets


class Twice(nn.Module):
    """One Linear that runs twice, and two modules that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.first, self.second = (nn.Linear(32, 32, bias=False) for _ in range(3))
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(self.again(self.again(x).relu())).relu())


class MaskedLinear(nn.Linear):
    def __init__(self, width):
        super().__init__(width, width, bias=False)
        self.register_buffer("mask", project(self.weight.detach().abs(), TWO_FOUR))

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.mask)


class Masked(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = MaskedLinear(width)

    def forward(self, x):
        return self.inner(x)


class Half(nn.Module):
    """One Linear without bias, fed 3-D activations."""

    def __init__(self, width=32):
        super().__init__()
        self.lin = nn.Linear(width, width, bias=False)

    def forward(self, x):
        return self.lin(x)


class Fails(Half):
    def forward(self, x):
        raise ValueError("the third cog is missing\nand more")


def sample(width=32):
    return {"x": torch.randn(2, 4, width, generator=torch.Generator().manual_seed(0))}


def masked_targets(module):
    return tuple(
        Target(f"{path}.weight", path, 0, 1, m.in_features, m.out_features, path)
        for path, m in module.named_modules()
        if isinstance(m, nn.Linear)
    )


def test_a_linear_called_twice_has_two_rows_and_a_shared_weight_one_per_module(tmp_path):
    module = Twice().eval()
    result = export_onnx(module, sample(), tmp_path, "m", linear_targets(module))
    assert [len(result.link.of(f"{name}.weight")) for name in ("again", "first", "second")] == [
        2,
        1,
        1,
    ]
    graph = OnnxGraph(tmp_path / "m.onnx")
    for row in result.link.rows:
        stored = torch.from_numpy(graph.read(row.tensor))
        weight = dict(module.named_parameters(remove_duplicate=False))[row.parameter]
        assert torch.equal(stored if row.axis == 1 else stored.T, weight)


def test_a_parametrized_mask_is_refused(tmp_path):
    class Mask(nn.Module):
        def forward(self, weight):
            return weight * project(weight.detach().abs(), TWO_FOUR)

    module = Half()
    targets = linear_targets(module)
    parametrize.register_parametrization(module.lin, "weight", Mask())
    with pytest.raises(
        NmsparseError, match="'lin' still computes its 'weight' through a parametrization"
    ):
        export_onnx(module, sample(), tmp_path, "m", targets)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("width", [32, 768])  # the exporter folds the mask into small weights only
def test_a_mask_applied_in_forward_is_refused(tmp_path, width):
    module = Masked(width).eval()
    with pytest.raises(CheckFailed) as caught:
        export_onnx(module, sample(width), tmp_path, "m", masked_targets(module))
    assert "bake" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_a_target_that_the_graph_does_not_use_is_an_error_that_names_it(tmp_path):
    module = Half()
    module.spare = nn.Linear(8, 8)
    with pytest.raises(CheckFailed, match=r"'spare\.weight' was not found"):
        export_onnx(module, sample(), tmp_path, "m", linear_targets(module))
    assert not list(tmp_path.iterdir())


def test_a_target_along_the_wrong_axis_is_not_proven(tmp_path):
    module = Half()
    wrong = Target("lin.weight", "lin", 0, 0, 32, 32, "")
    with pytest.raises(CheckFailed):
        export_onnx(module, sample(), tmp_path, "m", [wrong])


@pytest.mark.parametrize(
    "bad", [Target("lin.weigth", "lin", 0, 1, 32, 32, ""), Target("x.weight", "x", 0, 1, 1, 1, "")]
)
def test_a_target_that_the_model_lacks_is_a_usage_error(tmp_path, bad):
    with pytest.raises(UsageError, match="has no"):
        export_onnx(Half(), sample(), tmp_path, "m", [bad])


def test_a_failing_model_is_one_sentence_and_keeps_the_previous_export(tmp_path):
    good = Half()
    export_onnx(good, sample(), tmp_path, "m", linear_targets(good))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(NmsparseError) as caught:
        export_onnx(Fails(), sample(), tmp_path, "m", [])
    assert "ValueError: the third cog is missing" in caught.value.message
    assert "\n" not in caught.value.message
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_weight_beyond_half_precision_is_refused_by_name(tmp_path):
    module = Half()
    module.lin.weight.data[3, 5] = -70000.0
    with pytest.raises(
        NmsparseError, match=r"'lin\.weight' holds the value -70000, which does not fit float16"
    ):
        export_onnx(module, sample(), tmp_path, "m", linear_targets(module), precision="fp16")
    module.lin.weight.data[3, 5] = float("nan")
    with pytest.raises(NmsparseError, match="value nan"):
        cast_copy(module, torch.float16)


def test_values_too_small_for_half_precision_become_plus_zero_and_are_counted():
    module = Half()
    module.lin.weight.data[0, :2] = torch.tensor([-1e-12, 1e-12])
    copied, warnings = cast_copy(module, torch.float16)
    assert torch.equal(
        copied.lin.weight[0, :2].view(torch.int16), torch.zeros(2, dtype=torch.int16)
    )
    assert warnings == [
        "2 values of 1 tensors are too small for float16 and became 0, most of them in 'lin.weight'."
    ]


def test_the_callers_module_is_left_alone(tmp_path):
    module = Twice().train()
    before, forward = copy.deepcopy(module.state_dict()), module.forward
    export_onnx(module, sample(), tmp_path, "m", linear_targets(module), precision="fp16")
    assert (
        module.training
        and module.forward == forward
        and module.second.weight is module.first.weight
    )
    assert all(
        torch.equal(a, b) and a.dtype == b.dtype
        for a, b in zip(before.values(), module.state_dict().values())
    )


def test_tables_outside_the_state_dict_stay_in_full_precision():
    """Rotary frequencies in half precision turn far positions by a wrong angle."""
    module = Half()
    module.register_buffer("frequencies", torch.rand(8), persistent=False)
    module.register_buffer("running_mean", torch.rand(8))
    copied, _ = cast_copy(module, torch.float16)
    assert torch.equal(copied.frequencies, module.frequencies)
    assert copied.running_mean.dtype == torch.float16


def test_a_batch_of_one_is_traced_as_any_batch(tmp_path):
    llama = case("llama")
    result = export_onnx(llama.module, llama.inputs(1, 8), tmp_path, "m", llama.targets)
    assert (result.dynamic, result.warnings) == (("batch", "sequence"), ())


def test_the_link_map_is_what_verification_takes(tmp_path):
    module = Half()
    targets = linear_targets(module)
    dense = module.lin.weight.detach().clone()
    bake(module, targets)
    mask = Mask.pack(project(dense.abs(), TWO_FOUR), 1, TWO_FOUR, tensor_hash(dense))
    result = export_onnx(module, sample(), tmp_path, "m", targets)
    report = verify_onnx(
        tmp_path / "m.onnx", MaskSet({"lin.weight": mask}), result.link.by_parameter()
    )
    assert (report.ok, report.checked) == (True, 1)
    assert report.checks[0].sha256 in (None, result.link.rows[0].sha256)


def test_only_tensors_that_change_type_are_copied():
    module = Twice()
    same, _ = cast_copy(module, torch.float32)
    assert same is not module and same.first.weight is module.first.weight
    cast, _ = cast_copy(module, torch.float16)
    assert cast.first.weight.dtype == torch.float16 and cast.second.weight is cast.first.weight


def test_a_second_export_gives_the_same_bytes(tmp_path):
    torch.manual_seed(0)
    module = Twice()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        export_onnx(module, sample(), tmp_path / name, "m", linear_targets(module))
    for file in ("m.onnx", "m.onnx.data", "m.link.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_static_shapes_are_numbers(tmp_path):
    module = Half()
    result = export_onnx(
        module, {"x": torch.randn(1, 4, 32)}, tmp_path, "m", linear_targets(module), dynamic=False
    )
    assert (result.inputs[0].shape, result.dynamic) == ((1, 4, 32), ())


def test_a_bf16_conv_needs_a_later_opset(tmp_path):
    module = nn.Sequential(nn.Conv2d(4, 8, 1))
    inputs = {"input": torch.randn(2, 4, 6, 6)}
    with pytest.raises(NmsparseError, match="opset 20 has no Conv for bfloat16"):
        export_onnx(module, inputs, tmp_path, "m", [], precision="bf16")
    export_onnx(module, inputs, tmp_path, "m", [], precision="bf16", opset=23)


@pytest.mark.parametrize(
    "wrong",
    [
        {"precision": "fp8"},
        {"opset": 17},
        {"opset": 24},
        {"name": "a/b"},
        {"inputs": {}},
        {"inputs": {"x": torch.zeros(2, 1, dtype=torch.long)}},
    ],
)
def test_wrong_arguments_are_usage_errors(tmp_path, wrong):
    call = {"inputs": sample(), "name": "m"} | wrong
    with pytest.raises(UsageError):
        export_onnx(Half(), folder=tmp_path, targets=[], **call)


def test_a_missing_exporter_is_a_sentence(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "onnxscript":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match="needs the package 'onnxscript'"):
        export_onnx(Half(), sample(), tmp_path, "m", [])


def test_an_export_prints_nothing(tmp_path):
    code = (
        "import sys, torch; from pathlib import Path; from nmsparse_deploy.ship.onnx import export_onnx\n"
        "m = torch.nn.Linear(8, 8); i = {'input': torch.ones(2, 3, 8)}\n"
        "export_onnx(m, i, Path(sys.argv[1]), 'm', [])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_progress_counts_up_to_the_end(tmp_path):
    seen = []
    export_onnx(Half(), sample(), tmp_path, "m", [], progress=lambda *step: seen.append(step))
    assert [step[1] for step in seen] == [0, 1, 2, 3, 4]
    assert all(step[2] == 4 for step in seen)


ROW = {
    "parameter": "p",
    "module": "",
    "node": "mm",
    "op": "MatMul",
    "tensor": "w",
    "axis": 0,
    "shape": [8, 8],
    "dtype": "F32",
    "sha256": "",
}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"format": "other"}',
        '{"format": "nmsparse-link-1", "onnx": "m"}',
        '{"format": "nmsparse-link-1", "onnx": "m", "rows": [{"parameter": 1}]}',
        *(
            json.dumps({"format": "nmsparse-link-1", "onnx": "m", "rows": rows})
            for rows in ([{}], [3], "val_1", [ROW | {"tensor": None}], [ROW | {"axis": "0"}])
        ),
    ],
)
def test_a_damaged_link_file_is_a_usage_error(tmp_path, text):
    path = tmp_path / "m.link.json"
    with pytest.raises(UsageError, match="no link file"):
        LinkMap.load(path)
    path.write_text(text)
    with pytest.raises(UsageError, match="damaged"):
        LinkMap.load(path)


def test_a_whole_link_file_is_read(tmp_path):
    (tmp_path / "m.link.json").write_text(
        json.dumps({"format": "nmsparse-link-1", "onnx": "m", "rows": [ROW]})
    )
    assert LinkMap.load(tmp_path / "m.link.json").by_parameter()["p"][0].shape == (8, 8)
