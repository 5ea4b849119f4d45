"""The axis that a stored weight's layer reduces: what a checkpoint says about it, and what is said
when it says nothing."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers

from nmsparse_deploy.prove import verify_checkpoint
from nmsparse_deploy.prove.layout import CONV1D, INPUTS_FIRST, Layouts, read_config
from nmsparse_deploy.prove.report import gemm_shape
from tests.fixtures.tensor_files import dense, sparse
from tests.prove.test_checkpoint import by_name, saved


def pruned(*shape, axis, seed=0):
    return sparse(*shape, axis=axis, seed=seed)[0]


def config(folder, **table):
    (folder / "config.json").write_text(json.dumps(table))


def failed(report):
    return {check.tensor for check in report.checks if not check.ok}


# --- linear layers and Conv1D ---


def test_one_weight_along_its_first_axis_is_no_plain_pass(tmp_path):
    report = verify_checkpoint(saved(tmp_path, w=pruned(64, 64, axis=0)))
    assert not report.ok
    for words in ("right for a Conv1D", "worth nothing for a linear layer"):
        assert words in report.summary()


@pytest.mark.parametrize("shape", [(64, 64), (32, 64), (64, 32), (48, 50)])
@pytest.mark.parametrize(
    "table, ok",
    [
        ({"model_type": "gpt2"}, True),
        ({"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}}, True),
        ({"model_type": "llama"}, False),
        ({"model_type": "gpt_bigcode"}, False),
        ({"_class_name": "DiTTransformer2DModel"}, False),
        ({"architecture": "vit_tiny_patch16_224"}, False),
        ({"model_type": "own", "auto_map": {"AutoModel": "own.Own"}}, False),
        ({}, False),
    ],
)
@pytest.mark.parametrize("as_file", [True, False])
def test_config_json_decides(tmp_path, shape, table, ok, as_file):
    config(tmp_path, **table)
    path = saved(tmp_path, h__0__attn__c_proj__weight=pruned(*shape, axis=0))
    report = verify_checkpoint(path if as_file else tmp_path)
    assert report.ok is ok, report.summary()
    assert report.checks[0].axis == 0 and report.checks[0].note is None


def test_a_model_with_conv1d_layers_under_other_names_is_believed(tmp_path):
    config(tmp_path, model_type="gpt2")
    report = verify_checkpoint(saved(tmp_path, fc__weight=pruned(64, 64, axis=0)))
    assert report.ok and "which the model of config.json has" in report.checks[0].note
    names = {"fc__weight": pruned(64, 64, axis=0), "h__0__c_fc__weight": pruned(64, 96, axis=0)}
    assert failed(verify_checkpoint(saved(tmp_path, **names))) == {"fc.weight"}


def test_a_conv1d_that_is_pruned_like_a_linear_layer_fails(tmp_path):
    config(tmp_path, model_type="gpt2")
    weights = {f"h__{i}__mlp__c_fc__weight": pruned(64, 96, axis=0, seed=i) for i in range(3)}
    weights["h__1__mlp__c_fc__weight"] = pruned(64, 96, axis=1)
    weights["lm_head__weight"] = pruned(100, 64, axis=1)
    report = verify_checkpoint(saved(tmp_path, **weights))
    assert failed(report) == {"h.1.mlp.c_fc.weight"} and "reduces axis 0" in report.summary()


def test_all_layers_along_the_wrong_axis_fail_beside_a_config(tmp_path):
    config(tmp_path, model_type="llama")
    weights = {f"layers__{i}__fc__weight": pruned(64, 96, axis=0, seed=i) for i in range(3)}
    report = verify_checkpoint(saved(tmp_path, **weights))
    assert report.failed == 3 and "'fc' is no Conv1D: its layer reduces axis 1" in report.summary()


@pytest.mark.parametrize("axis, outputs", [(0, 96), (1, 64)])
def test_a_bias_is_as_long_as_the_outputs(tmp_path, axis, outputs):
    config(tmp_path, model_type="own", auto_map={})
    for name in ("fc.weight", "attn.in_proj_weight", "w"):
        bias = {"fc.weight": "fc.bias", "attn.in_proj_weight": "attn.in_proj_bias"}
        tensors = {bias.get(name, f"{name}_bias"): torch.zeros(outputs)}
        right = {**tensors, name: pruned(64, 96, axis=axis)}
        wrong = {**tensors, name: pruned(64, 96, axis=1 - axis)}
        assert verify_checkpoint(saved(tmp_path, **right)).ok
        report = verify_checkpoint(saved(tmp_path, **wrong))
        assert f"its bias has {outputs} values: its layer reduces axis {axis}" in report.summary()


def test_a_square_layer_is_like_another_of_its_name(tmp_path):
    weights = {
        "attn__c_proj__weight": pruned(64, 64, axis=0),
        "attn__c_proj__bias": torch.zeros(64),
        "mlp__c_proj__weight": pruned(96, 64, axis=0),
        "mlp__c_proj__bias": torch.zeros(64),
    }
    assert verify_checkpoint(saved(tmp_path, **weights)).ok
    weights["attn__c_proj__weight"] = pruned(64, 64, axis=1)
    assert failed(verify_checkpoint(saved(tmp_path, **weights))) == {"attn.c_proj.weight"}


def test_a_file_that_agrees_is_believed_and_the_row_says_so(tmp_path):
    weights = {f"h__{i}__fc__weight": pruned(64, 64, axis=0, seed=i) for i in range(2)}
    report = verify_checkpoint(saved(tmp_path, **weights, wte=dense(100, 64)))
    assert report.ok and "taken for a Conv1D" in by_name(report)["h.0.fc.weight"].note
    # A linear layer in the same file, even a dense one, is against it.
    linear = {"head__weight": dense(32, 64), "head__bias": torch.zeros(32)}
    report = verify_checkpoint(saved(tmp_path, **weights, **linear))
    assert report.failed == 2


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("name", ["layers__{}__fc__weight", "fc{}__weight", "stack_{}_w"])
@pytest.mark.parametrize("rank", [2, 3])
def test_the_odd_one_of_equal_layers_fails(tmp_path, odd, name, rank):
    shape = (4, 64, 64)[-rank:]
    weights = {
        name.format(i): pruned(*shape, axis=rank - 1 - (odd if i == 3 else 1 - odd), seed=i)
        for i in range(6)
    }
    report = verify_checkpoint(saved(tmp_path, **weights))
    assert failed(report) == {name.format(3).replace("__", ".")}
    assert "5 of 6 like it" in report.summary()


def test_layers_that_differ_without_a_reason_fail_along_the_first_axis(tmp_path):
    q, o = pruned(64, 64, axis=1), pruned(64, 96, axis=0)
    report = verify_checkpoint(saved(tmp_path, l__0__q__weight=q, l__0__o__weight=o))
    assert failed(report) == {"l.0.o.weight"}
    pair = {"l__0__q__weight": q, "l__1__q__weight": pruned(64, 64, axis=0)}
    assert failed(verify_checkpoint(saved(tmp_path, **pair))) == {"l.1.q.weight"}


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"model_type": 3}', "[" * 100_000, '{"a": [{"model_type": "gpt2"}]}']
)
def test_a_config_that_says_nothing_is_passed_over(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert not read_config(tmp_path).linear and not read_config(tmp_path).conv1d
    assert verify_checkpoint(saved(tmp_path, w=pruned(64, 64, axis=1))).ok


def test_the_tables_are_those_of_transformers():
    """A model type whose code makes a `Conv1D`, or experts of [experts, in, out]."""
    code = Path(transformers.__file__).parent / "models"
    found, inputs_first = {}, set()
    for path in sorted(code.glob("*/modeling_*.py")):
        text = path.read_text()
        layers = set(re.findall(r"self\.(\w+) = Conv1D\(", text))
        if layers:
            found[path.parent.name] = layers
        if re.search(r"self\.gate_up_proj = [^=]*num_experts,\s*[\w.]+,\s*2 \* ", text):
            inputs_first.add(path.parent.name)
    types = {"openai": "openai-gpt", "clvp": "clvp_decoder"}
    assert {types.get(name, name): layers for name, layers in found.items()} == CONV1D
    types = {"aria": "aria_text", "llama4": "llama4_text"}
    assert {types.get(name, name) for name in inputs_first} <= INPUTS_FIRST


# --- stacks and kernels ---


@pytest.mark.parametrize("axis", [1, 2])
def test_stacks_are_stored_both_ways_and_biases_tell(tmp_path, axis):
    weight = pruned(4, 64, 32, axis=axis)
    assert verify_checkpoint(saved(tmp_path, experts=weight)).checks[0].axis == axis
    for outputs in (32, 64):
        report = verify_checkpoint(
            saved(tmp_path, experts=weight, experts_bias=torch.zeros(4, outputs))
        )
        assert report.ok is (outputs == weight.shape[3 - axis])


def test_experts_of_a_known_model_have_their_inputs_first(tmp_path):
    config(tmp_path, model_type="llama4", text_config={"model_type": "llama4_text"})
    name = "layers__0__feed_forward__experts__gate_up_proj"
    assert verify_checkpoint(saved(tmp_path, **{name: pruned(4, 32, 64, axis=1)})).ok
    report = verify_checkpoint(saved(tmp_path, **{name: pruned(4, 32, 64, axis=2)}))
    assert "reduces axis 1" in report.summary()


@pytest.mark.parametrize("kernel", [(3, 3), (2,), (3, 3, 3)])
def test_transposed_convolutions_reduce_their_first_axis(tmp_path, kernel):
    wide, right, wrong = (64, 32, *kernel), {}, {}
    right["up.weight"], wrong["up.weight"] = pruned(*wide, axis=0), pruned(*wide, axis=1)
    for bias, name in ((True, "up"), (False, "conv_transpose1"), (False, "deconv")):
        tensors = {f"{name}.bias": torch.zeros(32)} if bias else {}
        report = verify_checkpoint(
            saved(tmp_path, **tensors, **{f"{name}.weight": right["up.weight"]})
        )
        assert report.ok and by_name(report)[f"{name}.weight"].axis == 0
        assert by_name(report)[f"{name}.weight"].shape_verdict == "recommended"
        tensors[f"{name}.weight"] = wrong["up.weight"]
        report = verify_checkpoint(saved(tmp_path, **tensors))
        assert not report.ok, report.summary()


def test_a_convolution_that_is_sparse_along_its_outputs_fails(tmp_path):
    good = pruned(64, 32, 3, 3, axis=1)
    for bias in ({"bad.bias": torch.zeros(64)}, {}):
        report = verify_checkpoint(
            saved(tmp_path, good=good, **bias, **{"bad.weight": pruned(64, 32, 3, 3, axis=0)})
        )
        assert failed(report) == {"bad.weight"}
    assert "right for a transposed convolution" in report.summary()


@pytest.mark.parametrize("groups, inputs, ok", [(2, 32, True), (4, 16, True), (2, 6, False)])
def test_grouped_transposed_convolutions_count_per_group(tmp_path, groups, inputs, ok):
    """Groups of four inputs may not reach from one group of the convolution into the next."""
    weight = pruned(groups * inputs, 8, 3, 3, axis=0)
    tensors = {"up.weight": weight, "up.bias": torch.zeros(8 * groups)}
    if weight.shape[0] == 8 * groups:
        tensors = {"deconv.weight": weight, "deconv.bias": torch.zeros(8 * groups)}
    report = verify_checkpoint(saved(tmp_path, good=pruned(64, 64, axis=1), **tensors))
    (check,) = [check for check in report.checks if check.tensor.endswith(".weight")]
    if ok:
        assert check.axis == 0 and check.ok and check.skipped is None
        assert check.shape_verdict == "ineligible by shape"
    else:
        assert "each of its 2 groups has 6 inputs" in check.skipped


def test_grouped_and_depthwise_kernels_keep_their_inputs_on_the_second_axis(tmp_path):
    report = verify_checkpoint(
        saved(tmp_path, grouped=pruned(64, 16, 3, 3, axis=1), depthwise=dense(64, 1, 3, 3))
    )
    assert report.ok and by_name(report)["grouped"].axis == 1
    assert "no axis" in by_name(report)["depthwise"].skipped


def test_k_and_n_of_transposed_convolutions():
    assert gemm_shape((64, 32, 2, 2), 0) == (64, 32)
    assert Layouts({"w": (64,)}, read_config(Path("."))).of("w").axes == ()
