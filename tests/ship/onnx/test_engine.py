"""The ONNX Runtime engine."""

import numpy as np
import pytest

from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.ship.onnx.onnxruntime import OnnxRuntime


def test_evidence_says_what_ran_and_that_zeros_are_multiplied(exported):
    engine = OnnxRuntime.build(exported("llama").path, {"threads": 1, "optimization": "basic"})
    evidence = engine.inspect()
    assert evidence.facts["providers"] == evidence.facts["requested"] == ["CPUExecutionProvider"]
    assert (evidence.facts["threads"], evidence.facts["optimization"], evidence.sparse_kernels) == (
        1,
        "basic",
        False,
    )


def test_bf16_on_the_cpu_is_one_sentence(exported):
    with pytest.raises(NmsparseError, match="no kernels for a node of this bf16 graph") as caught:
        OnnxRuntime.build(exported("llama", "bf16", 23).path, {"threads": 1})
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "settings", [{"thread": 1}, {"optimization": "fast"}, {"provider": "gpu"}, {"sparse": True}]
)
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
