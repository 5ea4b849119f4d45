"""The ONNX Runtime engine, and the comparison of outputs."""

import math

import numpy as np
import pytest
import torch

from nmsparse_deploy.errors import CheckFailed, NmsparseError, UsageError
from nmsparse_deploy.ship.engine import agreement
from nmsparse_deploy.ship.onnx.onnxruntime import OnnxRuntime


def test_evidence_says_what_ran_and_that_zeros_are_multiplied(exported):
    engine = OnnxRuntime.build(exported("llama").path, {"threads": 1, "optimization": "basic"})
    evidence = engine.inspect()
    assert evidence["providers"] == evidence["requested"] == ["CPUExecutionProvider"]
    assert (evidence["threads"], evidence["optimization"], evidence["sparse_kernels"]) == (1, "basic", False)


def test_bf16_on_the_cpu_is_one_sentence(exported):
    with pytest.raises(NmsparseError, match="no kernels for a node of this bf16 graph") as caught:
        OnnxRuntime.build(exported("llama", "bf16", 23).path, {"threads": 1})
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("settings", [{"thread": 1}, {"optimization": "fast"}, {"provider": "gpu"}, {"sparse": True}])
def test_an_unknown_setting_is_a_usage_error(exported, settings):
    with pytest.raises(UsageError):
        OnnxRuntime.build(exported("llama").path, settings)


def test_a_provider_that_is_not_there_is_refused_and_not_replaced(exported):
    with pytest.raises(NmsparseError, match="has no 'CUDAExecutionProvider'"):
        import onnxruntime

        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            pytest.skip("this machine has it")
        OnnxRuntime.build(exported("llama").path, {"provider": "cuda"})


def test_damaged_and_missing_files_are_sentences(tmp_path):
    with pytest.raises(UsageError, match="no ONNX file"):
        OnnxRuntime.build(tmp_path / "m.onnx")
    (tmp_path / "m.onnx").write_bytes(b"not a graph")
    with pytest.raises(NmsparseError, match="could not open"):
        OnnxRuntime.build(tmp_path / "m.onnx")


def test_wrong_inputs_are_usage_errors(exported):
    engine = OnnxRuntime.build(exported("llama").path, {"threads": 1})
    with pytest.raises(UsageError, match="input_ids"):
        engine.run({"tokens": np.zeros((1, 4), np.int64)})
    with pytest.raises(NmsparseError, match="could not run"):
        engine.run({"input_ids": np.zeros((1, 2, 3), np.int64)})


def test_agreement_of_equal_outputs_is_perfect():
    x = torch.randn(2, 3, 10)
    same = agreement(x, x.numpy())
    assert (same.positions, same.max_abs, same.relative, same.argmax_share, same.mean_kl) == (6, 0, 0, 1, 0)
    assert agreement(x, x, "features").cosine == pytest.approx(1)


def test_agreement_measures_the_divergence_in_nats():
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    found = agreement(p.log(), q.log())
    assert found.mean_kl == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert agreement(torch.eye(300), torch.eye(300).roll(1, 0)).argmax_share == 0


def test_agreement_counts_only_what_the_mask_says():
    a, b = torch.zeros(2, 2, 4), torch.zeros(2, 2, 4)
    b[1, 1] = 7
    mask = torch.tensor([[1, 1], [1, 0]])
    assert agreement(a, b, mask=mask).max_abs == 0
    assert agreement(a, b, mask=mask).positions == 3


def test_agreement_refuses_what_cannot_be_compared():
    with pytest.raises(CheckFailed, match="2 of 4 values of the output are not finite"):
        agreement(torch.zeros(1, 4), torch.tensor([[0.0, math.inf, math.nan, 1.0]]))
    with pytest.raises(UsageError, match="shape"):
        agreement(torch.zeros(1, 4), torch.zeros(1, 5))
